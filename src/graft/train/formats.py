"""Formats that the settings ask for, against what the device, the libraries and the stored base can do."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from graft.config.train import Train
from graft.console import note
from graft.errors import ConfigError, InputError
from graft.model.device import Precision, pick_device, pick_precision
from graft.model.files.load import layer_count, refuse_no_model
from graft.model.files.quantize import check_quantize, refuse_stored
from graft.model.tuned.kinds import mutates_base, peft_config
from graft.train.computing import pick_computing


def refuse_base(settings: Train) -> None:
    """What can be known of the base and the device before anything is read, and before there is a run folder.

    Raises:
        InputError: there is no such base, or no such weights to begin with; the base is stored in a format that cannot
            be trained through.
        ConfigError: the device or the libraries lack what is asked for, `quantize` does not work here or with this
            adapter, or the model has fewer layers than are to be trained.
    """
    if settings.gradient_checkpointing:
        note("gradient_checkpointing: true is now called checkpointing: full")
    refuse_no_model(settings.model)
    _refuse_missing_start(settings.init_from)
    if Path(settings.model).exists():
        method = "full" if settings.trains_own_weights else "lora"
        refuse_stored(settings.model, method, settings.quantize, settings.trust_remote_code)
    device = pick_device(settings.device)
    _refuse_on_device(settings, device)
    _refuse_missing_layers(settings)
    refuse_quantize(settings, device)


def refuse_quantize(settings: Train, device: torch.device) -> None:
    """What this adapter, the device or the library lacks for `quantize`.

    Raises:
        ConfigError: names it, and what to do.
    """
    if settings.quantize == "none":
        return
    config = peft_config(settings)
    if mutates_base(config):
        raise ConfigError(
            f"quantize: {settings.quantize} with lora.init_lora_weights: {settings.lora.init_lora_weights}, which "
            "subtracts a part of the weights from them, as quantised ones cannot be; leave one of them out"
        )
    if settings.quantize == "int8" and getattr(config, "use_dora", False):
        raise ConfigError("quantize: int8 with use_dora: PEFT loses the weights' scales; use quantize=nf4 or fp8")
    check_quantize(settings.quantize, device, pick_precision(settings.precision, device).compute)


def _refuse_missing_start(named: str | None) -> None:
    if named is None or Path(named).is_dir() or not (os.sep in named or Path(named).exists()):
        return
    there = sorted(path.name for path in Path(named).parent.glob("step-*"))
    instead = f"; there are {', '.join(there)}" if there else ""
    raise InputError(f"init_from {named}: no such folder{instead}; name a run, an adapter or a model folder")


def _refuse_on_device(settings: Train, device: torch.device) -> None:
    """What the loading of the model would refuse too."""
    if pick_computing(settings, device).compiled:
        refuse_with_compiled(settings)
    refuse_offload(settings, device)
    trained_in(settings, pick_precision(settings.precision, device))


def _refuse_missing_layers(settings: Train) -> None:
    if settings.method != "freeze":
        return
    layers = layer_count(settings.model, settings.trust_remote_code)
    if layers is not None and settings.freeze.layers > layers:
        raise ConfigError(
            f"freeze.layers = {settings.freeze.layers}, but the model has {layers} decoder layers; lower it, or use "
            "method=full"
        )


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
