"""`graft data prompts`: a labelled set to an instruction set, by named prompt templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.cli.data.shared import AsJson, MaxRejected, keep_sources
from graft.visible import escape_hidden
from graft.words import counted

if TYPE_CHECKING:
    from graft.config.prompts import Prompts
    from graft.data.prompts.make import Maker
    from graft.data.tally import Tally
    from graft.types import Conversation


def prompts(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Labelled sets: csv, tsv, xlsx, parquet, jsonl ..., or hf:owner/name.", metavar="[FILE]..."
        ),
    ] = None,
    *,
    task: Annotated[str | None, typer.Option(help="What the set is for; --list shows the tasks.")] = None,
    lang: Annotated[str, typer.Option(help="Language of the prompts: en or zh.")] = "en",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; with --val or --test the folder of the parts."),
    ] = None,
    rejects: Annotated[
        Path | None, typer.Option(help="Where rejected rows are listed.", show_default="OUT with .rejects.jsonl")
    ] = None,
    template: Annotated[str, typer.Option(help="random, all, or names with commas between.")] = "random",
    templates: Annotated[
        list[str] | None,
        typer.Option(help="Template file or folder of your own or of promptsource; may be given again."),
    ] = None,
    per_row: Annotated[int, typer.Option(help="Different templates for each row.", min=1)] = 1,
    columns: Annotated[str | None, typer.Option(help="Which column is what: text=title+body,label=class")] = None,
    header: Annotated[str | None, typer.Option(help="Column names of a file without a header line: label,text")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Names of the labels: 0=negative,1=positive or negative,positive")
    ] = None,
    labels_from: Annotated[str | None, typer.Option(help="A JSON, YAML or text file with the names.")] = None,
    languages: Annotated[str | None, typer.Option(help="Of a translation set: de-en")] = None,
    choice_order: Annotated[
        Literal["shuffled", "fixed"], typer.Option(help="Labels in another order for each row, or always the same.")
    ] = "shuffled",
    shots: Annotated[int, typer.Option(help="Solved examples before each question.", min=0)] = 0,
    shots_from: Annotated[
        list[str] | None, typer.Option(help="Where they come from; else the training rows.", show_default=False)
    ] = None,
    shots_as: Annotated[Literal["turns", "text"], typer.Option(help="As earlier turns, or in one text.")] = "turns",
    shot_chars: Annotated[int, typer.Option(help="Most characters of a row's examples together.", min=0)] = 6000,
    answers: Annotated[bool, typer.Option(help="--no-answers writes the questions alone, for graft predict.")] = True,
    val: Annotated[float, typer.Option(help="Share of the rows for validation.", min=0, max=1)] = 0.0,
    test: Annotated[float, typer.Option(help="Share of the rows for testing.", min=0, max=1)] = 0.0,
    seed: Annotated[int, typer.Option(help="What templates, orders and examples are drawn by.")] = 0,
    max_rejected: MaxRejected = 0.01,
    list_them: Annotated[bool, typer.Option("--list", help="Show the library and end.")] = False,
    show: Annotated[str | None, typer.Option(help="Show a template on a sample row and end.", metavar="NAME")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn a labelled set into an instruction set through prompt templates.

    Every row remembers template, label and choices, so that answers can be scored.
    """
    if list_them:
        return _list(task, templates or [], as_json)
    if show is not None:
        return _show(show, templates or [], as_json)
    from graft.config.base import load
    from graft.config.prompts import Prompts
    from graft.data.prompts.prepare import prepare
    from graft.data.write import stem_of
    from graft.errors import ConfigError

    if not files or out is None:
        missing = "FILE" if not files else "--out FILE"
        raise ConfigError(
            f"{missing} is needed, for example: graft data prompts reviews.csv --task sentiment --out t.jsonl"
        )
    flags = {
        **{"data": files, "task": task, "lang": lang, "templates": templates, "template": template, "per_row": per_row},
        **{"columns": columns, "header": header, "labels": labels, "labels_from": labels_from, "languages": languages},
        **{"choice_order": choice_order, "shots": shots, "shots_from": shots_from, "shots_as": shots_as},
        **{"shot_chars": shot_chars, "answers": answers, "val": val, "test": test, "seed": seed},
        "max_rejected": max_rejected,
    }
    settings = load(Prompts, None, (), flags)
    _check_out(out, settings)
    maker = prepare(settings)
    targets = _targets(out, maker)
    beside = out.with_name(f"{stem_of(out)}.rejects.jsonl")
    listed = rejects or (out / "rejects.jsonl" if len(targets) > 1 else beside)
    keep_sources([*files, *(shots_from or ())], (*targets.values(), listed))
    tally, written = _write(maker, targets, listed)
    empty = [part for part, path in targets.items() if str(path) not in written]
    maker.notes += [f"the {part} part is empty: no row came to it, so there is no file" for part in empty]
    maker.notes += _fewer_shots(maker)
    _report(maker, tally, listed, written, as_json)
    return None


