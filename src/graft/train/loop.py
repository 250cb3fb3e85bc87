"""A training run from settings to final folder, in the order in which things happen.

run folder -> prepare data -> meet the other processes -> load model -> rehearse -> steps (train/fit.py) -> final folder
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

from graft.config.train import Train
from graft.console import note
from graft.errors import Interrupted
from graft.model.processes.ranks import Ranks, ranks_from_environment
from graft.model.processes.shard import refuse_holders
from graft.runs import RunFolder
from graft.tokens.tree import SHORTEST_RUN, build_rows
from graft.train.costs.foresee import explained_out_of_memory, foresee, is_small
from graft.train.costs.foresee_together import choose_row_tokens
from graft.train.fit import Fit
from graft.train.formats import refuse_base
from graft.train.load import holders_for
from graft.train.processes.groups import refuse_groups
from graft.train.processes.preflight import recipe_of
from graft.train.processes.together import joined, open_together, prepare_together, refuse_with_ranks, resume_together
from graft.train.saving.space import explained_disk_errors
from graft.train.signals import stop_requests
from graft.train.tuning import check_tuning
from graft.train.updates.in_backward import refuse_steps_of_several_rows


def train(settings: Train) -> RunFolder:
    """Run to the end, or to where a signal stops it; returns the run folder with `final/` in it.

    Raises:
        GraftError: the settings, data or model cannot serve, the run diverged, or was interrupted (all saved).
    """
    ranks = ranks_from_environment()
    with ranks.said_once():
        return _train(settings, ranks)


def _train(settings: Train, ranks: Ranks) -> RunFolder:
    check_tuning(settings)
    refuse_base(settings)
    refuse_with_ranks(settings, ranks)
    refuse_groups(settings, ranks)
    if ranks.size > 1:
        refuse_holders(ranks, holders_for(settings, ranks), settings.tensor_ranks)
    recipe = recipe_of(settings)
    with contextlib.ExitStack() as held:
        settings, run = open_together(settings, ranks, held)
        return _train_in(run, settings, ranks, recipe)


def _train_in(run: RunFolder, settings: Train, ranks: Ranks, recipe: Mapping[str, str]) -> RunFolder:
    with stop_requests() as stop, explained_disk_errors(run):
        try:
            prepared = prepare_together(settings, run, ranks)
            place = resume_together(settings, run, prepared.made_of, ranks)
            if place.finished:
                note(f"{run.root} is finished already, and what it was made of has not changed; nothing is computed")
                return run
            if settings.optimizer_in_backward:
                rows_of = partial(build_rows, share=settings.trees, shortest_run=SHORTEST_RUN)  # of most models
                budget = settings.row_budget
                refuse_steps_of_several_rows(prepared.plan, prepared.train, budget, rows_of, settings.trees)
            settings = foresee(settings, prepared) if ranks.size == 1 else choose_row_tokens(settings, prepared, ranks)
            with (
                explained_out_of_memory(settings, prepared),
                joined(settings, run, prepared.made_of, ranks, recipe) as here,
            ):
                fit = Fit(settings, run, prepared, here, place.checkpoint)
                fit.rehearse_saving()
                if not is_small(settings, prepared):
                    fit.rehearse(stop)
                stop.saves = True
                fit.run_to_the_end(stop)
        except KeyboardInterrupt:
            if not stop.is_set():
                raise
            again = f"continue with: graft train --resume {run.root}" if run.begun() else "start again"
            raise Interrupted(
                f"stopped before the first step of this start, so there is nothing to save; {again}"
            ) from None
    return run
