"""What a run says of its own cost before it begins, and when its memory does not suffice after all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from graft.config.train import Train
from graft.console import note, warn
from graft.errors import GraftError, OutOfMemory
from graft.model.device import free_bytes, out_of_memory, pick_device, pick_precision
from graft.runs import WEIGHTS
from graft.train.costs.forecast import Forecast, Forecaster
from graft.train.costs.hollow import NotCountable
from graft.train.formats import trained_in
from graft.train.prepare import Prepared

SMALL_WORK = 1e12
"""Parameter bytes times tokens of a run that is over before its forecast would be read."""


def forecaster_for(settings: Train, prepared: Prepared, memory: int | None = None) -> Forecaster:
    """Forecasts on the run's device; `memory` is all that the run's process may have, None what there is.

    Raises:
        ConfigError: the device or precision cannot be used here.
    """
    device = pick_device(settings.device)
    precision = trained_in(settings, pick_precision(settings.precision, device))
    return Forecaster(settings, prepared, device, precision, memory)


def foresee(settings: Train, prepared: Prepared) -> Train:
    """Say what the run will need and warn if that is not there; the settings with `row_tokens: auto` filled in.

    The forecast must never be what stops a run: a model that cannot be counted is trained all the same.
    """
    if settings.row_tokens != "auto" and is_small(settings, prepared):
        return settings
    forecaster = forecaster_for(settings, prepared)
    free = free_bytes(forecaster.device)
    drawn_from = [forecaster.device] if forecaster.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(drawn_from):  # the run draws what it would have drawn without
            if settings.row_tokens == "auto":
                budget, found = forecaster.choose_budget(free)
                settings = settings.model_copy(update={"row_tokens": budget})
                note(f"row_tokens: auto is {budget}")
            else:
                found = forecaster.forecast()
    except GraftError as error:
        note(f"memory and time are not foreseen: {error}")
        return settings.model_copy(update={"row_tokens": settings.row_budget})
    note(f"foreseen: {in_words(found)}")
    if found.beyond_process > free:
        warn(
            f"the run needs about {shown_bytes(found.beyond_process)} more memory, {shown_bytes(free)} are free on "
            f"{found.device}: it may be ended without a word. {advice(forecaster)}"
        )
    return settings


def is_small(settings: Train, prepared: Prepared) -> bool:
    """Whether the run is over in seconds, so that foreseeing and rehearsing it would be much of it."""
    files = [path for pattern in WEIGHTS for path in Path(settings.model).glob(pattern)]
    weights = sum(path.stat().st_size for path in files)
    epochs = prepared.plan.epoch_at(prepared.plan.total_steps)
    return bool(files) and weights * len(prepared.train.ids) * epochs < SMALL_WORK


def in_words(found: Forecast) -> str:
    """Peak and time in one line."""
    return (
        f"about {shown_bytes(found.peak)} of memory at the most, {duration(found.seconds_per_step)} per step, "
        f"{duration(found.seconds)} in all"
    )


def shown_bytes(size: float) -> str:
    """Bytes for a reader."""
    if size < 2**20:
        return f"{size / 2**10:.0f} KiB"
    if size < 2**30:
        return f"{size / 2**20:.1f} MiB" if size < 10 * 2**20 else f"{size / 2**20:.0f} MiB"
    return f"{size / 2**30:.2f} GiB" if size < 100 * 2**30 else f"{size / 2**30:.0f} GiB"


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def advice(forecaster: Forecaster) -> str:
    """The three changes that save most, with what they are predicted to save."""
    saved = []
    try:
        now = forecaster.forecast().peak
        for changes in _changes(forecaster.settings):
            text = " ".join(f"{name}={value}" for name, value in changes.items())
            with suppress(NotCountable):
                if (wanted := forecaster.changed(changes)) is not None:
                    saved.append((now - forecaster.forecast(wanted).peak, text))
    except (GraftError, RuntimeError, MemoryError):  # what it stands in must still be said
        return "Lower row_tokens or encode.max_length, or set checkpointing=full"
    said = [f"{text} (saves {shown_bytes(size)})" for size, text in sorted(saved, reverse=True)[:3] if size > 0]
    return f"Try {', '.join(said)}" if said else "Only a smaller model or a larger machine will help"


def _changes(settings: Train) -> Iterator[dict[str, object]]:
    """Single changes that need less memory."""
    less = {"none": ("selective", "full"), "selective": ("full",), "auto": ("full",)}
    for mode in less.get(settings.checkpointing, ()):
        yield {"checkpointing": mode}
    half = max(settings.encode.max_length, settings.row_budget // 2)
    if half < settings.row_budget and not settings.optimizer_in_backward:
        yield {"row_tokens": half}
    if settings.trains_own_weights:
        yield {"method": "lora"}
    elif settings.quantize == "none":
        yield {"quantize": "nf4"}


@contextmanager
def explained_out_of_memory(settings: Train, prepared: Prepared) -> Iterator[None]:
    """Running out of memory becomes a message with the row's shape and what would help.

    Raises:
        OutOfMemory: the device, or the host, had no more memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not out_of_memory(error):
            raise
        said = str(error).strip().splitlines()
        reason = said[0][:200] if said else "no memory left"
    else:
        return
    forecaster = forecaster_for(settings, prepared)  # outside of the handler: the step's tensors are gone by now
    try:
        row = forecaster.rows(settings).heaviest[0]
        shape = f"the heaviest row has {len(row)} nodes (row_tokens {settings.row_budget})"
    except (GraftError, RuntimeError, MemoryError):
        shape = f"row_tokens is {settings.row_budget}"
    raise OutOfMemory(
        f"out of memory on {forecaster.device}: {shape}. {advice(forecaster)}. "
        f"Nothing that was saved is lost ({reason})"
    )
