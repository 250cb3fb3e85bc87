"""Frozen weights in 4 or 8 bits: by which library, whether it works here, and what a folder is stored in.

Knows configurations and linear layers; model/files/load.py loads. The libraries are an extra, imported when asked for.

| kind | library | bytes per weight | products computed in |
|---|---|---|---|
| nf4 | bitsandbytes, NF4 with double quantisation (Dettmers et al. 2023, arXiv:2305.14314) | 0.516 | `precision` |
| int8 | bitsandbytes, LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) | 1.0 | int8, outliers in `precision` |
| fp8 | torchao, e4m3, a scale per output | 1.0 | `precision` |
"""

from __future__ import annotations

import importlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.auto import AutoHfQuantizer

from graft.errors import ConfigError, InputError, first_line
from graft.model.files.packed_linear import keep_packed


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to store frozen weights."""

    library: str
    devices: tuple[str, ...]
    worst: float
    """Relative error of a product with random weights above which the library's kernel is broken."""


KINDS = {
    "nf4": Kind("bitsandbytes", ("cpu", "cuda", "xpu"), 0.15),
    "int8": Kind("bitsandbytes", ("cpu", "cuda", "xpu"), 0.03),
    "fp8": Kind("torchao", ("cpu", "cuda"), 0.06),
}


