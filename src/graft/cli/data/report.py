"""`graft data report`: one page about a set of data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from graft.cli.data.shared import AsJson, Files, FormatName
from graft.cli.options import TrustRemoteCode


def report_data(
    files: Files,
    *,
    model: Annotated[
        str | None, typer.Option(help="Model or tokenizer folder: adds all that is told in tokens.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The HTML page to write.", show_default="report.html, with --json none"),
    ] = None,
    as_json: AsJson = False,
    form: FormatName = "auto",
    columns: Annotated[
        str | None,
        typer.Option(help="What columns are called, ours=theirs: question=Frage,answer=Antwort.", metavar="A=B,..."),
    ] = None,
    template: Annotated[str | None, typer.Option(help="One of graft's chat templates, or a Jinja file.")] = None,
    train_on: Annotated[str, typer.Option(help="all_turns, last_turn or everything.")] = "all_turns",
    max_length: Annotated[int, typer.Option(help="Longest example of the steps, in tokens.", min=8)] = 2048,
    batch_size: Annotated[int, typer.Option(help="Conversations per step, for what trees share.", min=1)] = 16,
    sample: Annotated[
        int, typer.Option(help="Rows for languages, near-duplicates and tokens; 0 is all.", min=0)
    ] = 20_000,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of the order of the steps.", min=0)] = 0,
    workers: Annotated[int, typer.Option(help="Processes that encode and look for near-duplicates.", min=1)] = 1,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what is in a set: formats, languages, lengths, duplicates, labels, samples, what trees share.

    One HTML page that needs no network, or one JSON object.
    """
    from graft.cli.data.shared import keep_sources, sources_of
    from graft.config.train import load_train
    from graft.console import note, warn
    from graft.errors import ConfigError, InputError
    from graft.runs import write_atomic
    from graft.tokens.load import load_renderer
    from graft.use.data_report import Asked, as_page, data_report, summary
    from graft.use.data_report import as_json as plain
    from graft.visible import escape_hidden

    page = out or (None if as_json else Path("report.html"))
    if page and page.is_dir():
        raise InputError(f"{page}: is a folder; name a file in it, such as --out {page / 'report.html'}")
    if template is not None and model is None:
        raise ConfigError("--template is for tokens, and these need --model; give both or neither")
    keep_sources(files, [page] if page else [])
    settings = load_train(
        None,
        (),
        {
            "model": model or "none",
            "data": sources_of(files, form, columns),
            "encode.template": template,
            "encode.train_on": train_on,
            "encode.max_length": max_length,
            "batch_size": batch_size,
            "seed": seed,
        },
    )
    renderer = load_renderer(model, template, None, trust_remote_code) if model is not None else None
    asked = Asked(
        settings.data, sample, settings.seed, settings.encode, settings.batch_size, settings.row_budget, workers
    )
    found = data_report(asked, model, renderer)
    for said in (*found.decisions, *(renderer.notes if renderer else ())):
        note(escape_hidden(said))
    if as_json:
        # A file's name may hold bytes that are no text.
        sys.stdout.buffer.write(json.dumps(plain(found), ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        sys.stdout.flush()
    else:
        for line in summary(found):
            typer.echo(line)
    for count, reject in found.reasons[:3]:
        why = f"{reject.field}: {reject.reason}" if reject.field else reject.reason
        warn(escape_hidden(f"{count} rejected: {why} (first at {reject.file}:{reject.line})"))
    if page is not None:
        try:
            write_atomic(page, as_page(found))
        except OSError as error:
            raise InputError(f"{page}: cannot be written ({error.strerror}); choose another --out") from None
        note(f"written: {page}")
