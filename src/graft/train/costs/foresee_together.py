"""`row_tokens: auto` with several processes: one row budget for all, which fits into the least memory that any has."""

from __future__ import annotations

from collections.abc import Mapping

from graft.config.train import Train
from graft.console import note
from graft.errors import ConfigError, GraftError
from graft.model.processes.ranks import PATIENCE, Ranks
from graft.model.tuned.adapters import decoder_layers
from graft.train.costs.checkpointing import free_share
from graft.train.costs.foresee import forecaster_for, shown_bytes
from graft.train.costs.hollow import Hollow, hollow
from graft.train.load import holders_for
from graft.train.prepare import Prepared
from graft.train.processes.together import device_of

WHOLE_LAYERS = 3
"""Decoder layers of which a process has all the weights at a time: the one that computes, the one that is gathered for
the next, and as much again for a layer's gradients."""
SPREAD = ("frozen weights", "trained weights", "gradients", "optimizer states", "moving average")
"""Parts of a forecast of which each process holds its share."""


def choose_row_tokens(settings: Train, prepared: Prepared, ranks: Ranks) -> Train:
    """The settings with `row_tokens: auto` filled in, the same in every process. All must ask."""
    if settings.row_tokens != "auto":
        return settings
    mine = free_share(device_of(settings, ranks), ranks)
    least = min(float(text) for text in ranks.from_all("free memory", repr(mine), PATIENCE))
    budget = int(ranks.from_first("row_tokens", lambda: str(_chosen(settings, prepared, ranks, least))))
    return settings.model_copy(update={"row_tokens": budget})


def _chosen(settings: Train, prepared: Prepared, ranks: Ranks, least: float) -> int:
    forecaster = forecaster_for(settings, prepared)
    try:
        parts = forecaster.forecast().parts
        model = hollow(settings, forecaster.precision, forecaster.device, list(prepared.renderer.new_tokens))
        elsewhere = bytes_elsewhere(parts, model, holders_for(settings, ranks))
        budget, _ = forecaster.choose_budget(int(least + elsewhere))
    except GraftError as error:
        note(f"memory is not foreseen: {error}")
        return settings.row_budget
    note(f"row_tokens: auto is {budget} (the least free memory of {ranks.size} processes is {shown_bytes(least)})")
    return budget


def bytes_elsewhere(parts: Mapping[str, int], model: Hollow, holders: int) -> float:
    """What a process need not hold of a forecast for one, since `holders` have its weights between them.

    From below: of the weights that are gathered again while they compute, all are counted in the format they are kept.
    """
    if holders == 1:
        return 0.0
    spread = sum(parts[name] for name in SPREAD) * (1 - 1 / holders)
    total = sum(parameter.nbytes for parameter in model.lm.model.parameters())
    try:
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model.lm.base)[1]]
    except ConfigError:  # no list of layers: the model is whole while it computes
        return 0.0
    gathered = total - sum(sizes) + WHOLE_LAYERS * max(sizes)
    return max(0.0, spread - gathered)