def check_quantize(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try a small product and its gradient in the wanted format, before any weight is read.

    Raises:
        ConfigError: the library is missing, or gives no or wrong numbers on this device.
    """
    wanted = KINDS[kind]
    others = [name for name, other in KINDS.items() if name != kind and device.type in other.devices]
    instead = f"use quantize={' or '.join(others)}" if others else "use quantize=none"
    if device.type not in wanted.devices:
        raise ConfigError(
            f"quantize: {kind} runs on {' and '.join(wanted.devices)}, not on {device.type}; {instead} there"
        )
    try:
        importlib.import_module(wanted.library)
    except ImportError as error:
        raise ConfigError(
            f"quantize: {kind} needs {wanted.library} ({first_line(error)}); install it: pip install 'graft-llm[quant]'"
        ) from None
    try:
        worst = error_of_a_product(kind, device, dtype)
    except (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"quantize: {kind} does not work on {device} ({wanted.library}: {first_line(error)}); {instead}"
        ) from None
    if not worst < wanted.worst:
        raise ConfigError(
            f"quantize: {kind} computes wrong numbers on {device}: a small product is off by {worst:.1%}, at most "
            f"{wanted.worst:.0%} is expected; {instead}"
        )


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """What transformers' `from_pretrained` is told; `dtype` is the format of the products."""
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return TorchAoConfig(_fp8())


def _fp8() -> Any:
    return importlib.import_module("torchao.quantization").Float8WeightOnlyConfig()


def make_trainable(model: nn.Module) -> None:
    """See to it that gradients flow through a quantised model, and that nothing unpacked is kept for them."""
    keep_packed(model)
    module: Any
    for module in model.modules():
        if is_bitsandbytes_4bit(module):
            # On CPUs with AVX-512 bf16 a forward pass in eval mode would store the weights in another order, for which
            # there is no gradient: after the first validation nothing would be learnt through the layer, silently.
            module.support_avx512bf16_for_cpu = False


def with_quantized_layers(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Give a model without numbers the layers that loading it in this format would; bitsandbytes' are packed later."""
    quiet(kind)
    quantizer: Any = AutoHfQuantizer.from_config(quantization_config(kind, dtype), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    if KINDS[kind].library == "torchao":
        quantize = importlib.import_module("torchao.quantization").quantize_
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear) and quantizer.param_needs_quantization(model, f"{name}.weight"):
                quantize(layer, _fp8())
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    make_trainable(model)


def pack_without_numbers(layer: Any, device: torch.device) -> list[Tensor]:
    """Put a packed weight in the place of a bitsandbytes layer's, under the fake tensors of the caller's mode.

    Returns every tensor of it; nothing for another layer.
    """
    if is_bitsandbytes_4bit(layer):
        return _four_bits_without_numbers(layer, device)
    return _eight_bits_without_numbers(layer, device) if is_bitsandbytes_8bit(layer) else []


def _four_bits_without_numbers(layer: Any, device: torch.device) -> list[Tensor]:
    """Two weights take a byte, 64 share a scale of a byte, and 256 scales one in fp32."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    outputs, inputs = layer.out_features, layer.in_features
    blocks = -(-outputs * inputs // 64)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed: Any = nn.Parameter(empty(-(-outputs * inputs // 2), 1, dtype=torch.uint8), requires_grad=False)
    scales = functional.QuantState(empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
    state = functional.QuantState(
        empty(blocks, dtype=torch.uint8), torch.Size((outputs, inputs)), empty(16), 64, "nf4", layer.compute_dtype,
        empty(), scales,
    )  # fmt: skip
    packed.quant_state = layer.quant_state = state
    layer._parameters["weight"] = packed
    return [packed, state.absmax, state.code, state.offset, scales.absmax, scales.code]


def _eight_bits_without_numbers(layer: Any, device: torch.device) -> list[Tensor]:
    """A weight takes a byte, and an output has a scale in fp32."""
    shape = layer.out_features, layer.in_features
    packed: Any = nn.Parameter(torch.empty(shape, dtype=torch.int8, device=device), requires_grad=False)
    packed.CB = packed.SCB = None
    layer.state.CB, layer.state.SCB = packed.data, torch.empty(shape[0], device=device)
    layer.state.threshold = 0.0  # which inputs are outliers depends on numbers
    layer._parameters["weight"] = packed
    return [packed, layer.state.SCB]


def is_bitsandbytes_4bit(module: nn.Module) -> bool:
    """Whether this is bitsandbytes' 4-bit layer, without importing the library."""
    return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")


def is_bitsandbytes_8bit(module: nn.Module) -> bool:
    """The same for its 8-bit layer."""
    return type(module).__name__ == "Linear8bitLt" and type(module).__module__.startswith("bitsandbytes.")


def quiet(kind: str) -> None:
    """bitsandbytes says at each start that a kernel can be downloaded, and at each product that it casts its input."""
    if KINDS[kind].library == "bitsandbytes":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def error_of_a_product(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """The larger relative L2 error of x W^T and its gradient in x, against the same weights in fp32."""
    quiet(kind)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    x = torch.randn(8, 256, generator=generator).to(device, dtype).requires_grad_()
    layer = _small_layer(kind, weight, device, dtype)
    make_trainable(layer)
    y = layer(x)
    g = torch.randn(8, 256, generator=generator).to(device, dtype)
    (found,) = torch.autograd.grad(y, x, g)
    return max(
        _relative(y, x.detach().float().cpu() @ weight.T),
        _relative(found, g.float().cpu() @ weight),
    )


def _small_layer(kind: str, weight: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Module:
    o, i = weight.shape
    if KINDS[kind].library == "torchao":
        plain = nn.Linear(i, o, bias=False, device=device, dtype=dtype).requires_grad_(False)
        plain.weight.copy_(weight)
        layer = nn.Sequential(plain)
        importlib.import_module("torchao.quantization").quantize_(layer, _fp8())
        return layer
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    made: nn.Module
    if kind == "nf4":
        made = bnb.Linear4bit(i, o, bias=False, compute_dtype=dtype, quant_type="nf4")
        made.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        made = bnb.Linear8bitLt(i, o, bias=False, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made.to(device)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().float().cpu() - wanted).norm() / wanted.norm())


def stored_quantization(path: str, trust_remote_code: bool = False) -> dict[str, Any] | None:
    """The `quantization_config` that a model's config.json brings, or None."""
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
        except (ValueError, AttributeError):  # said by whoever needs more of it
            return None
    elif Path(path).exists():  # no model folder, as whoever loads it will say
        return None
    else:
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).to_dict()
        except (OSError, ValueError, KeyError, ImportError):  # the same
            return None
        found = config.get("quantization_config")
    return found if isinstance(found, dict) else None


def refuse_stored(path: str, method: str, quantize: str, trust_remote_code: bool = False) -> None:
    """A base that is stored quantised is trained with LoRA where its library can, else refused before it is read.

    Raises:
        InputError: names the format, what is missing, and what to do.
    """
    stored = stored_quantization(path, trust_remote_code)
    if stored is None:
        return
    name = str(stored.get("quant_method") or "an unnamed format")
    plain = "take the model's folder in bf16 and, to save memory, quantize=nf4"
    if method == "full":
        raise InputError(f"model {path}: stored as {name}; method=full needs unquantised weights: {plain}")
    if quantize != "none":
        raise InputError(f"model {path}: stored as {name} already; leave out quantize={quantize}, or {plain}")
    try:
        quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
        quantizer.validate_environment(device_map=None)
        trainable = bool(quantizer.is_trainable)
    except (ImportError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise InputError(f"model {path}: stored as {name}, which cannot be used here: {first_line(error)}") from None
    if not trainable:
        raise InputError(f"model {path}: stored as {name}, through which no gradient flows; {plain}")
