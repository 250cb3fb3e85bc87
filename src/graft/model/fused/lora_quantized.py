"""A quantised linear layer with LoRA as one operation: PEFT's layer and its numbers, with less kept in memory.

The forward pass is the quantised layer's own, bitsandbytes' or torchao's; what is kept for the backward pass is the
input, once, and the low-rank product, instead of the copies that the libraries and PEFT keep. For the gradient the
weights are taken out of their format, as the libraries do it.

Shapes: T tokens, i and o features in and out, r rank.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.model.files.quantize import is_bitsandbytes_4bit, is_bitsandbytes_8bit


def fuse_quantized_lora(model: nn.Module) -> int:
    """Let every plain LoRA layer over a quantised layer compute itself as one operation; returns how many do.

    DoRA and its like, a bias of the adapter's own, and layers whose own bias is trained keep PEFT's forward.
    """
    if not isinstance(model, PeftModel):
        return 0
    fused: dict[type, Any] = {kind: type(f"Fused{kind.__name__}", (_Fused, kind), {}) for kind in _pefts_kinds()}
    count = 0
    layer: Any
    for layer in list(model.modules()):
        wanted = fused.get(type(layer))
        if wanted is None or layer.lora_variant or any(layer.lora_bias.values()):
            continue
        bias = layer.get_base_layer().bias
        if bias is None or not bias.requires_grad:
            layer.__class__ = wanted
            count += 1
    return count


def _pefts_kinds() -> list[Any]:
    """PEFT's LoRA layers over quantised ones, of the libraries that are here."""
    names = {"bitsandbytes": ("bnb", ("Linear4bit", "Linear8bitLt")), "torchao": ("torchao", ("TorchaoLoraLinear",))}
    found = []
    for library, (module, classes) in names.items():
        if importlib.util.find_spec(library) is not None:
            made = importlib.import_module(f"peft.tuners.lora.{module}")
            found += [getattr(made, name) for name in classes]
    return found


class _Fused(nn.Module):
    """Goes before one of PEFT's quantised LoRA layers in a class's bases, and replaces its forward."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., i] -> [..., o]. Whatever is not one active, unmerged adapter is left to PEFT."""
        active = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name, kind = active[0], x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        dropped = self.lora_dropout[name](x) if self.training else x
        fused: Tensor = _QuantizedLoraProduct.apply(  # type: ignore[no-untyped-call]
            x,
            None if dropped is x else dropped,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            dtype,
            self.get_base_layer(),
        )
        return fused


def _unpacked(layer: Any) -> Tensor:
    """[o, i] a quantised layer's weights out of their format."""
    unpacked: Tensor
    if is_bitsandbytes_4bit(layer):
        unpacked = _functional().dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    elif is_bitsandbytes_8bit(layer):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB  # the first forward moves them
        unpacked = _functional().int8_vectorwise_dequant(layer.weight.data, scales.to(layer.weight.device))
    else:
        unpacked = layer.weight.dequantize()
    return unpacked


def _functional() -> Any:
    return importlib.import_module("bitsandbytes.functional")


class _QuantizedLoraProduct(torch.autograd.Function):
    """y = Q(x) + scaling (dropped A^T) B^T, Q the quantised layer and W its weights [o, i] out of their format.

    With G the gradient of y [T, o] and U = G B [T, r]: dx = G W + scaling U A,  dA = scaling U^T x,
    dB = scaling G^T (x A^T).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dtype: torch.dtype,
        layer: nn.Module,
    ) -> Tensor:
        y: Tensor = layer(x.to(dtype)).to(dtype)
        low = (x if dropped is None else dropped).to(dtype).flatten(0, -2) @ down.to(dtype).T
        y.view(-1, y.shape[-1]).addmm_(low, up.to(dtype).T, alpha=scaling)
        seen = x if dropped is None else dropped
        ctx.save_for_backward(seen if ctx.needs_input_grad[2] else None, down, up, low)
        ctx.shape, ctx.x_dtype, ctx.has_dropped = x.shape, x.dtype, dropped is not None
        ctx.scaling, ctx.dtype, ctx.layer = scaling, dtype, layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        seen, down, up, low = ctx.saved_tensors
        scaling, dtype = ctx.scaling, ctx.dtype
        for_x, for_dropped, for_down, for_up = ctx.needs_input_grad[:4]
        g = grad.to(dtype).flatten(0, -2)
        raised = g @ up.to(dtype)
        dx = d_dropped = d_down = d_up = None
        if for_x:
            layer: Any = ctx.layer
            weight = _unpacked(layer)
            dx = g @ weight.to(dtype)
            if not ctx.has_dropped:
                dx.addmm_(raised, down.to(dtype), alpha=scaling)
            dx = dx.view(ctx.shape).to(ctx.x_dtype)
        if for_dropped and ctx.has_dropped:
            d_dropped = (scaling * raised @ down.to(dtype)).view(ctx.shape).to(ctx.x_dtype)
        if for_down:
            d_down = (scaling * raised.T @ seen.to(dtype).flatten(0, -2)).to(down.dtype)
        if for_up:
            d_up = (low.T @ g).T.mul(scaling).to(up.dtype)
        return dx, d_dropped, d_down, d_up, None, None, None
