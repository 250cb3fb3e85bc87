"""`graft data import` and `graft data split`: files of any known layout to canonical chat-messages jsonl.

Speaks of options and files; the work is done by `graft.data`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graft.data.load import Loaded

app = typer.Typer(help="Read, check and divide data.", no_args_is_help=True)

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


@app.command(
    "import",
    epilog="Example: graft data import alpaca.json chats.parquet --out all.jsonl",
)
def import_data(
    files: Files,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The chat-messages jsonl file to write.")],
    rejects: Annotated[
        Path | None, typer.Option(help="Where rejected rows are listed.", show_default="OUT with .rejects.jsonl")
    ] = None,
    form: FormatName = "auto",
    max_rejected: MaxRejected = 0.01,
    as_json: AsJson = False,
) -> None:
    """Read files of any known layout and write them as one chat-messages jsonl file.

    Rows that cannot be used go to the rejects file with file, line, field and reason.
    """
    from graft.data.write import write_conversations

    rejects = rejects or out.with_suffix(".rejects.jsonl")
    _keep_sources(files, (out, rejects))
    loaded = _load(files, form, rejects, max_rejected)
    write_conversations(out, loaded.conversations)
    _report(loaded, rejects, {str(out): len(loaded.conversations)}, (), as_json)


@app.command(
    "split",
    epilog="Example: graft data split all.jsonl --out parts --val 0.05 --test 0.05",
)
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
    _keep_sources(files, (*targets.values(), rejects))
    make_writable(out)
    loaded = _load(files, form, rejects, max_rejected)
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
    _report(loaded, rejects, written, parts.notes, as_json)


def _keep_sources(files: Sequence[str], written: Sequence[Path]) -> None:
    """Refuse to overwrite a file that is to be read."""
    from graft.errors import InputError

    sources = {Path(file).resolve() for file in files}
    for path in written:
        if path.resolve() in sources:
            raise InputError(f"{path}: is one of the files to read and would be overwritten; choose another --out")


def _load(files: Sequence[str], form: str, rejects: Path, max_rejected: float) -> Loaded:
    """Load the files, list what was rejected, and stop where that is too much."""
    from typing import cast, get_args

    from graft.config import Format, Source, did_you_mean
    from graft.data.load import load_sources, refuse_if_too_many, write_rejects
    from graft.errors import ConfigError

    known = get_args(Format)
    if form not in known:
        raise ConfigError(f"--format {form}: no such format{did_you_mean(form, known)}; known are {', '.join(known)}")
    loaded = load_sources([Source(path=file, format=cast(Format, form), weight=1.0) for file in files])
    write_rejects(rejects, loaded.rejects)
    refuse_if_too_many(loaded.rejects, loaded.read, max_rejected)
    return loaded


def _report(loaded: Loaded, rejects: Path, written: dict[str, int], notes: Sequence[str], as_json: bool) -> None:
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
