"""A linear layer with LoRA as one operation: PEFT's layer and its numbers, without its passes over memory.

PEFT computes `linear(x) + lora_B(lora_A(dropout(x))) * scaling` as five operations, three of which only stream a
tensor as large as the layer's output through memory, and as many again in the backward pass; on a CPU that is a fifth
of the product's own time. How they are saved is said in `model/fused/linear.py`.

Shapes: T tokens, i and o features in and out, r rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.model.fused.linear import SmallGradients, Weights, pieces, product, pull
from graft.model.fused.product import on_amd


def fuse_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer of a PEFT model compute itself as one operation; returns how many do.

    Only `torch.nn.Linear` with ordinary LoRA: DoRA and its like, a bias of their own, or quantised bases keep PEFT's
    forward. The layers stay PEFT's in every other respect (saving, merging, switching off).
    """
    fused = 0
    for layer in model.modules() if isinstance(model, PeftModel) else ():
        if type(layer) is Linear and _is_ordinary(layer):
            layer.__class__ = FusedLinear
            fused += 1
    return fused


def _is_ordinary(layer: Linear) -> bool:
    return (
        type(layer.base_layer) is nn.Linear
        and not layer.lora_variant
        and not any(layer.lora_bias.values())
        and not layer.fan_in_fan_out
    )


def fuse_trained_linears(model: nn.Module) -> int:
    """Let linear layers whose weights are trained compute by `model/fused/product.py`; returns how many do.

    Worth it only where that has a faster library than torch's own layer would use.
    """
    fused = 0
    for layer in model.modules() if on_amd() else ():
        if type(layer) is nn.Linear and layer.weight.requires_grad and "forward" not in vars(layer):
            layer.forward = MethodType(_trained_forward, layer)  # type: ignore[method-assign]
            fused += 1
    return fused


def _trained_forward(self: nn.Linear, x: Tensor) -> Tensor:
    dtype = compute_dtype(x, Weights(self.weight))
    if dtype is None or x.device.type != "cpu" or x.dim() < 2 or not torch.is_grad_enabled():
        return nn.Linear.forward(self, x)
    flat = x.flatten(0, -2)
    made: Tensor = _LoraProduct.apply(flat, None, self.weight, self.bias, None, None, 1.0, dtype)  # type: ignore[no-untyped-call]
    return made.view(*x.shape[:-1], -1)


class FusedLinear(Linear):
    """PEFT's LoRA layer with another forward."""

    def weights(self) -> Weights | None:
        """What the layer computes with; None for what is not one active, unmerged adapter."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        layers: Any = (self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]])
        weight, down, up = (layer.weight for layer in layers)
        return Weights(weight, layers[0].bias, down, up, self.scaling[active[0]])

    @property
    def drops(self) -> bool:
        """Whether the adapter's input is thinned out by dropout."""
        return self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., i] -> [..., o]. Whatever is not one active, unmerged adapter in one number format is left to PEFT."""
        layer = None if args or kwargs else self.weights()
        dtype = None if layer is None else compute_dtype(x, layer)
        if layer is None or dtype is None:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        dropped = self.lora_dropout[self.active_adapters[0]](x) if self.drops else None
        fused: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2),
            None if dropped is None else dropped.flatten(0, -2),
            layer.weight,
            layer.bias,
            layer.down,
            layer.up,
            layer.scaling,
            dtype,
        )
        # Given its shape out here: some models change a layer's output in place, which a view made within forbids.
        return fused.view(*x.shape[:-1], -1)


def weights_of(layer: nn.Module) -> Weights | None:
    """What a linear layer computes with; None where it does more (dropout, several adapters, quantisation)."""
    if type(layer) is nn.Linear:
        return Weights(layer.weight, layer.bias)
    return layer.weights() if isinstance(layer, FusedLinear) and not layer.drops else None


def compute_dtype(x: Tensor, *layers: Weights) -> torch.dtype | None:
    """The number format in which products of x are computed; None where the formats are mixed without autocast."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.down) if tensor is not None]
    return x.dtype if all(tensor.dtype == x.dtype for tensor in tensors) else None


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + b + s (dropped A^T) B^T, where dropped is x itself without dropout; without A and B x W^T + b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, dropped, weight, bias, down, up)
        ctx.scaling, ctx.dtype = scaling, dtype
        flat = x.to(dtype).flatten(0, -2)
        layer = Weights(weight, bias, down, up, scaling).to(dtype)
        if dropped is None or down is None or up is None:
            y = product(flat, layer)
        else:
            y = product(flat, Weights(layer.weight, layer.bias))
            y.addmm_(dropped.to(dtype).flatten(0, -2) @ down.to(dtype).T, up.to(dtype).T, alpha=scaling)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dropped, weight, bias, down, up = ctx.saved_tensors
        for_x, for_dropped, for_weight, for_bias, for_down, for_up = ctx.needs_input_grad[:6]
        layer = Weights(weight, bias, down, up, ctx.scaling).to(ctx.dtype)
        g = grad.to(ctx.dtype).flatten(0, -2)
        flat = x.to(ctx.dtype).flatten(0, -2)
        into_lora = flat if dropped is None else dropped.to(ctx.dtype).flatten(0, -2)
        small = SmallGradients(layer, for_bias, for_down or for_up)
        for part in pieces(g):
            small.add(g[part], into_lora[part])
        dx = d_dropped = d_weight = None
        if for_x:
            dx = pull(g, layer if dropped is None else Weights(layer.weight)).view(x.shape).to(x.dtype)
        if for_dropped:
            d_dropped = (ctx.scaling * (g @ up.to(ctx.dtype)) @ down.to(ctx.dtype)).view(x.shape).to(x.dtype)
        if for_weight:
            d_weight = (g.T @ flat).to(weight.dtype)
        return dx, d_dropped, d_weight, small.bias, small.down, small.up, None, None
