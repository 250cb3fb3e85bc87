"""What memory holds at each moment of a run: while it loads, rehearses a save, computes steps, and saves.

The most of these is the run's peak. Knows sizes that were counted (`graft.train.costs.cost`); counts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graft.config.train import Train
from graft.model.memory.count import ATTENTION, HEAD, LAYERS
from graft.model.tuned.kinds import mutates_base, peft_config
from graft.train.costs.cost import RowCost, UpdateCost
from graft.train.costs.hollow import Hollow
from graft.train.load import stored_dtype
from graft.train.saving.rehearse import PIECE, Need

CPU_HOLES = 0.25
"""Of the counted activations, what glibc's heap needs beyond them: gradients and states lie between them, and the next
row, a little longer, does not fit into the holes of the last. Measured by bench/plan.py."""
CPU_GROWTH = 30 * 2**20
"""Bytes by which a process grows when it trains, beside tensors: threads, libraries that are loaded late. Measured."""
CUDA_HOLES = 0.08
"""The same for CUDA's caching allocator. Not yet measured."""

LOADING, REHEARSING, STEPS, SAVING = "loading", "rehearsing a save", "steps", "saving"


@dataclass(frozen=True, slots=True)
class Moments:
    """Bytes that a run holds, by what holds them in its steps, and at each moment."""

    parts: Mapping[str, int]
    """At the worst moment of the steps: in a row's backward pass, or in the update."""
    totals: Mapping[str, int]
    """At the worst moment of each part of the run. What does not take place is not there."""


def moments(
    settings: Train, model: Hollow, row: RowCost, update: UpdateCost, device: torch.device, base: int, free: int
) -> Moments:
    """What a run holds whose process has `base` bytes before it loads its model, where `free` bytes are left then."""
    parts = {"process": base} | _steps(settings, model, row, update, device)
    weights = base + model.frozen_bytes + model.trained_bytes + model.mapped_bytes
    loading = weights if settings.trains_own_weights else weights - model.trained_bytes
    # What is computed there: small rows whose logits are kept, to see whether the model can be trained and loaded.
    tried = 5 * PIECE * int(model.lm.base.config.get_text_config().vocab_size) * 4
    if device.type == "cpu":
        loading += _file(settings, model)
        tried += CPU_GROWTH
    totals = {LOADING: loading + tried}
    need = Need(_second_model(settings, model, device), model.trained_bytes)
    if need.fits(free - (weights - base)):
        totals[REHEARSING] = weights + need.total + tried
    totals[STEPS] = sum(parts.values())
    if device.type == "cpu":  # elsewhere what is saved is copied to the host
        totals[SAVING] = weights + update.states + parts["moving average"] + _copies(settings, model)
    return Moments(parts, totals)


def _steps(settings: Train, model: Hollow, row: RowCost, update: UpdateCost, device: torch.device) -> dict[str, int]:
    """Bytes beside those of the process."""
    sizes = [p.numel() * p.element_size() for p in model.trained.values()]
    numbers = sum(p.numel() for p in model.trained.values())
    holes, growth = (CPU_HOLES, CPU_GROWTH) if device.type == "cpu" else (CUDA_HOLES, 0)
    activations = sum(row.peak.values())
    average = 0 if settings.ema is None else 4 * numbers  # kept in fp32
    copied = settings.save_async is True and device.type == "cpu"
    saved = model.trained_bytes + (model.frozen_bytes if settings.trains_own_weights else 0)
    return {
        "frozen weights": model.frozen_bytes,
        "file of packed weights": model.mapped_bytes,
        "trained weights": model.trained_bytes,
        "gradients": max(sizes) if settings.optimizer_in_backward else sum(sizes),
        "optimizer states": update.states,
        "moving average": average,
        "copy that is being saved": saved + update.states + average if copied else 0,
        "activations": int(row.peak.get(LAYERS, 0)),
        "attention": int(row.peak.get(ATTENTION, 0)),
        "logits": int(row.peak.get(HEAD, 0)),
        "allocator": growth + int(max(holes * activations, update.passing - activations)),
    }


def _file(settings: Train, model: Hollow) -> int:
    """Bytes of the weights' file that are resident while it is converted; pages of weights that stay are those."""
    stored = stored_dtype(settings.model)
    kept = model.precision.trained if settings.trains_own_weights else model.precision.frozen
    return 0 if stored == kept else model.base_numbers * stored.itemsize


def _second_model(settings: Train, model: Hollow, device: torch.device) -> int:
    """Bytes that loading what was saved takes: a model's own weights are saved in the format in which they are kept."""
    whole = model.frozen_bytes + model.trained_bytes + model.mapped_bytes
    return whole + (0 if settings.trains_own_weights or device.type != "cpu" else _file(settings, model))


def _copies(settings: Train, model: Hollow) -> int:
    """Bytes of copies that saving makes: the live weights beside averaged ones, or the final ones in another format."""
    averaged = settings.ema is not None or settings.optimizer == "schedule_free_adamw"
    subtracted = not settings.trains_own_weights and mutates_base(peft_config(settings))
    live = model.trained_bytes if averaged or subtracted else 0
    if not settings.trains_own_weights:
        return live
    stored = stored_dtype(settings.model)
    return max(live, 0 if stored == model.precision.trained else model.base_numbers * stored.itemsize)
