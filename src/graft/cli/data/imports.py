"""`graft data import`: data of any known layout to canonical conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.data.shared import AsJson, Files, FormatName, MaxRejected, keep_sources, report, sources_of


def import_data(
    files: Files,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.")],
    rejects: Annotated[
        Path | None, typer.Option(help="Where rejected rows are listed.", show_default="OUT with .rejects.jsonl")
    ] = None,
    form: FormatName = "auto",
    columns: Annotated[
        str | None,
        typer.Option(help="What columns are called, ours=theirs: question=Frage,answer=Antwort.", metavar="A=B,..."),
    ] = None,
    questions: Annotated[
        bool, typer.Option("--questions", help="Rows may end before the answer: questions to be asked later.")
    ] = False,
    max_rejected: MaxRejected = 0.01,
    as_json: AsJson = False,
) -> None:
    """Read data of any known layout and write it as one file of conversations.

    The layout of each file and the meaning of its columns are found out and said. Rows that cannot be used go to the
    rejects file with file, line, field and reason: kept + rejected = read.
    """
    from graft import console
    from graft.data.load import only_conversations, stream_sources
    from graft.data.tally import Tally
    from graft.data.write import check_suffix, stem_of, write_conversations

    rejects = rejects or out.with_name(f"{stem_of(out)}.rejects.jsonl")
    keep_sources(files, (out, rejects))
    check_suffix(out)
    tally = Tally()
    rows = console.track(stream_sources(sources_of(files, form, columns), tally, not questions), "import")
    count = write_conversations(out, only_conversations(rows, tally, rejects, max_rejected))
    report(tally, rejects, {str(out): count}, (), as_json)
