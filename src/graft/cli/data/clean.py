"""`graft data clean`: data of any known layout through an ordered list of cleaning steps."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.data.shared import AsJson, FormatName, MaxRejected, keep_sources, sources_of
from graft.cli.options import TrustRemoteCode
from graft.words import counted

if TYPE_CHECKING:
    from graft.config.clean import Clean
    from graft.data.clean.pipeline import Report
    from graft.data.tally import Tally
    from graft.tokens.count import TokenCounter


def clean_data(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE... [RECIPE.yaml] [KEY=VALUE]...",
            help="Files to clean, a recipe, and settings of steps such as language.keep=en,zh.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .jsonl, .jsonl.gz, .jsonl.zst or .parquet.")],
    rejects: Annotated[
        Path | None, typer.Option(help="Where dropped rows are listed.", show_default="OUT with .rejects.jsonl")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run only these steps, comma-separated.", metavar="A,B")] = None,
    skip: Annotated[str | None, typer.Option(help="Leave these steps out.", metavar="A,B")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", min=1, show_default="all cores")] = None,
    form: FormatName = "auto",
    columns: Annotated[
        str | None,
        typer.Option(help="What columns are called, ours=theirs: question=Frage,answer=Antwort.", metavar="A=B,..."),
    ] = None,
    max_rejected: MaxRejected = 0.01,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Repair and filter conversations, step by step, each with its counts and examples in OUT.report.json.

    What is dropped goes to the rejects file with file, line, step, field and reason. --max-rejected is about rows that
    cannot be read; what the steps drop is their purpose and refuses nothing unless nothing is left.
    """
    from graft import console
    from graft.data.clean.pipeline import Report, check_settings
    from graft.data.load import stream_sources
    from graft.data.parallel import usable_workers
    from graft.data.tally import Tally
    from graft.data.write import check_suffix, stem_of

    files, recipe, overrides = _sort_out(arguments)
    settings = _settings(recipe, overrides, only, skip)
    check_suffix(out)
    rejects = rejects or out.with_name(f"{stem_of(out)}.rejects.jsonl")
    report_path = out.with_name(f"{stem_of(out)}.report.json")
    keep_sources(files, (out, rejects, report_path))
    check_settings(settings)
    counter = _counter(settings, trust_remote_code)
    tally, report = Tally(), Report()
    rows = console.track(stream_sources(sources_of(files, form, columns), tally, check=False), "clean")
    _write(rows, settings, report, tally, out, rejects, max_rejected, workers or usable_workers(), counter)
    result = _result(report, tally, settings, out, rejects)
    _write_report(report_path, result)
    if as_json:
        text = json.dumps(result, ensure_ascii=False)
        typer.echo(text.encode(errors="backslashreplace"))  # a file's name may hold a byte that is no text
    else:
        _show(report, tally, out, rejects, report_path)


def _sort_out(arguments: Sequence[str]) -> tuple[list[str], Path | None, list[str]]:
    """Files, the recipe and `key=value` settings; a file that exists is a file, whatever its name."""
    from graft.errors import ConfigError

    files: list[str] = []
    recipes: list[Path] = []
    overrides: list[str] = []
    for argument in arguments:
        if argument.endswith((".yaml", ".yml")):
            recipes.append(Path(argument))
        elif "=" in argument and not os.path.lexists(argument):  # Path.exists raises for a pattern of 300 letters
            overrides.append(argument)
        else:
            files.append(argument)
    if len(recipes) > 1:
        raise ConfigError(f"{recipes[1]}: is a second recipe beside {recipes[0]}; name one")
    if not files:
        raise ConfigError("no file to clean is named; for example: graft data clean chats.jsonl --out clean.jsonl")
    return files, recipes[0] if recipes else None, overrides


def _settings(recipe: Path | None, overrides: Sequence[str], only: str | None, skip: str | None) -> Clean:
    from graft.config.base import load
    from graft.config.clean import Clean
    from graft.errors import ConfigError

    settings = load(Clean, recipe, overrides)
    try:
        if only is not None:
            settings = settings.only([name.strip() for name in only.split(",")])
        if skip is not None:
            settings = settings.skip([name.strip() for name in skip.split(",")])
    except ValueError as error:
        raise ConfigError(f"--{'only' if only is not None else 'skip'}: {error}") from None
    return settings


