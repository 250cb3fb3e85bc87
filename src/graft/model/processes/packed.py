"""Quantised weights as plain tensors of bytes, so that FSDP2 spreads them over processes like any other weight.

The libraries keep a packed weight in a class of their own, which FSDP2 cannot cut. Here its large tensors become
parameters of the layer, frozen, as bytes; when the layer computes for the first time with them gathered, the library's
own weight is put around them, without a copy. It serves from then on: FSDP2 gathers into the same memory each time, for
the backward pass too. So the layer's forward, PEFT's around it and their numbers stay the library's.

| format | spread | whole in every process |
|---|---|---|
| bitsandbytes, 4 bits | packed weights, a scale in 8 bits per 64 of them | a scale in fp32 per 16,384 |
| bitsandbytes, int8 | weights | a scale in fp32 per output |
| torchao | all tensors of a weight's that have a dimension | numbers |
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PREFIX = "packed_"
"""Of the names of the parameters that a packed weight becomes."""


@dataclass(frozen=True, slots=True)
class _Packed:
    """A packed weight in pieces."""

    tensors: Mapping[str, Tensor]
    """Those that are worth being spread, by name."""
    around: Callable[[Mapping[str, Tensor]], Tensor]
    """The library's weight around such tensors, which it shares memory with."""


def make_divisible(model: nn.Module) -> set[nn.Parameter]:
    """Make every packed weight that is known here divisible; returns the parameters that they became.

    Must come after whatever looks at the layers' weights, and before `fully_shard`.
    """
    made: set[nn.Parameter] = set()
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        packed = None if weight is None else _taken_apart(layer, weight)
        if packed is None:
            continue
        del layer._parameters["weight"]
        layer.__dict__["weight"] = None  # until the layer computes
        for name, tensor in packed.tensors.items():
            parameter = nn.Parameter(_bytes(tensor), requires_grad=False)
            layer.register_parameter(PREFIX + name, parameter)
            made.add(parameter)
        layer.register_forward_pre_hook(_PutTogether(packed))
    return made


def _bytes(tensor: Tensor) -> Tensor:
    """[n, ...] as bytes [n, b]: the first dimension is the one that is cut."""
    return tensor.detach().contiguous().view(len(tensor), -1).view(torch.uint8)


class _PutTogether:
    """Before a layer's forward: the library's weight, around the bytes that have been gathered."""

    def __init__(self, packed: _Packed) -> None:
        self._around = packed.around
        self._kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in packed.tensors.items()}
        self._bytes: list[nn.Parameter] = []
        self._weight: Tensor | None = None

    def __call__(self, layer: nn.Module, _args: Any) -> None:
        gathered = [layer.get_parameter(PREFIX + name) for name in self._kinds]
        if len(gathered) != len(self._bytes) or not all(map(operator.is_, gathered, self._bytes)):
            self._bytes = gathered
            self._weight = self._around(
                {
                    name: parameter.detach().view(dtype).view(shape)
                    for parameter, (name, (dtype, shape)) in zip(gathered, self._kinds.items(), strict=True)
                }
            )
        layer._parameters.pop("weight", None)  # PEFT's DoRA puts it there again
        layer.__dict__["weight"] = self._weight


def _taken_apart(layer: nn.Module, weight: Any) -> _Packed | None:
    """A layer's packed weight in pieces; None for what is no packed weight, or of no known library."""
    bnb: Any = sys.modules.get("bitsandbytes.nn")  # a layer of a library that is not imported cannot be here
    if bnb is not None and isinstance(layer, bnb.Linear4bit) and isinstance(weight, bnb.Params4bit):
        return _four_bits(layer, weight, bnb.Params4bit)
    if bnb is not None and isinstance(layer, bnb.Linear8bitLt) and isinstance(weight, bnb.Int8Params):
        return _eight_bits(layer, weight, bnb.Int8Params)
    if isinstance(weight, DTensor) or not isinstance(layer, nn.Linear) or not is_traceable_wrapper_subclass(weight):
        return None
    return _subclass(weight)


def _four_bits(layer: Any, weight: Any, kind: Any) -> _Packed | None:
    state = weight.quant_state
    if state is None or state.absmax.dim() == 0:
        return None
    settings = {
        name: getattr(weight, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }

    def around(tensors: Mapping[str, Tensor]) -> Tensor:
        state.absmax = tensors["scales"]
        made: Tensor = kind(
            tensors["weight"], requires_grad=False, quant_state=state, module=layer, bnb_quantized=True, **settings
        )
        return made

    scales, state.absmax = state.absmax, None
    return _Packed({"weight": weight.data, "scales": scales}, around)


def _eight_bits(layer: Any, weight: Any, kind: Any) -> _Packed | None:
    if weight.has_fp16_weights or weight.dtype != torch.int8:
        return None
    scales = layer.state.SCB if weight.SCB is None else weight.SCB  # the first forward moves it
    layer.state.CB = layer.state.SCB = None

    def around(tensors: Mapping[str, Tensor]) -> Tensor:
        whole = tensors["weight"]
        made: Tensor = kind(whole, requires_grad=False, has_fp16_weights=False, CB=whole, SCB=scales)
        return made

    return _Packed({"weight": weight.data}, around)


def _subclass(weight: Any) -> _Packed | None:
    """A tensor that says itself of which tensors it is made (PyTorch's protocol), as torchao's are."""
    names, context = weight.__tensor_flatten__()
    inner = {name: getattr(weight, name) for name in names}
    large = {name: tensor for name, tensor in inner.items() if type(tensor) is Tensor and tensor.dim()}
    if not large or not all(type(tensor) is Tensor for tensor in inner.values()):
        return None
    small = {name: tensor for name, tensor in inner.items() if name not in large}
    kind, shape, stride = type(weight), weight.shape, weight.stride()

    def around(tensors: Mapping[str, Tensor]) -> Tensor:
        made: Tensor = kind.__tensor_unflatten__({**small, **tensors}, context, shape, stride)
        return made.requires_grad_(False)

    return _Packed(large, around)
