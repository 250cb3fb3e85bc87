"""`graft data split`: train, val and test parts, free of what evaluation files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graft.cli.data.shared import AsJson, Files, FormatName, MaxRejected, keep_sources, refuse_to_overwrite, sources_of
from graft.words import counted

if TYPE_CHECKING:
    from graft.data.splitting.division import Outcome

_SHOWN_VALUES = 12


def split_data(
    files: Files,
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for train.jsonl, val.jsonl and test.jsonl.")],
    val: Annotated[float, typer.Option(help="Validation: a share below 1, or a count of rows.", min=0)] = 0.05,
    test: Annotated[float, typer.Option(help="Test: a share below 1, or a count of rows.", min=0)] = 0.05,
    group: Annotated[
        str,
        typer.Option(
            help="What stays together: exact (equal first prompts), near (near-duplicates too), none, or a column.",
            metavar="exact|near|none|COLUMN",
        ),
    ] = "near",
    stratify: Annotated[
        str,
        typer.Option(
            help="Give every part its share of each value of a column; auto finds a label column, or takes the file.",
            metavar="auto|none|file|COLUMN",
        ),
    ] = "auto",
    near: Annotated[
        float, typer.Option(help="Jaccard similarity from which texts are near-duplicates.", min=0.1, max=1)
    ] = 0.8,
    against: Annotated[
        list[str] | None,
        typer.Option(help="An evaluation file that the data must not overlap; may be given several times."),
    ] = None,
    against_action: Annotated[
        Literal["drop", "report"], typer.Option(help="Drop rows that overlap, or only list them.")
    ] = "drop",
    ngram_share: Annotated[
        float,
        typer.Option(help="Least share of an evaluation row's 13-grams that is an overlap; 0: any one.", min=0, max=1),
    ] = 0.0,
    check: Annotated[
        bool, typer.Option("--check", help="Look for overlaps of train with val and test, and list them.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that look for near-duplicates.", min=1)] = 1,
    form: FormatName = "auto",
    columns: Annotated[
        str | None,
        typer.Option(help="What columns are called, ours=theirs: question=Frage,answer=Antwort.", metavar="A=B,..."),
    ] = None,
    max_rejected: MaxRejected = 0.01,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over parts that are there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Divide data into train, val and test, keep near-duplicates together, and drop what evaluation files hold."""
    from graft import console
    from graft.data.splitting.division import Wanted
    from graft.data.splitting.partition import split_files
    from graft.runs import make_writable

    wanted = Wanted(
        val=val, test=test, group=group, stratify=stratify, near=near, against=tuple(against or ()),
        drop=against_action == "drop", gram_share=ngram_share, check=check, max_rejected=max_rejected, workers=workers,
    )  # fmt: skip
    written = [out / f"{name}.jsonl" for name in ("train", "val", "test", "rejects", "overlaps")]
    keep_sources((*files, *wanted.against), written)
    refuse_to_overwrite(written[:3], overwrite)  # the lists of an earlier attempt are nobody's data
    sources = sources_of(files, form, columns)
    make_writable(out)
    with console.progress("reading", None) as advance:
        outcome = split_files(sources, out, wanted, lambda rows: advance(rows, ""))
    if as_json:
        typer.echo(json.dumps(_as_object(outcome, out, wanted.drop), ensure_ascii=False))
    else:
        _show(outcome, out, wanted.drop)


def _as_object(outcome: Outcome, out: Path, drop: bool) -> dict[str, object]:
    rejected = outcome.tally.rejected + outcome.dropped
    return {
        "read": outcome.tally.read,
        "kept": sum(outcome.rows.values()),
        "rejected": rejected,
        "decisions": outcome.decisions,
        "notes": outcome.notes,
        "written": outcome.written,
        "rejects": str(out / "rejects.jsonl"),
        "rows": outcome.rows,
        "groups": outcome.groups,
        "largest_group": outcome.largest_group,
        "stratified_by": outcome.stratum,
        "strata": outcome.strata,
        "same_prompt_in_two_parts": outcome.same_prompt,
        "against": {"rows": outcome.evaluation_rows, "dropped": drop, "overlaps": dict(outcome.against)},
        "parts_overlap": None if outcome.parts_overlap is None else dict(outcome.parts_overlap),
    }


def _show(outcome: Outcome, out: Path, drop: bool) -> None:
    from graft import console

    for decision in outcome.decisions:
        console.note(decision)
    for note in outcome.notes:
        console.warn(note)
    for count, reject in outcome.tally.commonest():
        place = f"first at {reject.file}:{reject.line}"
        console.warn(f"{count} rejected: {reject.field + ': ' if reject.field else ''}{reject.reason} ({place})")
    read = counted(outcome.tally.read, "row")
    kept, rejected = sum(outcome.rows.values()), outcome.tally.rejected + outcome.dropped
    typer.echo(f"{read} read, {kept} kept, {rejected} rejected (listed in {out / 'rejects.jsonl'})")
    if outcome.evaluation_rows:
        where = f"dropped, listed in {out / 'rejects.jsonl'}" if drop else f"kept, listed in {out / 'overlaps.jsonl'}"
        typer.echo(
            f"{counted(outcome.against.total(), 'overlap')} with {counted(outcome.evaluation_rows, 'evaluation row')}: "
            f"{_by_kind(outcome.against)} ({where})"
        )
    console.table(
        "Parts",
        ("part", "rows", "share", "groups"),
        [(name, str(count), f"{count / kept:.1%}", str(outcome.groups[name])) for name, count in outcome.rows.items()],
        to_stdout=True,
    )
    if outcome.strata:
        largest = sorted(outcome.strata.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        rows = [(name or "(none)", *map(str, counts.values())) for name, counts in largest[:_SHOWN_VALUES]]
        if len(largest) > _SHOWN_VALUES:
            rows.append((f"... {len(largest) - _SHOWN_VALUES} more", "", "", ""))
        console.table(f"Rows by {outcome.stratum}", (str(outcome.stratum), *outcome.rows), rows, to_stdout=True)
    held_out = kept - outcome.rows["train"]
    typer.echo(f"{outcome.same_prompt} of {held_out} held-out rows have a first prompt that is in another part too")
    if outcome.parts_overlap is not None:
        found = _by_kind(outcome.parts_overlap)
        typer.echo(f"overlaps of train with val and test: {found} (listed in {out / 'overlaps.jsonl'})")
    for path, count in outcome.written.items():
        typer.echo(f"{path}: {counted(count, 'conversation')}")


def _by_kind(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in ("exact", "near", "13-gram"))