def _counter(settings: Clean, trust_remote_code: bool) -> TokenCounter | None:
    """What counts tokens for `cut`, loaded once here so that a wrong folder is found before any row is read."""
    from graft.config.clean import Cut

    cut = next((step for step in settings.steps if isinstance(step, Cut)), None)
    if cut is None or cut.model is None:
        return None
    from graft.tokens.count import TokenCounter

    today = datetime.date.today().isoformat()  # one day for all processes, though midnight pass
    counter = TokenCounter(cut.model, cut.template, today, trust_remote_code)
    counter.check()
    return counter


def _write(
    rows: Any,
    settings: Clean,
    report: Report,
    tally: Tally,
    out: Path,
    rejects: Path,
    max_rejected: float,
    workers: int,
    counter: TokenCounter | None,
) -> None:
    """Both files in one pass. Where too little was read or kept, only the rejects are there to say why."""
    from dataclasses import asdict

    from graft.data.clean.pipeline import clean
    from graft.data.clean.report import Dropped
    from graft.data.write import conversation_writer, line_writer
    from graft.errors import DataRefused
    from graft.runs import make_writable

    make_writable(out.parent)
    refused: DataRefused | None = None
    with line_writer(rejects) as reject:
        try:
            with conversation_writer(out) as write:
                for item in clean(rows, settings, report, out.parent, workers, counter):
                    if isinstance(item, Dropped):
                        reject(asdict(item))
                    else:
                        write(item)
                tally.refuse_if_too_many(max_rejected)
                if not report.kept:
                    raise DataRefused(_nothing_left(report, rejects))
        except DataRefused as error:
            refused = error
    if refused is not None:
        raise refused


def _nothing_left(report: Report, rejects: Path) -> str:
    most = max(report.steps, key=lambda step: step.dropped)
    reason = most.commonest() or "no reason"
    return (
        f"none of {report.read} rows is left: step {most.step} dropped {most.dropped} ({reason}); "
        f"all are listed in {rejects}; change the step's settings or leave it out: --skip {most.step}"
    )


def _result(report: Report, tally: Tally, settings: Clean, out: Path, rejects: Path) -> dict[str, Any]:
    return {
        "read": report.read,
        "added": report.added,
        "kept": report.kept,
        "rejected": report.rejected,
        "decisions": tally.decisions,
        "unread": {"rejected": tally.rejected, "reasons": dict(tally.reasons.most_common())},
        "steps": [step.as_json() for step in report.steps],
        "settings": settings.model_dump(mode="json"),
        "written": {str(out): report.kept},
        "rejects": str(rejects),
    }


def _write_report(path: Path, result: dict[str, Any]) -> None:
    from graft.errors import InputError
    from graft.runs import write_atomic

    text = json.dumps(result, ensure_ascii=False, indent=2) + "\n"
    try:
        write_atomic(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None


def _show(report: Report, tally: Tally, out: Path, rejects: Path, report_path: Path) -> None:
    """The table of the steps, with the commonest reason or finding of each."""
    from graft import console
    from graft.visible import escape_hidden

    for decision in tally.decisions:
        console.note(escape_hidden(decision))
    for count, reject in tally.commonest():
        place = f"first at {reject.file}:{reject.line}"
        reason = f"{reject.field + ': ' if reject.field else ''}{reject.reason}"
        console.warn(escape_hidden(f"{counted(count, 'row')} could not be read: {reason} ({place})"))
    lines = []
    for step in report.steps:
        said = [step.commonest()] if step.reasons else []
        said += [f"{kind}: {count}" for kind, count in step.notes.most_common(3) if count]
        lines.append(
            (step.step, f"{step.entered}", f"{step.changed}", f"{step.dropped}", f"{step.left}", "; ".join(said))
        )
    console.table(
        "Steps",
        ("step", "in", "changed", "dropped", "out", "most often"),
        [tuple(map(escape_hidden, line)) for line in lines],
        text=("most often",),
    )
    read = counted(report.read, "row")
    more = f" (+ {report.added} from cutting)" if report.added else ""
    typer.echo(f"{read} read{more}, {report.kept} kept, {report.rejected} rejected (listed in {rejects})")
    typer.echo(f"{out}: {counted(report.kept, 'conversation')}; examples of every step in {report_path}")
