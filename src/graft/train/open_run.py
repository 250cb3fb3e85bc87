"""The run folder that a run writes to, and the settings that it then has. Reads no data and no weights."""

from __future__ import annotations

import datetime
from pathlib import Path

import yaml

from graft.config.train import Train, load_train
from graft.errors import InputError
from graft.runs import RunFolder, make_writable, new_run_folder, write_atomic


def open_run(settings: Train) -> tuple[Train, RunFolder]:
    """The run folder and every effective setting; a resumed run keeps its date and its rows.

    Raises:
        InputError: the folder cannot be written, holds another run, or holds none to resume.
    """
    name = f"{Path(settings.model).name}-{Path(settings.data[0].path).stem}"
    run = new_run_folder(settings.out, name)
    if run.begun() and not settings.resume:
        raise InputError(f"{run.root}: holds a run already; continue it with resume=true, or choose another out=DIR")
    if not run.exists() and any((run.root / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{run.root}: holds a model; choose another out=DIR, so that no file of it is touched")
    if settings.resume and not run.exists():
        raise InputError(f"{run.root}: there is no run to resume; start it without resume=true")
    make_writable(run.root)
    if settings.resume:
        settings = _as_begun(settings, load_train(run.config))
    effective = {
        "out": str(run.root),
        "lr": settings.peak_lr,
        "row_tokens": "auto" if settings.row_tokens == "auto" else settings.row_budget,
    }
    return with_date(settings).model_copy(update=effective), run


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
