"""What an evaluation found, as a value, as JSON and as the cells of tables. Speaks numbers; opens no model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.config.train import Sampling
from graft.runs import write_atomic
from graft.use.metrics import Interval, PairedDifference, Proportion, proportion
from graft.use.predict import Answer, write_predictions


@dataclass(frozen=True, slots=True)
class Column:
    """One model under one way of asking."""

    name: str
    """`base`, `tuned` or `model`, with the number of shots where there are some."""
    model: str
    shots: int
    loss: float | None
    """Teacher-forced, mean per target token; None for few-shot columns."""
    token_accuracy: float | None
    """Teacher-forced: not the share of right answers."""
    target_tokens: float | None
    answers: tuple[Answer, ...]
    right: tuple[bool, ...]
    """Per answer: exact match with the target."""
    chose_right: tuple[bool, ...] = ()
    """Per answer to a question with choices: whether it names the right one, however it says so."""
    by: Mapping[str, Proportion] = field(default_factory=dict)

    @property
    def exact_match(self) -> Proportion:
        return proportion(self.right)

    @property
    def right_choice(self) -> Proportion:
        return proportion(self.chose_right)

    @property
    def stopped(self) -> Proportion:
        """Answers that ended by themselves, with a stop token."""
        return proportion([answer.finish == "stop" for answer in self.answers])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All columns over the same questions."""

    target: str
    data: tuple[str, ...]
    questions: int
    examples: int
    rejected: int
    """Conversations that yield no example for the loss."""
    sampling: Sampling
    columns: tuple[Column, ...]

    def column(self, name: str) -> Column | None:
        """The column of that name."""
        return next((column for column in self.columns if column.name == name), None)

    @property
    def difference(self) -> PairedDifference | None:
        """Tuned against base, question by question."""
        base, tuned = self.column("base"), self.column("tuned")
        if base is None or tuned is None or not tuned.right:
            return None
        return PairedDifference.of(base.right, tuned.right)

    def as_json(self) -> dict[str, Any]:
        """The content of eval.json: numbers only, the answers lie in predictions files."""
        difference = self.difference
        return {
            "target": self.target,
            "data": list(self.data),
            "questions": self.questions,
            "examples": self.examples,
            "rejected": self.rejected,
            "sampling": self.sampling.model_dump(),
            "columns": [_column_json(column) for column in self.columns],
            "difference": None
            if difference is None
            else {
                "exact_match": _number(difference.difference),
                "interval95": _interval_json(difference.interval),
                "both_right": difference.both,
                "only_base_right": difference.only_first,
                "only_tuned_right": difference.only_second,
                "both_wrong": difference.neither,
            },
        }


def _column_json(column: Column) -> dict[str, Any]:
    return {
        "name": column.name,
        "model": column.model,
        "shots": column.shots,
        "loss": _number(column.loss),
        "token_accuracy": _number(column.token_accuracy),
        "target_tokens": _number(column.target_tokens),
        "exact_match": _proportion_json(column.exact_match),
        "right_choice": _proportion_json(column.right_choice),
        "stopped": _proportion_json(column.stopped),
        "by": {key: _proportion_json(value) for key, value in column.by.items()},
    }


def _proportion_json(value: Proportion) -> dict[str, Any] | None:
    if not value.total:
        return None
    return {
        "share": value.share,
        "interval95": _interval_json(value.interval),
        "hits": value.hits,
        "total": value.total,
    }


def _interval_json(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def percent(value: Proportion) -> str:
    """`94.0 % (90–96)`, or a dash where nothing was asked."""
    if not value.total:
        return "-"
    interval = value.interval
    return f"{value.share * 100:.1f} % ({interval.low * 100:.0f}–{interval.high * 100:.0f})"


def table_rows(evaluation: Evaluation) -> list[list[str]]:
    """One row per number, one cell per column, for the terminal and the report."""
    columns = evaluation.columns
    choices = [["right choice", *(percent(column.right_choice) for column in columns)]]
    return [
        ["exact match", *(percent(column.exact_match) for column in columns)],
        *(choices if any(column.chose_right for column in columns) else ()),
        ["ended by a stop token", *(percent(column.stopped) for column in columns)],
        ["loss (teacher-forced)", *(_short(column.loss, "{:.4f}") for column in columns)],
        ["token accuracy (teacher-forced)", *(_short(column.token_accuracy, "{:.1f} %", 100) for column in columns)],
    ]


def topic_rows(evaluation: Evaluation) -> list[list[str]]:
    """Exact match by topic: one row per topic, one cell per column; empty where the data names no topics."""
    topics = list(dict.fromkeys(topic for column in evaluation.columns for topic in column.by))
    return [
        [topic, *(percent(column.by.get(topic, Proportion(0, 0))) for column in evaluation.columns)] for topic in topics
    ]


def difference_shown(evaluation: Evaluation) -> str | None:
    """`tuned - base: +74.0 points (66.9 to 79.3), ...` in one line."""
    difference = evaluation.difference
    if difference is None or not difference.total:
        return None
    interval = difference.interval
    return (
        f"tuned minus base: {difference.difference * 100:+.1f} points ({interval.low * 100:+.1f} to "
        f"{interval.high * 100:+.1f}); only the tuned one is right on {difference.only_second}, "
        f"only the base on {difference.only_first} of {difference.total} questions"
    )


def _short(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value * factor)


def save_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write eval.json and one predictions file per column; returns what was written."""
    written = [folder / "eval.json"]
    write_atomic(written[0], json.dumps(evaluation.as_json(), indent=1, ensure_ascii=False) + "\n")
    for column in evaluation.columns:
        if column.answers:
            written.append(folder / f"predictions-{column.name.replace(' ', '-')}.jsonl")
            write_predictions(written[-1], column.answers)
    return written
