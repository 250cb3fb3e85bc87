"""A linear layer with LoRA as one operation: PEFT's layer and its numbers, without its passes over memory.

PEFT computes `linear(x) + lora_B(lora_A(dropout(x))) * scaling` as five operations, three of which only stream a
tensor as large as the layer's output through memory, and as many again in the backward pass; on a CPU that is a fifth
of the product's own time. Here the low-rank part is added by the matrix product that computes it.

Shapes: T tokens, i and o features in and out, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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


class FusedLinear(Linear):
    """PEFT's LoRA layer with another forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., i] -> [..., o]. Whatever is not one active, unmerged adapter in one number format is left to PEFT."""
        active = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = active[0]
        layers: Any = (self.base_layer, self.lora_A[name], self.lora_B[name])
        weight, down, up = (layer.weight for layer in layers)
        bias = layers[0].bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif x.dtype == weight.dtype == down.dtype:
            dtype = x.dtype
        else:
            return super().forward(x)
        dropped = self.lora_dropout[name](x) if self.training else x
        if not torch.is_grad_enabled():
            return _product(x, dropped, weight, bias, down, up, self.scaling[name], dtype)[0]
        fused: Tensor = _LoraProduct.apply(  # type: ignore[no-untyped-call]
            x, None if dropped is x else dropped, weight, bias, down, up, self.scaling[name], dtype
        )
        return fused


def _product(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x W^T + b + scaling (dropped A^T) B^T as [..., o], and dropped A^T as [T, r]."""
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    low = dropped.to(dtype).flatten(0, -2) @ down.to(dtype).T
    y.view(-1, y.shape[-1]).addmm_(low, up.to(dtype).T, alpha=scaling)
    return y, low


class _LoraProduct(torch.autograd.Function):
    """With G the gradient of the output [T, o] and U = G B [T, r]:

    dx = G W + scaling U A,  dA = scaling U^T x,  dB = scaling G^T (x A^T),  dW = G^T x,  db = sum of G over tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        y, low = _product(x, x if dropped is None else dropped, weight, bias, down, up, scaling, dtype)
        ctx.save_for_backward(x, dropped, weight, down, up, low)
        ctx.scaling, ctx.dtype = scaling, dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, dropped, weight, down, up, low = ctx.saved_tensors
        scaling, dtype = ctx.scaling, ctx.dtype
        for_x, for_dropped, for_weight, for_bias, for_down, for_up = ctx.needs_input_grad[:6]
        g = grad.to(dtype).flatten(0, -2)
        raised = g @ up.to(dtype)
        dx = d_dropped = d_weight = d_bias = d_down = d_up = None
        if for_x:
            dx = g @ weight.to(dtype)
            if dropped is None:
                dx.addmm_(raised, down.to(dtype), alpha=scaling)
            dx = dx.view(x.shape).to(x.dtype)
        if for_dropped:
            d_dropped = (scaling * raised @ down.to(dtype)).view(x.shape).to(x.dtype)
        if for_weight:
            d_weight = (g.T @ x.to(dtype).flatten(0, -2)).to(weight.dtype)
        if for_bias:
            d_bias = g.sum(0)
        if for_down:
            seen = (x if dropped is None else dropped).to(dtype).flatten(0, -2)
            d_down = (scaling * raised.T @ seen).to(down.dtype)
        if for_up:
            d_up = (low.T @ g).T.mul(scaling).to(up.dtype)
        return dx, d_dropped, d_weight, d_bias, d_down, d_up, None, None
