"""Options and steps that the data commands share: files in, counts and rejects out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.visible import escape_hidden
from graft.words import counted

if TYPE_CHECKING:
    from graft.config.data import Source
    from graft.data.tally import Tally

Files = Annotated[
    list[str],
    typer.Argument(
        help="jsonl, json, csv, tsv, xlsx, parquet, arrow, txt or md files (text also as .gz, .zst), folders of them, "
        "FILE.xlsx#SHEET, FOLDER#SPLIT, or hf:OWNER/NAME:CONFIG@REVISION#SPLIT.",
        metavar="FILE",
    ),
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (detected per file), preference, messages, sharegpt, alpaca, prompt-completion, question-answer or "
        "text.",
    ),
]
MaxRejected = Annotated[
    float, typer.Option(help="Refuse (exit 3) when a larger share of the rows is rejected.", min=0, max=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result to stdout as one JSON object.")]


def keep_sources(files: Sequence[str], written: Sequence[Path]) -> None:
    """Refuse to overwrite a file that is to be read, and to write two files into one."""
    from graft.errors import InputError

    sources = {_real(name) for file in files for name in (file, file.rpartition("#")[0]) if name}
    places: set[Path] = set()
    for path in written:
        place = _real(path)
        if place in places:
            raise InputError(f"{path}: two files would be written there; give each a name of its own")
        places.add(place)
        if place in sources:
            raise InputError(f"{path}: is one of the files to read and would be overwritten; choose another --out")
        if folder := next((folder for folder in place.parents if folder in sources), None):
            raise InputError(
                f"{path}: lies in {folder}, which is read; it would be read next time: choose another --out"
            )


def refuse_to_overwrite(written: Sequence[Path], overwrite: bool) -> None:
    """Refuse to write where something is already, unless that is wanted."""
    from graft.errors import InputError

    there = [path for path in written if path.is_file()]
    if there and not overwrite:
        raise InputError(f"{there[0]}: is there already; choose another --out, or --overwrite")


def _real(path: str | Path) -> Path:
    """Where the path leads. Links that lead in a circle are left to the reader, where `Path.resolve` would raise."""
    return Path(os.path.realpath(path))


def sources_of(files: Sequence[str], form: str, columns: str | None = None) -> list[Source]:
    """The files as sources of one format (or `auto`), with columns by the names that `--columns` gives.

    Raises:
        ConfigError: there is no such format, or the columns are not written OURS=THEIRS,...
    """
    from typing import get_args

    from graft.config.base import did_you_mean, load
    from graft.config.data import Format, Source
    from graft.errors import ConfigError

    known = get_args(Format)
    if form not in known:
        raise ConfigError(f"--format {form}: no such format{did_you_mean(form, known)}; known are {', '.join(known)}")
    pairs = [pair.partition("=") for pair in columns.split(",")] if columns else []
    if not all(ours.strip() and theirs.strip() for ours, _, theirs in pairs):
        raise ConfigError(
            f"--columns {columns}: is written OURS=THEIRS, for example --columns question=Frage,answer=Text"
        )
    named = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    return [load(Source, flags={"path": file, "format": form, "columns": named}).by_options() for file in files]


def report(tally: Tally, rejects: Path, written: dict[str, int], notes: Sequence[str], as_json: bool) -> None:
    """Decisions, counts and files: as lines for people, or as one JSON object."""
    from graft import console

    if as_json:
        result: dict[str, Any] = {
            "read": tally.read,
            "kept": tally.kept,
            "rejected": tally.rejected,
            "decisions": tally.decisions,
            "notes": list(notes),
            "written": written,
            "rejects": str(rejects),
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for decision in tally.decisions:
        console.note(decision)
    for note in notes:
        console.warn(note)
    for count, reject in tally.commonest():
        place = f"first at {reject.file}:{reject.line}"
        console.warn(f"{count} rejected: {reject.field + ': ' if reject.field else ''}{reject.reason} ({place})")
    typer.echo(
        escape_hidden(
            f"{counted(tally.read, 'row')} read, {tally.kept} kept, {tally.rejected} rejected (listed in {rejects})"
        )
    )
    for path, count in written.items():
        typer.echo(escape_hidden(f"{path}: {counted(count, 'conversation')}"))
