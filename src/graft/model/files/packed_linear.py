"""Frozen linear layers over torchao's weights: what is kept for the gradient is the packed weight.

torchao's product takes the weight out of its format and lets autograd keep it so: between the forward and the backward
pass every layer would stand in memory unpacked. Here it is taken out once more for the gradient, as bitsandbytes does
it. Knows tensors that say themselves of what they are made (PyTorch's protocol); nothing of adapters and models.

Shapes: T tokens, i and o features in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def keep_packed(model: nn.Module) -> None:
    """Let every linear layer whose weight is such a tensor keep only that for its gradient."""
    for layer in model.modules():
        if type(layer) is nn.Linear and _can_be_unpacked(layer.weight):
            layer.__class__ = PackedLinear


def _can_be_unpacked(weight: Any) -> bool:
    return is_traceable_wrapper_subclass(weight) and getattr(type(weight), "dequantize", None) is not Tensor.dequantize


class PackedLinear(nn.Linear):
    """A linear layer with a packed, frozen weight."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., i] -> [..., o]."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        made: Tensor = _PackedProduct.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
        return made


class _PackedProduct(torch.autograd.Function):
    """y = x W^T + b with W [o, i] packed; for G, the gradient of y: dx = G W, db the sum of G over tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype  # its weight may have been gathered anew when the gradient comes
        return F.linear(x, layer.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        for_x, for_bias, _ = ctx.needs_input_grad
        dx = (grad @ ctx.layer.weight.dequantize().to(grad.dtype)).to(ctx.dtype) if for_x else None
        return dx, grad.flatten(0, -2).sum(0) if for_bias else None, None
