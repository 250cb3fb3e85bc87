"""`graft demo`: the main job on the embedded model and data."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graft.runs import RunFolder
    from graft.use.result import Evaluation


def demo(
    out: Annotated[str | None, typer.Option(help="Run folder; else runs/demo, numbered when that exists.")] = None,
) -> None:
    """Fine-tune a tiny embedded model and see it get better. About a minute on two cores, no network.

    The base model has read plain English and Chinese text about a small made-up world. It knows the facts but not how
    to answer a question; a LoRA adapter on about a thousand questions teaches it that. The test questions ask for
    facts that no training question asks for.

    Example:

    graft demo
    """
    import time

    from graft.config.train import load_train
    from graft.console import note
    from graft.demo import world
    from graft.runs import new_run_folder
    from graft.train.loop import train
    from graft.use.report import write_report
    from graft.use.result import save_evaluation

    started = time.perf_counter()
    here = Path(world.__file__).parent
    run = new_run_folder(out, "demo")
    flags = {
        "model": str(here / "base"),
        "data": str(here / "data" / "train.jsonl"),
        "val": str(here / "data" / "val.jsonl"),
        "test": str(here / "data" / "test.jsonl"),
        "out": str(run.root),
    }
    settings = load_train(here / "recipe.yaml", (), flags)
    note("1 of 3: asking the base model the test questions")
    before = _measure(flags["model"], flags["test"])
    note("2 of 3: fine-tuning")
    run = train(settings)
    note("3 of 3: asking the tuned model the same questions")
    after = _measure(str(run.root), flags["test"])
    evaluation = _side_by_side(before, after)
    save_evaluation(evaluation, run.root)
    write_report(run, evaluation)
    _show(evaluation, run, time.perf_counter() - started)


def _measure(model: str, test: str) -> Evaluation:
    from graft.config.data import Source
    from graft.use.evaluate import Options, evaluate
    from graft.use.open import resolve

    return evaluate(resolve(model), Options(data=(Source(path=test),), base="none"))


def _side_by_side(before: Evaluation, after: Evaluation) -> Evaluation:
    from dataclasses import replace

    base, tuned = replace(before.columns[0], name="base"), replace(after.columns[0], name="tuned")
    return replace(after, columns=(base, tuned))


def _show(evaluation: Evaluation, run: RunFolder, seconds: float) -> None:
    from graft.cli.evaluate import show
    from graft.console import out, table

    base, tuned = evaluation.columns
    rows = []
    for number in range(0, len(base.answers), max(1, len(base.answers) // 5)):
        question = base.answers[number].question
        rows.append(
            (question.messages[-1].content, _short(base.answers[number].text), _short(tuned.answers[number].text))
        )
    columns = ["question", "base says", "tuned says"]
    table("Some of the test questions", columns, rows, to_stdout=True, text=columns)
    out.print()
    show(evaluation)
    out.print(f"\nDone in {seconds:.0f} s. The run: {run.root}   the report: {run.report}", markup=False)
    out.print("What to type next:", markup=False)
    activate = Path(sys.argv[0]).parent / "activate"
    if shutil.which("graft") is None and activate.is_file():
        out.print(f"  make `graft` a command of this shell:\n      . {activate}", markup=False)
    for command, why in (
        (f"graft chat {run.root}", "ask it yourself"),
        (f"graft plot {run.root}", "the loss curve as a picture"),
        (f"graft data inspect --model {run.final} --data {run.data / 'test.jsonl'}", "what it learns from, per token"),
        ("graft train --model MODEL_FOLDER --data YOUR_FILE", "your own model and data"),
    ):
        out.print(f"  {why}:\n      {command}", markup=False)


def _short(text: str, most: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"
