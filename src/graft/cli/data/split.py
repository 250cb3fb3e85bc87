"""`graft data split`: train, val and test parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.data.shared import AsJson, Files, FormatName, MaxRejected, keep_sources, load, report


def split_data(
    files: Files,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for train.jsonl, val.jsonl and test.jsonl.")],
    val: Annotated[float, typer.Option(help="Share for validation.", min=0, max=1)] = 0.05,
    test: Annotated[float, typer.Option(help="Share for test.", min=0, max=1)] = 0.05,
    form: FormatName = "auto",
    max_rejected: MaxRejected = 0.01,
    as_json: AsJson = False,
) -> None:
    """Divide data into train, val and test by a hash of each first prompt.

    Appending rows later moves none, and equal prompts stay together.
    """
    from graft.data.split import split
    from graft.data.write import write_conversations
    from graft.errors import ConfigError, InputError
    from graft.runs import make_writable

    if val + test >= 1:
        raise ConfigError(f"--val {val:g} + --test {test:g} leave nothing to train on; make their sum less than 1")
    targets = {name: out / f"{name}.jsonl" for name in ("train", "val", "test")}
    rejects = out / "rejects.jsonl"
    keep_sources(files, (*targets.values(), rejects))
    make_writable(out)
    loaded = load(files, form, rejects, max_rejected)
    parts = split(loaded.conversations, val, test)
    by_name = {"train": parts.train, "val": parts.val, "test": parts.test}
    for name, part in by_name.items():
        if not part and targets[name].exists():  # it would be taken for a part of this split
            raise InputError(f"{targets[name]}: is from another split, this one has no {name} part; remove it")
    written = {}
    for name, part in by_name.items():
        if part:
            write_conversations(targets[name], part)
            written[str(targets[name])] = len(part)
    report(loaded, rejects, written, parts.notes, as_json)
