"""`graft plan`: the same preparation as a training run, and then a forecast in the place of the training."""

from __future__ import annotations

import tempfile
from pathlib import Path

from graft.config.train import Train
from graft.model.device import free_bytes
from graft.runs import RunFolder
from graft.train.costs.forecast import Forecast, Option
from graft.train.costs.foresee import forecaster_for
from graft.train.costs.hollow import refuse_uncountable
from graft.train.formats import refuse_base
from graft.train.open_run import with_date
from graft.train.prepare import prepare
from graft.train.tuning import check_tuning


def plan(settings: Train, memory: int | None = None) -> tuple[Forecast, list[Option], int]:
    """Forecast of a run, the options it has, fastest first, and the memory they were held against, in bytes.

    `memory` is the whole of it, with what the process has already; None takes what this process has and what is free.

    Raises:
        GraftError: what would stop the run before it loads its weights, or its model cannot be counted.
    """
    check_tuning(settings)
    refuse_base(settings)
    refuse_uncountable(settings)
    settings = with_date(settings)
    with tempfile.TemporaryDirectory() as aside:  # the rejects and held-out parts are a run's, not a plan's
        prepared = prepare(settings, RunFolder(Path(aside)), passing=True)
    forecaster = forecaster_for(settings, prepared, memory)
    free = free_bytes(forecaster.device)
    if settings.row_tokens == "auto":
        budget, _ = forecaster.choose_budget(free if memory is None else memory)
        forecaster.settings = settings.model_copy(update={"row_tokens": budget})
    found = forecaster.forecast()
    if memory is None:
        memory = free + found.parts["process"]
    return found, forecaster.options(memory), memory
