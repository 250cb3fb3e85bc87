"""The numbers of a training run, read from its files: ours, and the trainer state that transformers writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graft.errors import InputError
from graft.runs import RunFolder, read_jsonl

Point = tuple[float, float]
"""(step, value)."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What can be drawn of one run."""

    name: str
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    lr: list[Point] = field(default_factory=list)


def read_curves(path: str | Path) -> Curves:
    """Curves of a run folder, a metrics.jsonl, a trainer_state.json, or a folder (or checkpoint) that holds one.

    Raises:
        InputError: there is nothing of the kind, or nothing was logged yet.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"{path}: no such file or folder")
    if place.is_file():
        name = place.parent.resolve().name
        curves = _of_trainer_state(name, place) if place.suffix == ".json" else _of_metrics(name, place)
    else:
        curves = _of_folder(place)
    if not curves.train and not curves.val:
        raise InputError(f"{path}: no loss was logged there yet")
    return curves


def _of_folder(folder: Path) -> Curves:
    name = folder.resolve().name
    run = RunFolder(folder)
    if run.metrics.is_file():
        return _of_metrics(name, run.metrics)
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found = [path for path in states if path.is_file()]
    if not found:
        raise InputError(f"{folder}: neither metrics.jsonl (graft) nor trainer_state.json (transformers) there")
    # The newest checkpoint's state holds the whole history.
    return _of_trainer_state(name, max(found, key=_logged_steps))


def _logged_steps(path: Path) -> float:
    step = _read_state(path).get("global_step")
    return float(step) if isinstance(step, int | float) else -1.0


def _of_metrics(name: str, path: Path) -> Curves:
    try:
        rows = list(read_jsonl(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    train = [row for row in rows if row.get("kind") == "train"]
    val = [row for row in rows if row.get("kind") == "val"]
    return Curves(name, _points(train, "loss"), _points(val, "loss"), _points(train, "lr"))


def _of_trainer_state(name: str, path: Path) -> Curves:
    history = _read_state(path).get("log_history")
    if not isinstance(history, list):
        raise InputError(f"{path}: no log_history in it; is it a trainer_state.json of transformers?")
    rows = [row for row in history if isinstance(row, dict)]
    return Curves(name, _points(rows, "loss"), _points(rows, "eval_loss"), _points(rows, "learning_rate"))


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    return state if isinstance(state, dict) else {}


def _points(rows: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """Finite values by step; of a step that was logged twice (a resumed run) the later counts."""
    points: dict[float, float] = {}
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if isinstance(step, int | float) and isinstance(value, int | float) and math.isfinite(value):
            points[float(step)] = float(value)
    return sorted(points.items())


def smooth(points: list[Point]) -> list[Point]:
    """A straight line fitted around each point over about a tenth of the curve, and read off there.

    Unlike a running mean it is neither too low where a loss falls steeply at the start nor all noise at the end.
    """
    half = len(points) // 20
    if half == 0:
        return points
    y = np.array([value for _, value in points])
    x = np.arange(len(points), dtype=np.float64)
    low, high = np.maximum(0, x - half).astype(int), np.minimum(len(points), x + half + 1).astype(int)

    def window(values: np.ndarray) -> np.ndarray:  # sums over [low, high)
        total = np.concatenate([[0.0], np.cumsum(values)])
        return np.asarray(total[high] - total[low])

    n, sx, sy = window(np.ones_like(x)), window(x), window(y)
    slope = (n * window(x * y) - sx * sy) / (n * window(x * x) - sx * sx)
    fitted = (sy + slope * (n * x - sx)) / n
    return [(step, float(value)) for (step, _), value in zip(points, fitted, strict=True)]
