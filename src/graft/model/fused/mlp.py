"""Gated MLPs as one operation: down(act(gate(x)) * up(x)), and its gradient. Knows modules, not trees.

transformers computes it as five operations and keeps five tensors for the backward pass. Here the gate's and the up
layer's outputs alone are kept, what lies between the matrix products is computed again, piece by piece in the cache,
and the gradients of all three layers' LoRA factors are taken from the same pieces while they are there.

Shapes: T tokens, d hidden size, f intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.model.fused.linear import SmallGradients, Weights, pieces, product, pull
from graft.model.fused.lora import compute_dtype, weights_of

LAYERS = ("gate_proj", "up_proj", "down_proj")
Lent = Callable[[nn.Module], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation and its derivative's product with a gradient."""

    of: Callable[[Tensor], Tensor]
    back: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Writes (gradient of the output, input) -> gradient of the input, into the third."""


_silu_back, _gelu_back = torch.ops.aten.silu_backward.grad_input, torch.ops.aten.gelu_backward.grad_input

ACTIVATIONS = (
    Activation(F.silu, lambda grad, x, into: _silu_back(grad, x, grad_input=into)),
    Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x, into: _gelu_back(grad, x, approximate="tanh", grad_input=into),
    ),
    Activation(F.gelu, lambda grad, x, into: _gelu_back(grad, x, grad_input=into)),
)


def there(_module: nn.Module) -> AbstractContextManager[None]:
    """A module has its numbers."""
    return nullcontext()


def fuse_mlps(model: nn.Module, lent: Lent = there) -> int:
    """Let every gated MLP of a model compute itself as one operation; returns how many do.

    A kind of module is replaced only after ours gave its numbers on a probe: names promise nothing. A call that one
    operation does not cover (LoRA's dropout, a quantised or otherwise wrapped layer) is left to the module's own
    forward. `lent` surrounds the probe.
    """
    known: dict[tuple[type, type], Activation | None] = {}
    fused = 0
    for module in model.modules():
        if {name for name, _ in module.named_children()} != {*LAYERS, "act_fn"}:
            continue
        kind = (type(module), type(module.act_fn))
        if kind not in known:
            with lent(module):
                known[kind] = _activation(module)
        if (activation := known[kind]) is not None:
            module.forward = MethodType(_forward(activation), module)
            fused += 1
    return fused


def _activation(module: Any) -> Activation | None:
    """The activation with which ours computes this module; None where none gives its numbers."""
    layers = [weights_of(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    if layers[0] is None or None in layers:
        return None
    weight = layers[0].weight
    hollow = weight.is_meta  # a model without numbers, which is only counted: its parts' names are believed
    device = torch.device("cpu") if hollow else weight.device
    probe = torch.linspace(-3, 3, 3 * module.gate_proj.in_features, device=device, dtype=weight.dtype)
    x = probe.view(3, -1)
    with torch.no_grad():
        wanted = None if hollow else module(x)
        for activation in ACTIVATIONS:
            if not _close(activation.of(probe), module.act_fn(probe)):
                continue
            if wanted is None or _close(_forward(activation)(module, x), wanted):
                return activation
    return None


def _close(ours: Tensor, wanted: Tensor) -> bool:
    """Equal to rounding, with a margin of about ten."""
    exact = ours.dtype == torch.float32
    return torch.allclose(ours, wanted, rtol=1e-4 if exact else 2e-2, atol=1e-5 if exact else 1e-2)


def _forward(activation: Activation) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        found = [weights_of(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj)]
        layers = [layer for layer in found if layer is not None]
        dtype = compute_dtype(x, *layers)
        if len(layers) < len(LAYERS) or dtype is None:
            own: Tensor = type(self).forward(self, x)
            return own
        scalings = [layer.scaling for layer in layers]
        tensors = [t for layer in layers for t in (layer.weight, layer.bias, layer.down, layer.up)]
        fused: Tensor = _GatedMlp.apply(x, activation, dtype, scalings, *tensors)  # type: ignore[no-untyped-call]
        return fused

    return forward


def _layers(tensors: Sequence[Tensor], scalings: Sequence[float], dtype: torch.dtype) -> list[Weights]:
    """Gate, up and down layer of the tensors that autograd was given in a row."""
    by_layer = zip(tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4], scalings, strict=True)
    return [Weights(*parts).to(dtype) for parts in by_layer]


class _GatedMlp(torch.autograd.Function):
    """With g = gate(x), u = up(x), h = act(g) u and D the gradient of h:  dg = act'(g) D u,  du = D act(g)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, activation: Activation, dtype: torch.dtype, scalings: Sequence[float], *tensors: Tensor
    ) -> Tensor:
        gate, up, down = _layers(tensors, scalings, dtype)
        flat = x.to(dtype).flatten(0, -2)
        g, u = product(flat, gate), product(flat, up)
        ctx.save_for_backward(x, g, u, *tensors)
        ctx.activation, ctx.dtype, ctx.scalings = activation, dtype, scalings
        return product(_gated(activation, g, u), down).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, g, u, *tensors = ctx.saved_tensors
        activation: Activation = ctx.activation
        gate, up, down = layers = _layers(tensors, ctx.scalings, ctx.dtype)
        wants = ctx.needs_input_grad[4:]
        small = [
            SmallGradients(layer, wants[4 * n + 1], wants[4 * n + 2] or wants[4 * n + 3])
            for n, layer in enumerate(layers)
        ]
        flat = x.to(ctx.dtype).flatten(0, -2)
        dy = grad.to(ctx.dtype).flatten(0, -2)
        du, dg = pull(dy, down), torch.empty_like(g)  # du is the gradient of h until its piece is done
        for part in pieces(g):
            acted = activation.of(g[part])
            small[2].add(dy[part], acted * u[part])
            activation.back(du[part] * u[part], g[part], dg[part])
            du[part].mul_(acted)
            small[0].add(dg[part], flat[part])
            small[1].add(du[part], flat[part])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = pull(du, up, onto=pull(dg, gate)).view(x.shape).to(x.dtype)
        of_weights: list[Tensor | None] = [None, None, None]
        if any(wants[0::4]):  # full fine-tuning
            operands = ((dg, flat), (du, flat), (dy, _gated(activation, g, u)))
            of_weights = [
                (a.T @ b).to(w.dtype) if want else None
                for (a, b), w, want in zip(operands, tensors[0::4], wants[0::4], strict=True)
            ]
        of_tensors = [t for n, s in enumerate(small) for t in (of_weights[n], s.bias, s.down, s.up)]
        return dx, None, None, None, *of_tensors


def _gated(activation: Activation, g: Tensor, u: Tensor) -> Tensor:
    """[T, f] act(g) u."""
    h = torch.empty_like(g)
    for part in pieces(g):
        torch.mul(activation.of(g[part]), u[part], out=h[part])
    return h
