"""Evaluation files to conversations: rows of any format that graft reads, and rows that only ask.

Speaks of rows, columns and conversations. Knows nothing of what is compared with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graft.config.data import Source
from graft.data.layout.choose import Choice, choose
from graft.data.layout.formats import to_conversation
from graft.data.reading.read import Part, open_address
from graft.data.tally import Tally
from graft.errors import InputError
from graft.types import Conversation, Message, Origin, Reject
from graft.words import counted

ASKING = ("question", "query", "prompt", "instruction", "turns", "problem", "sentence", "text", "content")
"""Columns that hold what is asked, where a row fits no format; the first that a row has counts."""


def stream_questions(path: str, tally: Tally) -> Iterator[Conversation | Reject]:
    """Every row of an evaluation file: in the file's format; where that does not fit, the text of its columns.

    An answer may be missing and turns may come in any order. Rejected is only what cannot be read or has no text at
    all: a row that could not be trained on can still be asked.

    Raises:
        InputError: the file cannot be read.
    """
    opened = open_address(path)
    tally.decisions += opened.notes
    for part in opened.parts:
        yield from _stream(part, _choice(part, path), path, tally)


def _choice(part: Part, path: str) -> Choice | None:
    """The format of a file; None where none fits, and its columns may still ask something."""
    try:
        return choose(part.name, Source(path=path), part.rows(), required=False)
    except InputError:
        return None


def _stream(part: Part, choice: Choice | None, path: str, tally: Tally) -> Iterator[Conversation | Reject]:
    found: Counter[str] = Counter()
    for raw in part.rows() if choice is None else choice.rows:
        if isinstance(raw.value, Reject):
            result: Conversation | Reject = raw.value
        else:
            how, result = _read(choice, raw.value, raw.origin, path)
            found[how] += 1
        if isinstance(result, Reject):
            tally.reject(result)
        else:
            tally.keep()
        yield result
    said = ", ".join(f"{how} ({counted(count, 'row')})" for how, count in found.most_common(4))
    tally.decisions.append(f"{part.name}: compared by {said or 'nothing, no row can be read'}")


def _read(choice: Choice | None, row: dict[str, Any], origin: Origin, path: str) -> tuple[str, Conversation | Reject]:
    """How the row was understood, and what it is."""
    if choice is not None:
        ours = choice.in_our_words(row)
        result = to_conversation(choice.form, ours, origin, path, require_answer=False, check=False)
        if isinstance(result, Conversation):
            return choice.form.name, result
    column, turns = _asked(row)
    messages = tuple(Message("user", turn) for turn in turns if turn.strip())
    if not messages:
        return column, Reject(origin.file, origin.line, "", "has no text to compare with")
    return f"its {column}", Conversation(f"{Path(path).stem}:{origin.line}", origin, messages, source=path)


def _asked(row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The column and its turns; an instruction takes its input with it."""
    for column in ASKING:
        value = row.get(column)
        if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
            return column, value
        if isinstance(value, str) and value.strip():
            extra = row.get("input") if column == "instruction" else None
            return column, ["\n".join(part for part in (value, extra) if isinstance(part, str) and part)]
    return "text columns", ["\n".join(value for value in row.values() if isinstance(value, str))]
