"""RMS norms for the CPU, computed piece by piece inside the cache. Knows modules, not trees.

transformers writes the norm as four operations, and autograd adds eight for its gradient; each streams a tensor that is
far larger than the cache through memory. Here a piece of it goes through all of them at once.

Shapes: T tokens, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.model.fused.linear import piece_rows

PIECE_ELEMENTS = 2**16
"""Elements of one tensor's piece: 256 KiB in fp32, so that the four tensors of the gradient fit a core's cache."""


def fuse_norms(model: nn.Module) -> int:
    """Replace the forward of RMS norms by one operation; returns how many were replaced.

    A norm is replaced only after ours gave its numbers on a probe: class names promise nothing (Gemma's adds 1 to the
    scale). Does nothing for norms that are not on the CPU: there are better kernels elsewhere.
    """
    fused = 0
    for module in model.modules():
        ours = _rms_forward(module)
        if ours is not None and _same_numbers(module, ours):
            module.forward = MethodType(ours, module)
            fused += 1
    return fused


Forward = Callable[[Any, Tensor], Tensor]


def _rms_forward(module: nn.Module) -> Forward | None:
    """The forward of a norm by the root mean square with a scale per feature; None for what cannot be one."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    eps = next((e for e in (getattr(module, name, None) for name in ("variance_epsilon", "eps")) if e), None)
    if not isinstance(eps, float) or module.weight.device.type != "cpu" or not module.weight.is_floating_point():
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps)

    return forward


def _same_numbers(module: nn.Module, ours: Forward) -> bool:
    """Whether both forwards give the same for a scale that is not all ones."""
    scale = module.get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, scale.shape[-1], generator=generator).to(scale.dtype)
    rounding = torch.finfo(scale.dtype).eps  # theirs rounds twice in 16 bits, ours once
    with torch.no_grad():
        kept = scale.clone()
        scale.copy_(torch.rand(scale.shape, generator=generator) + 0.5)
        try:
            return torch.allclose(module(x), ours(module, x), rtol=max(1e-5, 2 * rounding), atol=1e-6)
        except (RuntimeError, TypeError):  # it is called otherwise
            return False
        finally:
            scale.copy_(kept)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., d] x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if x.dtype != torch.float32:  # a norm computes in fp32, also where autocast has made its input smaller
        return rms_norm(x.float(), weight, eps).to(x.dtype)
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    """With r = (mean(x^2) + eps)^-1/2 and v = g w: dx = r v - x r^3 mean(v x),  dw = sum over tokens of g x r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.new_empty(*x.shape[:-1], 1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for a, r, y in _pieces(x, scale, out):
            r.copy_(torch.mul(a, a, out=y).mean(-1, keepdim=True).add_(eps).rsqrt_())
            torch.mul(a, r, out=y).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for a, r, g, d in _pieces(x, scale, grad, dx):
            if d_weight is not None:
                d_weight += (g * a).mul_(r).sum(0)
            torch.mul(g, weight, out=d)
            pull = (d * a).mean(-1, keepdim=True).mul_(r**3).neg_()
            d.mul_(r).addcmul_(a, pull)
        return dx, d_weight, None


def _pieces(x: Tensor, scale: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of x [..., d], its scale [..., 1] and others [..., d]; those of a contiguous tensor can be written to."""
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, scale, *others)]
    size = piece_rows(len(flat[0]), max(1, PIECE_ELEMENTS // x.shape[-1]))
    for start in range(0, len(flat[0]), size):
        yield tuple(tensor[start : start + size] for tensor in flat)