def _check_out(out: Path, settings: Prompts) -> None:
    """Refuse a name that cannot serve, before anything is read."""
    from graft.data.write import SUFFIXES, check_suffix
    from graft.errors import ConfigError

    if not settings.val + settings.test:
        if out.suffix:
            check_suffix(out)
    elif out.name.endswith(SUFFIXES) or out.is_file():
        raise ConfigError(f"--out {out}: --val and --test write several files; name a folder for them")


def _targets(out: Path, maker: Maker) -> dict[str, Path]:
    """Part -> file: three of them where the rows are divided, by shares or by a column of their own; else one."""
    from graft.data.write import check_suffix
    from graft.runs import make_writable

    settings = maker.settings
    shares = {"train": 1.0, "val": settings.val, "test": settings.test}
    if not out.suffix and any(piece.shape.part_column for piece in maker.pieces):
        shares = dict.fromkeys(shares, 1.0)
    elif not settings.val + settings.test:
        check_suffix(out)
        return {"train": out}
    make_writable(out)
    return {part: out / f"{part}.jsonl" for part, share in shares.items() if share}


def _write(maker: Maker, targets: dict[str, Path], listed: Path) -> tuple[Tally, dict[str, int]]:
    """Make and write everything; no file appears where too many rows are rejected, but the list of rejects does."""
    from dataclasses import asdict

    from graft import console
    from graft.data.tally import Tally
    from graft.data.write import conversation_writer, line_writer
    from graft.errors import InputError
    from graft.types import Reject

    tally = Tally()
    writers: dict[str, Callable[[Conversation], None]] = {}
    written: dict[str, int] = {}
    with ExitStack() as files:
        with line_writer(listed) as reject:
            for item in console.track(maker.make(tally), "prompts"):
                if isinstance(item, Reject):
                    reject(asdict(item))
                    continue
                part: str = item.part if item.part in targets else "train"
                if part not in writers:  # a part without rows leaves no empty file behind
                    writers[part] = files.enter_context(conversation_writer(targets[part]))
                writers[part](item.conversation)
                written[str(targets[part])] = written.get(str(targets[part]), 0) + 1
        tally.refuse_if_too_many(maker.settings.max_rejected)
        for name, path in targets.items():
            if name not in writers and path.exists():  # it would be taken for a part of this set
                raise InputError(f"{path}: is from another run, this one has no {name} part; remove it")
    return tally, written


def _fewer_shots(maker: Maker) -> list[str]:
    """What to say where prompts have fewer solved examples than were asked for."""
    wanted, counts = maker.settings.shots, maker.counts.shots
    fewer = sum(count for number, count in counts.items() if number < wanted)
    if not fewer:
        return []
    return [
        f"{fewer} prompts have fewer than {wanted} examples (the fewest: {min(counts)}): there are no more that "
        f"fit, or they are longer than --shot-chars {maker.settings.shot_chars} together"
    ]


