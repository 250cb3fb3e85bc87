"""Options and steps that the data commands share: files in, counts and rejects out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graft.data.load import Loaded

Files = Annotated[list[str], typer.Argument(help="jsonl, json, csv, tsv or parquet files.", metavar="FILE")]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="auto (detected per file), messages, sharegpt, alpaca, prompt-completion, question-answer or text.",
    ),
]
MaxRejected = Annotated[
    float, typer.Option(help="Refuse (exit 3) when a larger share of the rows is rejected.", min=0, max=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result to stdout as one JSON object.")]


def keep_sources(files: Sequence[str], written: Sequence[Path]) -> None:
    """Refuse to overwrite a file that is to be read."""
    from graft.errors import InputError

    sources = {Path(file).resolve() for file in files}
    for path in written:
        if path.resolve() in sources:
            raise InputError(f"{path}: is one of the files to read and would be overwritten; choose another --out")


def load(files: Sequence[str], form: str, rejects: Path, max_rejected: float) -> Loaded:
    """Load the files, list what was rejected, and stop where that is too much."""
    from typing import cast, get_args

    from graft.config.base import did_you_mean
    from graft.config.data import Format, Source
    from graft.data.load import load_sources, refuse_if_too_many, write_rejects
    from graft.errors import ConfigError

    known = get_args(Format)
    if form not in known:
        raise ConfigError(f"--format {form}: no such format{did_you_mean(form, known)}; known are {', '.join(known)}")
    loaded = load_sources([Source(path=file, format=cast(Format, form), weight=1.0) for file in files])
    write_rejects(rejects, loaded.rejects)
    refuse_if_too_many(loaded.rejects, loaded.read, max_rejected)
    return loaded


def report(loaded: Loaded, rejects: Path, written: dict[str, int], notes: Sequence[str], as_json: bool) -> None:
    """Decisions, counts and files: as lines for people, or as one JSON object."""
    from graft import console
    from graft.data.load import commonest_reasons

    kept, rejected = len(loaded.conversations), len(loaded.rejects)
    if as_json:
        result: dict[str, Any] = {
            "read": loaded.read,
            "kept": kept,
            "rejected": rejected,
            "decisions": loaded.decisions,
            "notes": list(notes),
            "written": written,
            "rejects": str(rejects),
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for decision in loaded.decisions:
        console.note(decision)
    for note in notes:
        console.warn(note)
    for count, reject in commonest_reasons(loaded.rejects):
        place = f"first at {reject.file}:{reject.line}"
        console.warn(f"{count} rejected: {reject.field + ': ' if reject.field else ''}{reject.reason} ({place})")
    typer.echo(f"{loaded.read} rows read, {kept} kept, {rejected} rejected (listed in {rejects})")
    for path, count in written.items():
        typer.echo(f"{path}: {count} conversations")
