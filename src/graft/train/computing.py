"""By what a run is computed: attention kernel, compiler, other kernels. Picked before weights are loaded, said once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from graft.config.train import Train
from graft.console import note, warn
from graft.model.attention.pick import Attention, pick_attention, row_step
from graft.model.fused.compile import compile_layers, wants_compile
from graft.model.fused.liger import use_liger, wants_liger
from graft.model.processes.context import Context
from graft.model.processes.shard import Enter
from graft.model.trees import TreeLM, at_once
from graft.train.processes.share import prices_of


@dataclass(frozen=True, slots=True)
class Computing:
    """By what a run's numbers are computed; they are the same whatever it is."""

    attention: Attention
    compiled: bool
    liger: bool


def pick_computing(settings: Train, device: torch.device) -> Computing:
    """What this device and installation offer of what the settings ask for.

    Raises:
        ConfigError: something is asked for that they do not have.
    """
    compiled = wants_compile(settings.compile, device)
    liger = wants_liger(settings.kernels, device, compiled)
    return Computing(pick_attention(settings.attention, device), compiled, liger)


def tree_model(
    model: PreTrainedModel | PeftModel,
    settings: Train,
    computing: Computing,
    fuse: bool = True,
    enter: Enter[Any] = at_once,
    context: Context | None = None,
) -> TreeLM:
    """The model, on its device already, ready to be trained on trees; says in one line what computes it."""
    parts = settings.context_ranks  # each of which is padded to a multiple of the kernel's block
    step = row_step(-(-settings.row_budget // parts)) * parts if computing.attention.padded or computing.compiled else 1
    lm = TreeLM(model, computing.attention.backend, settings.trees, step, fuse=fuse, enter=enter, context=context)
    if context is not None:
        context.prices = prices_of(lm)
    kernels = use_liger(model) if computing.liger else {}
    layers = compile_layers(lm.base) if computing.compiled and lm.on_trees else 0
    said = [f"attention: {computing.attention.why}"] if lm.on_trees else []
    said += [f"{count} {name} by liger-kernel" for name, count in kernels.items() if count]
    if layers:
        said.append(f"{layers} layers compiled, rows padded to multiples of {lm.row_step} tokens")
    if said:
        note("; ".join(said))
    if lm.on_trees and lm.backend_failed is not None:
        warn(f"attention by segments, since {computing.attention.backend} failed on a probe: {lm.backend_failed}")
    if computing.compiled and not layers:
        reason = "its layers are not of the form that can be" if lm.on_trees else "it runs one example per row"
        warn(f"compile=true: nothing was compiled, since {reason}")
    return lm