def _report(maker: Maker, tally: Tally, listed: Path, written: dict[str, int], as_json: bool) -> None:
    """Decisions, counts and files: as lines and tables for people, or as one JSON object."""
    from graft import console

    counts = maker.counts
    notes = maker.notes
    if as_json:
        result: dict[str, Any] = {
            "read": tally.read,
            "kept": tally.kept,
            "rejected": tally.rejected,
            "decisions": maker.decisions,
            "notes": notes,
            "written": written,
            "rejects": str(listed),
            "templates": dict(sorted(counts.templates.items())),
            "labels": dict(sorted(counts.labels.items())),
            "shots": {str(number): count for number, count in sorted(counts.shots.items())},
            "passed_over": dict(counts.passed_over.most_common(50)),
        }
        typer.echo(json.dumps(result, ensure_ascii=False))
        return
    for decision in maker.decisions:
        console.note(decision)
    for note in notes:
        console.warn(note)
    for count, reject in tally.commonest():
        field = f"{reject.field}: " if reject.field else ""
        console.warn(f"{count} rejected: {field}{reject.reason} (first at {reject.file}:{reject.line})")
    for reason, count in counts.passed_over.most_common(5):
        console.note(f"{count} x passed over for another template: {reason}")
    console.table("templates", ("template", "rows"), [(name, str(n)) for name, n in sorted(counts.templates.items())])
    if counts.labels:
        common = counts.labels.most_common(20)
        console.table("labels", ("label", "rows"), [(name, str(count)) for name, count in common])
    typer.echo(
        escape_hidden(f"{counted(tally.read, 'row')} read, {tally.kept} kept, {tally.rejected} rejected (see {listed})")
    )
    for path, count in written.items():
        typer.echo(escape_hidden(f"{path}: {counted(count, 'conversation')}"))


def _list(task: str | None, files: list[str], as_json: bool) -> None:
    """The library, or the given files, one line per template."""
    from graft import console
    from graft.config.base import did_you_mean
    from graft.data.prompts.library import library, read_templates
    from graft.data.prompts.tasks import TASKS
    from graft.errors import ConfigError

    collections = [item for file in files for item in read_templates(Path(file))] if files else list(library())
    if task is not None and not files and task not in TASKS:
        raise ConfigError(f"--task {task}: no such task{did_you_mean(task, list(TASKS))}; known are {', '.join(TASKS)}")
    shown = [template for item in collections if task in (None, item.task) for template in item.templates]
    if as_json:
        rows = [
            {
                "name": item.name,
                "task": item.task,
                "lang": item.lang,
                "form": item.form,
                "takes": sorted(item.variables),
            }
            for item in shown
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    if not files:
        told = [(name, ", ".join(_role(role) for role in item.roles), item.about) for name, item in TASKS.items()]
        if task is not None:
            told = [line for line in told if line[0] == task]
        console.table(
            "tasks", ("task", "columns (in brackets: may be missing)", "what is asked for"), told, to_stdout=True
        )
    listed = [(item.name, item.form, ", ".join(sorted(item.variables))) for item in shown]
    console.table(counted(len(listed), "template"), ("name", "answer", "takes"), listed, to_stdout=True)


def _role(role: Any) -> str:
    return str(role.name) if role.needed else f"[{role.name}]"


def _show(name: str, files: list[str], as_json: bool) -> None:
    """A template, its source and what it makes of its file's sample row."""
    from graft.data.prompts.library import find, library, read_templates, render_sample
    from graft.data.prompts.promptsource import SourceTemplate

    collections = [item for file in files for item in read_templates(Path(file))] if files else list(library())
    template = find([template for item in collections for template in item.templates], name)
    home = next(item for item in collections if template in item.templates)
    rendered = None if home.sample is None else render_sample(template, home)
    if as_json:
        made = {} if rendered is None else {"prompt": rendered.prompt, "target": rendered.target}
        typer.echo(json.dumps({"name": template.name, "form": template.form, **made}, ensure_ascii=False))
        return
    parts = [f"{template.name}  (answer: {template.form}; takes {', '.join(sorted(template.variables))})\n"]
    if isinstance(template, SourceTemplate):
        parts.append(template.jinja.source)
        if template.choices:
            parts.append(f"\nanswer choices: {template.choices.source}")
    if rendered is not None:
        parts.append(f"--- prompt\n{rendered.prompt}\n--- answer\n{rendered.target}")
    typer.echo(escape_hidden("\n".join(parts)))
