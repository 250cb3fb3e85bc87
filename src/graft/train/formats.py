"""Formats that the settings ask for, against what the device, the libraries and the stored base can do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from graft.config.train import Train
from graft.console import note
from graft.errors import ConfigError
from graft.model.device import Precision, pick_device, pick_precision
from graft.model.peft_kinds import mutates_base, peft_config
from graft.model.quantize import check_quantize, refuse_stored


def refuse_base(settings: Train) -> None:
    """What can be known of quantised weights before anything is read.

    Raises:
        InputError: the base is stored in a format that cannot be trained through.
        ConfigError: `quantize` does not work on this device or with this adapter, or its library is missing.
    """
    if settings.gradient_checkpointing:
        note("gradient_checkpointing: true is now called checkpointing: full")
    if Path(settings.model).exists():
        method = "full" if settings.trains_own_weights else "lora"
        refuse_stored(settings.model, method, settings.quantize, settings.trust_remote_code)
    if settings.quantize == "none":
        return
    if mutates_base(peft_config(settings)):
        raise ConfigError(
            f"quantize: {settings.quantize} with lora.init_lora_weights: {settings.lora.init_lora_weights}, which "
            "subtracts a part of the weights from them, as quantised ones cannot be; leave one of them out"
        )
    device = pick_device(settings.device)
    check_quantize(settings.quantize, device, pick_precision(settings.precision, device).compute)


def refuse_offload(settings: Train, device: torch.device) -> None:
    """Activations are moved from a GPU to the host, not from the host to itself.

    Raises:
        ConfigError: the device is no GPU.
    """
    if settings.offload_activations and device.type != "cuda":
        raise ConfigError(
            f"offload_activations: true moves activations from a GPU to the host's memory; the device is {device}, "
            "whose activations are there already. Leave it out, or set device=cuda"
        )


def refuse_with_compiled(settings: Train) -> None:
    """The compiler chooses what a compiled layer keeps.

    Raises:
        ConfigError: the settings choose it too.
    """
    if settings.checkpointing in ("selective", "auto") or settings.offload_activations:
        raise ConfigError(
            "compile: true lets the compiler choose what a layer keeps: it goes with checkpointing none or full and "
            "without offload_activations. Leave one of them out"
        )


def trained_in(settings: Train, precision: Precision) -> Precision:
    """The precision with the format of the trained weights that `master_weights` asks for.

    Raises:
        ConfigError: bf16 weights would be computed with in another format.
    """
    if settings.master_weights == "fp32":
        return precision
    if precision.compute != torch.bfloat16:
        raise ConfigError(
            f"master_weights: {settings.master_weights} keeps weights in bf16, but the products are in "
            f"{precision.compute}; set precision=bf16, or master_weights=fp32"
        )
    return replace(precision, trained=torch.bfloat16)
