"""One self-contained HTML page about a run: result, picture, samples, data, settings. Reads a run folder's files."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from graft.errors import InputError
from graft.runs import RunFolder, write_atomic
from graft.use.curves import read_curves
from graft.use.metrics import Proportion
from graft.use.plot import draw, save, svg_data_uri
from graft.use.result import Column, Evaluation, difference_shown, percent, table_rows
from graft.words import counted

SAMPLES = 12
_LONGEST_CELL = 600
"""Letters of a question or answer that the page shows; the predictions files have them whole."""


def write_report(run: RunFolder, evaluation: Evaluation | None = None) -> Path:
    """Write report.html and loss.png into the run folder; without an evaluation the page has no results.

    Raises:
        InputError: the run folder cannot be written.
    """
    pages = Environment(
        loader=PackageLoader("graft.use", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    page = pages.get_template("report.html.j2").render(**_content(run, evaluation))
    try:
        write_atomic(run.report, page)
    except OSError as error:
        raise InputError(f"{run.report}: cannot be written ({error.strerror})") from None
    return run.report


def _content(run: RunFolder, evaluation: Evaluation | None) -> dict[str, Any]:
    """Everything the template shows, as text; empty values leave their section out."""
    environment = _read_json(run.environment)
    settings = run.config.read_text(encoding="utf-8") if run.config.is_file() else ""
    light, dark = _pictures(run)
    columns = list(evaluation.columns) if evaluation is not None else []
    return {
        "title": run.root.resolve().name,
        "subtitle": _subtitle(evaluation),
        "cards": _cards(columns, evaluation),
        "columns": [column.name for column in columns],
        "questions": evaluation.questions if evaluation is not None else 0,
        "table": table_rows(evaluation) if evaluation is not None else [],
        "difference": difference_shown(evaluation) if evaluation is not None else None,
        "topics": _topics(columns),
        "light": light,
        "dark": dark,
        "sampled": [column.name for column in columns],
        "samples": _samples(columns),
        "counts": _counts(run, environment, evaluation),
        "environment": _environment(environment),
        "settings": settings,
    }


def _subtitle(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "not evaluated yet: graft eval"
    models = " → ".join(dict.fromkeys(column.model for column in evaluation.columns))
    return f"{models} · {', '.join(evaluation.data)}"


def _cards(columns: list[Column], evaluation: Evaluation | None) -> list[dict[str, str]]:
    """The numbers that are read first."""
    cards = []
    for column in columns:
        if column.shots == 0 and column.exact_match.total:
            share = f"{column.exact_match.share * 100:.1f} %"
            cards.append({"value": share, "label": f"exact match, {column.name}"})
    difference = evaluation.difference if evaluation is not None else None
    if difference is not None and difference.total:
        low, high = difference.interval.low * 100, difference.interval.high * 100
        cards.append(
            {"value": f"{difference.difference * 100:+.1f} points", "label": f"difference ({low:+.1f} to {high:+.1f})"}
        )
    last = next((column for column in reversed(columns) if column.shots == 0), None)
    if last is not None and last.stopped.total:
        cards.append({"value": f"{last.stopped.share * 100:.1f} %", "label": f"end by themselves, {last.name}"})
    return cards


def _topics(columns: list[Column]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(topic for column in columns for topic in column.by))
    return [{"name": name, "cells": [_cell(column, name) for column in columns]} for name in names]


def _cell(column: Column, topic: str) -> dict[str, Any]:
    value = column.by.get(topic, Proportion(0, 0))
    width = round(value.share * 100, 1) if value.total else None
    return {"text": percent(value), "width": width, "base": column.name.startswith("base")}


def _samples(columns: list[Column]) -> list[dict[str, Any]]:
    """The same random questions on every call, in the order of the data."""
    if not columns or not columns[0].answers:
        return []
    total = len(columns[0].answers)
    chosen = sorted(random.Random(0).sample(range(total), min(SAMPLES, total)))  # noqa: S311  # no secret
    return [
        {
            "input": _short(columns[0].answers[index].question.input),
            "target": _short(columns[0].answers[index].question.target or ""),
            "answers": [
                {"text": _short(column.answers[index].text) or "(empty)", "right": column.right[index]}
                for column in columns
            ],
        }
        for index in chosen
    ]


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _LONGEST_CELL else text[:_LONGEST_CELL] + " …"


def _counts(run: RunFolder, environment: Mapping[str, Any], evaluation: Evaluation | None) -> dict[str, str]:
    """Rows read and kept as the run noted them; else what its files show."""
    counts = {str(name): str(value) for name, value in _mapping(environment.get("counts")).items()}
    if not counts:
        files = {"val": run.data / "val.jsonl", "test": run.data / "test.jsonl", "rejected": run.rejects}
        counts = {name: str(_lines(path)) for name, path in files.items() if path.is_file()}
    if evaluation is not None:
        counts["evaluated"] = f"{counted(evaluation.questions, 'question')} of {', '.join(evaluation.data)}"
    return counts


def _environment(environment: Mapping[str, Any]) -> dict[str, str]:
    shown = {}
    for name, value in environment.items():
        if name in ("made_of", "counts") or value is None:
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)  # noqa: PLW2901
        shown[name] = str(value)
    return shown


def _pictures(run: RunFolder) -> tuple[str, str]:
    """The curves on a light and on a dark ground, as data URIs; also writes loss.png."""
    try:
        curves = read_curves(run.root)
    except InputError:
        return "", ""
    save(draw([curves]), run.root / "loss.png")
    return svg_data_uri(draw([curves])), svg_data_uri(draw([curves], dark=True))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
