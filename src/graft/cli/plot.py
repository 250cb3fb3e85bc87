"""`graft plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders, metrics.jsonl or trainer_state.json files.")
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="png, svg or pdf; else loss.png in the first run folder.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Logarithmic loss axis.")] = False,
    dark: Annotated[bool, typer.Option("--dark", help="Light lines on a dark ground.")] = False,
) -> None:
    """Draw training and validation loss and the learning rate, of one run or of several over each other.

    Examples:

    graft plot runs/my-run

    graft plot runs/a runs/b other-tool/trainer_state.json --out compare.png
    """
    from graft.console import note
    from graft.use.curves import read_curves
    from graft.use.plot import draw, save

    curves = [read_curves(path) for path in runs]
    where = out
    if where is None:
        first = Path(runs[0])
        where = (first if first.is_dir() else first.parent) / "loss.png"
    save(draw(curves, log=log, dark=dark), where)
    note(f"written: {where}")
