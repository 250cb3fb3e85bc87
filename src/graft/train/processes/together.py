"""What the processes of a run do in common before the first step: folder, data, device, and a look at each other.

The first process opens the run folder; one process of each host reads and encodes the data, and the others map what it
kept. No collective is open while that goes on, so it may take as long as it takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from graft.config.train import Train
from graft.console import hush
from graft.errors import ConfigError, InputError
from graft.model.device import pick_device
from graft.model.processes.context import refuse_split_rows
from graft.model.processes.ranks import Ranks
from graft.runs import RunFolder
from graft.tokens.plan import Plan
from graft.tokens.store import open_stored, refuse_unwritable_cache
from graft.train.open_run import open_run, place_to_resume
from graft.train.prepare import Prepared, prepare, renderer_of
from graft.train.processes.preflight import look_at_each_other
from graft.train.processes.watchdog import Watchdog
from graft.train.updates.optimizers import BY_NUMBER


class Here(NamedTuple):
    """What a process has once it is connected to the others."""

    ranks: Ranks
    device: torch.device
    watchdog: Watchdog


class Place(NamedTuple):
    """Where a run goes on."""

    checkpoint: Path | None
    """None where it begins."""
    finished: bool


def refuse_with_ranks(settings: Train, ranks: Ranks) -> None:
    """Find what cannot be done by several processes before anything is read.

    Raises:
        ConfigError: names the setting and the nearest one that can.
    """
    refuse_split_rows(settings.context_ranks, ranks)
    if ranks.size > 1:
        wrong = next((text for text in _not_by_several(settings) if text), None)
        if wrong:
            raise ConfigError(f"with {ranks.size} processes: {wrong}")


def _not_by_several(s: Train) -> Iterator[str | bool]:
    """Sentences about settings that need one process; anything false where they do not."""
    yield (
        s.optimizer_in_backward
        and s.optimizer not in BY_NUMBER
        and f"optimizer_in_backward goes with adamw, lion and sgd; {s.optimizer} looks at a whole weight, which no "
        "process has in the backward pass: set optimizer_in_backward=false, or another optimizer"
    )
    yield (
        s.out is None
        and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        and "out is not given, but the launcher restarts processes that fail: a restarted run could not find itself; "
        "set out=DIR"
    )


def open_together(settings: Train, ranks: Ranks, held: ExitStack) -> tuple[Train, RunFolder]:
    """The run folder and the effective settings, the same for all; a restarted run continues by itself.

    The folder is locked as long as `held` is open.

    Raises:
        InputError: see `open_run`.
    """
    if ranks.size == 1:
        return open_run(settings, held)
    if not ranks.first:
        hush()
    if ranks.restarts and settings.out is not None and RunFolder(Path(settings.out)).begun():
        settings = settings.model_copy(update={"resume": True})

    def opened() -> str:
        found, run = open_run(settings, held)
        return found.model_copy(update={"out": str(run.root.resolve())}).model_dump_json()

    found = Train.model_validate_json(ranks.from_first("run", opened))
    return found, RunFolder(Path(str(found.out)))


def prepare_together(settings: Train, run: RunFolder, ranks: Ranks) -> Prepared:
    """The data, encoded by one process of each host.

    Raises:
        InputError, DataRefused: see `prepare`.
    """
    if ranks.size == 1:
        return prepare(settings, run)
    made: list[Prepared] = []

    def make() -> str:
        refuse_unwritable_cache()  # one process could do without
        made.append(prepare(settings, run))
        return _described(made[0])

    text = ranks.from_first("data", make, per_host=True)
    return made[0] if made else _reopened(text, settings)


def _described(prepared: Prepared) -> str:
    """All of it but the renderer and the ids, which the other processes open for themselves."""
    plan = prepared.plan
    return json.dumps(
        {
            "train": prepared.train.key,
            "val": prepared.val.key,
            "repeats": [(value, len(list(group))) for value, group in groupby(plan.repeats)],
            "plan": [plan.batch_size, plan.epochs, plan.seed, plan.max_steps],
            "made_of": prepared.made_of,
            "counts": prepared.counts,
            "thinking": prepared.thinking,
        }
    )


def _reopened(text: str, settings: Train) -> Prepared:
    found = json.loads(text)
    repeats = tuple(value for value, count in found["repeats"] for _ in range(count))
    return Prepared(
        renderer_of(settings),
        open_stored(found["train"]),
        open_stored(found["val"]),
        Plan(repeats, *found["plan"]),
        found["made_of"],
        found["counts"],
        found["thinking"],
    )


def device_of(settings: Train, ranks: Ranks) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: it is not there, or the settings name one device for several processes.
    """
    device = pick_device(settings.device)
    if ranks.size == 1 or device.type == "cpu":
        return device
    if ":" in settings.device:
        raise ConfigError(f"device={settings.device} names one device for {ranks.size} processes; leave its number out")
    return pick_device(f"{device.type}:{ranks.local}")


@contextmanager
def joined(
    settings: Train, run: RunFolder, made_of: Mapping[str, str], ranks: Ranks, recipe: Mapping[str, str]
) -> Iterator[Here]:
    """This process's device, with the connections to the others open, looked at, and watched.

    `recipe` is what this process was told to do, by setting.
    """
    device = device_of(settings, ranks)
    if ranks.size > 1 and device.type != "cpu":
        torch.accelerator.set_device_index(device)
    ranks.join(device)
    if ranks.size > 1:
        look_at_each_other(ranks, device, recipe, made_of)
    watchdog = Watchdog(ranks, run.checkpoints)
    try:
        yield Here(ranks, device, watchdog)
    finally:
        watchdog.rest()
    ranks.leave()


def resume_together(settings: Train, run: RunFolder, made_of: Mapping[str, str], ranks: Ranks) -> Place:
    """Where the run goes on, as the first process sees it.

    Raises:
        InputError: see `place_to_resume`; or this process's host does not see the checkpoint.
    """

    def look() -> str:
        checkpoint = place_to_resume(settings, run, made_of)
        finished = settings.resume is True and run.finished()
        return json.dumps([str(checkpoint) if checkpoint else None, finished])

    named, finished = json.loads(ranks.from_first("where it goes on", look))
    if named is not None and not Path(named).is_dir():
        raise InputError(
            f"rank {ranks.rank}: {named} cannot be read on this host; put the run folder (out=DIR) where every host "
            "sees it, or copy the checkpoint there"
        )
    return Place(Path(named) if named is not None else None, finished)
