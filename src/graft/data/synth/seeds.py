"""The questions to start from: domain-self-instruct's seeds, self-instruct's seed tasks, or any file that graft reads.

Speaks of files and questions. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from graft.config.data import Source
from graft.data.load import load_sources
from graft.data.reading.read import read_rows
from graft.errors import InputError
from graft.types import Conversation, Origin, Reject
from graft.words import counted

BARE = ("question", "instruction", "query", "prompt")
"""Columns that hold a question in rows that have no answer beside it."""
_ANSWERS = ("answer", "response", "output", "completion")
_SAMPLE_ROWS = 100


@dataclass(frozen=True, slots=True)
class Seed:
    """A question of the user's."""

    text: str
    origin: Origin
    answered: bool
    """It came with an answer."""


@dataclass(frozen=True, slots=True)
class Seeds:
    """What the files held: len(kept) + len(rejects) == read."""

    kept: list[Seed]
    rejects: list[Reject]
    read: int
    decisions: list[str]


def load_seeds(paths: Sequence[str]) -> Seeds:
    """Read every file in order.

    Raises:
        InputError: a file cannot be read, or none of its rows holds a question.
    """
    result = Seeds([], [], 0, [])
    for path in paths:
        part = _load_bare(path) if _is_bare(path) else _load_conversations(path)
        if not part.kept:
            first = f"; the first: {part.rejects[0].reason}" if part.rejects else ""
            raise InputError(
                f"{path}: none of its {part.read} rows holds a question{first}; see docs/synth.md for the forms"
            )
        result = Seeds(
            result.kept + part.kept,
            result.rejects + part.rejects,
            result.read + part.read,
            result.decisions + part.decisions,
        )
    return result


def _is_bare(path: str) -> bool:
    """Whether the rows have questions without an answer column, or are self-instruct's seed tasks."""
    values = (raw.value for raw in islice(read_rows(Path(path)), _SAMPLE_ROWS))
    rows = [value for value in values if not isinstance(value, Reject)]
    bare = sum(_column(row) is not None for row in rows)
    return bare > len(rows) / 2


def _column(row: Mapping[str, Any]) -> str | None:
    if any(row.get(name) is not None for name in (*_ANSWERS, "messages", "conversations")):
        return None
    return next((name for name in BARE if isinstance(row.get(name), str)), None)


def _load_bare(path: str) -> Seeds:
    kept: list[Seed] = []
    rejects: list[Reject] = []
    for raw in read_rows(Path(path)):
        origin, row = raw.origin, raw.value
        if isinstance(row, Reject):
            rejects.append(row)
            continue
        column = _column(row)
        if column is None:
            rejects.append(Reject(origin.file, origin.line, "", f"has no text under {' or '.join(BARE)}"))
        elif not row[column].strip():
            rejects.append(Reject(origin.file, origin.line, column, "is empty"))
        else:
            text, answered = _with_instance(row, row[column].strip())
            kept.append(Seed(text, origin, answered))
    return Seeds(kept, rejects, len(kept) + len(rejects), [f"{path}: {counted(len(kept), 'question')}"])


def _with_instance(row: Mapping[str, Any], text: str) -> tuple[str, bool]:
    """A seed task of self-instruct has its input and its answer in the first of its `instances`."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else None
    if not isinstance(first, Mapping):
        return text, False
    given = first.get("input")
    if isinstance(given, str) and given.strip():
        text = f"{text}\n{given.strip()}"
    return text, bool(first.get("output"))


def _load_conversations(path: str) -> Seeds:
    loaded = load_sources([Source(path=path)], require_answer=False)
    kept: list[Seed] = []
    rejects = list(loaded.rejects)
    for conversation in loaded.conversations:
        text = _first_question(conversation)
        if text is None:
            origin = conversation.origin
            rejects.append(Reject(origin.file, origin.line, "messages", "has no user turn to take as a question"))
        else:
            kept.append(Seed(text, conversation.origin, _answered(conversation)))
    return Seeds(kept, rejects, loaded.read, list(loaded.decisions))


def _first_question(conversation: Conversation) -> str | None:
    return next((m.content.strip() for m in conversation.messages if m.role == "user" and m.content.strip()), None)


def _answered(conversation: Conversation) -> bool:
    return any(message.role == "assistant" for message in conversation.messages)
