"""The run folder that a run writes to, the settings that it then has, and where in it a resumed run goes on.

Reads no data and no weights.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from graft.config.train import Train, load_train
from graft.console import note, warn
from graft.errors import InputError
from graft.runs import RunFolder, locked, make_writable, new_run_folder, newest_run, run_name, write_atomic
from graft.train.saving.checkpoint import (
    clear_up,
    newest_checkpoint,
    read_state,
    refuse_changed_settings,
    refuse_if_changed,
    refuse_without_optimizer,
)


def open_run(settings: Train, held: ExitStack | None = None) -> tuple[Train, RunFolder]:
    """The run folder and every effective setting; a resumed run keeps its date and its rows.

    Nobody else can open it as long as `held` is open.

    Raises:
        InputError: the folder cannot be written, is another process's, holds another run, or holds none to resume.
    """
    name = f"{Path(settings.model).name}-{Path(settings.data[0].path).stem}"
    if settings.resume == "auto":
        settings = _whatever_is_there(settings, name)
    run = new_run_folder(settings.out, name)
    _refuse_folder(run, settings)
    make_writable(run.root)
    if held is not None:
        held.enter_context(locked(run))
        _refuse_folder(run, settings)  # again, now that nobody else can begin there
    clear_up(run)
    if settings.resume:
        settings = _as_begun(settings, load_train(run.config))
    effective = {
        "out": str(run.root),
        "lr": settings.peak_lr,
        "row_tokens": "auto" if settings.row_tokens == "auto" else settings.row_budget,
    }
    settings = with_date(settings).model_copy(update=effective)
    if settings.resume:
        refuse_changed_settings(run, settings)
    return settings, run


def _refuse_folder(run: RunFolder, settings: Train) -> None:
    if run.begun() and not settings.resume:
        raise InputError(
            f"{run.root}: holds a run already; continue it with graft train --resume {run.root}, or choose another "
            "out=DIR"
        )
    if not run.exists() and any((run.root / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{run.root}: holds a model; choose another out=DIR, so that no file of it is touched")
    if settings.resume and not run.exists():
        raise InputError(f"{run.root}: there is no run to resume; start it without --resume")


def _whatever_is_there(settings: Train, name: str) -> Train:
    """The settings of `resume: auto`: they continue the run that is there, and begin one where none is."""
    if settings.out is not None:
        there: RunFolder | None = RunFolder(Path(settings.out))
    else:
        there = newest_run(Path("runs"), run_name(name))
    if there is None or not there.exists():
        note("resume: auto finds no run yet, so this one begins")
        return settings.model_copy(update={"resume": False})
    note(f"resume: auto continues {there.root}")
    return settings.model_copy(update={"resume": True, "out": str(there.root)})


def place_to_resume(settings: Train, run: RunFolder, made_of: Mapping[str, str]) -> Path | None:
    """The checkpoint that the run goes on from; None where it begins.

    Raises:
        InputError: the run has changed, or the checkpoint that was named cannot serve.
    """
    if not settings.resume:
        return None
    if isinstance(settings.resume, str):
        checkpoint: Path | None = Path(settings.resume)
        assert checkpoint is not None
        refuse_without_optimizer(checkpoint)
    else:
        checkpoint = newest_checkpoint(run, to_resume=True)
    if checkpoint is None:
        note(f"{run.root}: no checkpoint yet, so the run begins anew")
        return None
    refuse_if_changed(checkpoint, read_state(checkpoint).made_of, made_of)
    return checkpoint


def say_other_environment(run: RunFolder, now: Mapping[str, Any]) -> None:
    """Name what the run was computed by before and is not now: its numbers may then differ by rounding."""
    try:
        before = json.loads(run.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    was, is_now = ({**found, **found.get("packages", {})} for found in (before, now))
    names = ("graft", "python", "platform", "device", "threads", "git", *now["packages"])
    changed = [
        f"{name} was {was.get(name)}, is {is_now.get(name)}" for name in names if was.get(name) != is_now.get(name)
    ]
    if changed:
        warn(f"the run goes on, but equal to the bit only where nothing has changed: {'; '.join(changed)}")


def _as_begun(settings: Train, begun: Train) -> Train:
    """What a run found out when it began, it keeps: its date, and the rows that fitted then."""
    date = begun.encode.date or settings.encode.date
    row_tokens = begun.row_tokens if settings.row_tokens == "auto" else settings.row_tokens
    encode = settings.encode.model_copy(update={"date": date})
    return settings.model_copy(update={"encode": encode, "row_tokens": row_tokens})


def with_date(settings: Train) -> Train:
    """The settings with today's date for templates, where none is given."""
    date = settings.encode.date or datetime.datetime.now().astimezone().date().isoformat()
    return settings.model_copy(update={"encode": settings.encode.model_copy(update={"date": date})})


def write_settings(settings: Train, run: RunFolder) -> None:
    """config.yaml with every effective value; it is a recipe too, and names files so that it serves from anywhere."""
    saved = settings.model_dump(mode="json", exclude={"resume"})
    files = [(source, "path") for source in (*saved["data"], *saved["val"], *saved["test"])]
    for holder, key in (*files, (saved, "model"), (saved, "init_from"), (saved["encode"], "template")):
        holder[key] = _from_anywhere(holder[key])
    write_atomic(run.config, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def _from_anywhere(name: str | None) -> str | None:
    """The absolute path of a file, a folder or a part of one (`FILE#PART`); any other name as it is."""
    if name is None or Path(name).exists():
        return name and str(Path(name).resolve())
    file, sign, part = name.rpartition("#")
    return f"{Path(file).resolve()}{sign}{part}" if file and Path(file).exists() else name
