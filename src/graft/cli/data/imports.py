"""`graft data import`: files of any known layout to canonical chat-messages jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.data.shared import AsJson, Files, FormatName, MaxRejected, keep_sources, load, report


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
    keep_sources(files, (out, rejects))
    loaded = load(files, form, rejects, max_rejected)
    write_conversations(out, loaded.conversations)
    report(loaded, rejects, {str(out): len(loaded.conversations)}, (), as_json)
