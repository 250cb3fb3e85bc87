"""`graft eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import Device, ModelPath, Precision, Seed, TrustRemoteCode

if TYPE_CHECKING:
    from graft.use.result import Evaluation


def evaluate(
    model: ModelPath,
    *,
    data: Annotated[
        list[str] | None, typer.Option(help="Conversations with answers; else the held-out part of the run.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="Compare with this model; auto is the adapter's base, none is no comparison.")
    ] = "auto",
    shots: Annotated[int, typer.Option(help="Also ask with so many examples before each question.", min=0)] = 0,
    shots_from: Annotated[
        list[str] | None, typer.Option(help="Where the examples come from; else the run's training part.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only the first so many conversations; the run's eval.json stays.", min=1)
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Column to break exact match down by.", show_default="topic, where there is one")
    ] = None,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="Exact match without regard to case.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest answer; else twice the longest right answer.", min=1)
    ] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for eval.json and predictions.")] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers to stdout as one JSON object.")] = False,
) -> None:
    """Measure a model, and how much better it is than its base, with 95 % intervals.

    Loss and token accuracy are teacher-forced (the right answer's earlier tokens are given); exact match is about
    answers that the model generates by itself, greedily. With a run folder, eval.json, the predictions and report.html
    go into it.

    Examples:

    graft eval runs/my-run

    graft eval my-adapter --data test.jsonl --shots 3 --shots-from train.jsonl
    """
    from graft.config.data import Source
    from graft.console import note
    from graft.runs import make_writable
    from graft.use.evaluate import Options
    from graft.use.evaluate import evaluate as run_evaluation
    from graft.use.open import resolve
    from graft.use.report import write_report
    from graft.use.result import save_evaluation

    target = resolve(model)
    options = Options(
        data=tuple(Source(path=path) for path in data or ()),
        base=base,
        shots=shots,
        shots_from=tuple(Source(path=path) for path in shots_from or ()),
        limit=limit,
        ignore_case=ignore_case,
        max_new_tokens=max_new_tokens,
        seed=seed,
        by=by,
        device=device,
        precision=precision,
        trust_remote_code=trust_remote_code,
    )
    run = target.run if limit is None else None  # some of the questions must not replace what all of them gave
    folder = out if out is not None else run.root if run is not None else None
    if folder is not None:
        make_writable(folder)
    evaluation = run_evaluation(target, options)
    if folder is not None:
        for path in save_evaluation(evaluation, folder):
            note(f"written: {path}")
    if run is not None:
        note(f"written: {write_report(run, evaluation)}")
    elif target.run is not None:
        note(f"{target.run.root}: its eval.json and report stay as they are, since --limit asks only some questions")
    if as_json:
        typer.echo(json.dumps(evaluation.as_json(), ensure_ascii=False))
    else:
        show(evaluation)


def show(evaluation: Evaluation) -> None:
    """The tables of an evaluation on stdout."""
    from graft.console import out, table
    from graft.use.result import difference_shown, table_rows, topic_rows
    from graft.words import counted

    names = [column.name for column in evaluation.columns]
    title = f"{counted(evaluation.questions, 'question')} of {', '.join(evaluation.data)} (95 % intervals)"
    table(title, ["", *names], table_rows(evaluation), to_stdout=True)
    if (line := difference_shown(evaluation)) is not None:
        out.print(line, markup=False)
    if rows := topic_rows(evaluation):
        table("\nexact match by topic", ["", *names], rows, to_stdout=True)
