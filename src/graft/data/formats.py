"""The layouts that rows come in, and how each becomes a Conversation: one function and one table entry per format.

Speaks of columns, formats and conversations. Knows no files beyond their names in messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.turns import (
    MESSAGE_KEYS,
    Turn,
    assistant,
    check_turns,
    list_of,
    read_tools,
    read_turns,
    system,
    text_of,
    user,
    without_empty_answer,
)
from graft.data.values import UnfitError
from graft.errors import InputError
from graft.types import Conversation, Origin, Reject

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format found in a row: turns, or raw text; and the columns that it took them from."""

    used: tuple[str, ...]
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    place: str = ""
    """Name of the column that a complaint about the whole conversation is about."""


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of rows."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """Alternatives: a row that has every column of one of them fits."""
    read: Callable[[Columns], Draft]
    """Raises UnfitError where a row does not hold what its columns promise."""
    beside: frozenset[str] | None = None
    """Columns that may stand beside these for the format to be detected; None is any."""

    def fit(self, row: Columns, detecting: bool = False) -> tuple[str, ...] | None:
        """The columns by which a row fits (none of them null), or None. `detecting` regards `beside` too."""
        for columns in self.columns:
            if all(row.get(column) is not None for column in columns):
                alone = self.beside is None or self.beside.issuperset(set(row) - set(columns))
                return columns if alone or not detecting else None
        return None


def _messages(row: Columns) -> Draft:
    """OpenAI's chat form. `messages: []` beside `text` is raw text: so a canonical file can hold both."""
    values = list_of(row.get("messages"), "messages")
    if not values and isinstance(row.get("text"), str):
        return Draft(("messages", "text"), text=row["text"], place="text")
    return Draft(("messages",), tuple(read_turns(values, "messages")), place="messages")


def _sharegpt(row: Columns) -> Draft:
    column = _first_of(row, ("conversations", "conversation"))
    return Draft((column,), tuple(read_turns(list_of(row.get(column), column), column)), place=column)


def _alpaca(row: Columns) -> Draft:
    """The user's text is the instruction, a newline, and the input where there is one."""
    answer = _first_of(row, ("output", "response"))
    extra = _first_of(row, ("input", "context"))
    instruction = text_of(row.get("instruction"), "instruction")
    given = "" if row.get(extra) is None else text_of(row[extra], extra)
    prompt = "\n".join(part for part in (instruction, given) if part)
    turns = (
        *_history(row),
        user("instruction", prompt),
        assistant(answer, text_of(row.get(answer), answer)),
    )
    return Draft(("instruction", extra, answer, "history"), turns, place=answer)


def _prompt_completion(row: Columns) -> Draft:
    """Each side is text or a list of messages."""
    answer = _first_of(row, ("completion", "response"))
    prompt, completion = row.get("prompt"), row.get(answer)
    before = read_turns(prompt, "prompt") if isinstance(prompt, list) else [user("prompt", text_of(prompt, "prompt"))]
    if isinstance(completion, list):
        after = read_turns(completion, answer)
    else:
        after = [assistant(answer, text_of(completion, answer))]
    return Draft(("prompt", answer), (*before, *after), place=answer)


def _question_answer(row: Columns) -> Draft:
    ask, answer = _first_of(row, ("question", "query")), _first_of(row, ("answer", "response"))
    turns = (
        *_history(row),
        user(ask, text_of(row.get(ask), ask)),
        assistant(answer, text_of(row.get(answer), answer)),
    )
    return Draft((ask, answer, "history"), turns, place=answer)


def _text(row: Columns) -> Draft:
    column = _first_of(row, ("text", "content"))
    return Draft((column,), text=text_of(row.get(column), column), place=column)


def _history(row: Columns) -> list[Turn]:
    """Earlier turns as pairs: [[question, answer], ...]."""
    turns: list[Turn] = []
    for index, pair in enumerate(list_of(row.get("history"), "history")):
        here = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnfitError(here, "is not a pair [question, answer]")
        turns.append(user(f"{here}[0]", text_of(pair[0], f"{here}[0]")))
        turns.append(assistant(f"{here}[1]", text_of(pair[1], f"{here}[1]")))
    return turns


def _first_of(row: Columns, names: tuple[str, ...]) -> str:
    """The first of the names that is a column with a value; the first name where none is."""
    return next((name for name in names if row.get(name) is not None), names[0])


_BESIDE_TEXT = frozenset(
    {
        *("id", "url", "source", "title", "timestamp", "date", "created", "added", "lang", "language"),
        *("language_score", "file_path", "dump", "token_count", "meta", "metadata"),
    }
)
"""Beside other columns (a label, a category) `text` is probably to be classified, not to be learnt by heart."""

FORMATS: dict[str, Format] = {
    item.name: item
    for item in (  # a row that fits several counts for the first
        Format("messages", (("messages",),), _messages),
        Format("sharegpt", (("conversations",), ("conversation",)), _sharegpt),
        Format("alpaca", (("instruction", "output"), ("instruction", "response")), _alpaca),
        Format("prompt-completion", (("prompt", "completion"), ("prompt", "response")), _prompt_completion),
        Format(
            "question-answer",
            (("question", "answer"), ("query", "response"), ("question", "response"), ("query", "answer")),
            _question_answer,
        ),
        Format("text", (("text",), ("content",)), _text, beside=_BESIDE_TEXT),
    )
}

NOT_TEXT = ("images", "videos", "audios")
RESERVED = frozenset(
    [name for item in FORMATS.values() for columns in item.columns for name in columns]
    + ["id", "meta", "tools", "system", "history", "input", "context", "chosen", "rejected", *NOT_TEXT]
)
"""Columns that mean something to a format: never written as they are when they are only `meta`."""


def detect(rows: Sequence[Columns], file: str) -> Format:
    """The format that most of the rows fit, by their columns alone.

    Raises:
        InputError: not one row fits any format; names the columns found and the formats known.
    """
    votes: Counter[str] = Counter()
    for row in rows:
        votes.update([name for name, item in FORMATS.items() if item.fit(row, detecting=True)][:1])
    if not votes:
        hint = ""
        if any(FORMATS["text"].fit(row) for row in rows):
            hint = "; to learn its `text` by heart and leave the other columns, say format: text"
        raise InputError(
            f"{file}: no format fits {_columns_found(rows)}; known are {_known()}; rename its columns to those{hint}"
        )
    best = max(votes.values())
    return next(item for name, item in FORMATS.items() if votes[name] == best)


def check_asked(asked: Format, rows: Sequence[Columns], file: str) -> None:
    """Refuse a file of which no row fits the format that the user named.

    Raises:
        InputError: names the columns found and those needed.
    """
    if not any(asked.fit(row) for row in rows):
        need = " or ".join(", ".join(columns) for columns in asked.columns)
        raise InputError(
            f"{file}: format {asked.name} needs the columns {need}, but no row fits; it has {_columns_found(rows)}; "
            "rename columns, or leave `format` out to have it detected"
        )


def _columns_found(rows: Sequence[Columns]) -> str:
    seen = Counter(name for row in rows for name in row)
    names = [name[:40] for name, _ in seen.most_common(12)]
    more = f" and {len(seen) - 12} more" if len(seen) > 12 else ""
    return f"the columns {', '.join(names)}{more}" if names else "rows without columns"


def _known() -> str:
    return ", ".join(f"{item.name} ({', '.join(item.columns[0])})" for item in FORMATS.values())


def to_conversation(
    form: Format, row: Columns, origin: Origin, source: str, require_answer: bool = True
) -> Conversation | Reject:
    """The row as a Conversation, or why it cannot be one.

    Its id is the `id` column (text or a whole number), else FILE-STEM:LINE; it is not yet unique over files.
    """
    try:
        return _to_conversation(form, row, origin, source, require_answer)
    except UnfitError as error:
        return Reject(origin.file, origin.line, error.field, error.reason)


def _to_conversation(form: Format, row: Columns, origin: Origin, source: str, require_answer: bool) -> Conversation:
    _refuse_other_kinds(row)
    draft = form.read(row)
    used, turns = set(draft.used), draft.turns
    tools: tuple[dict[str, Any], ...] = ()
    if draft.text is None:
        used |= {"system", "tools"}
        turns = _with_system(row.get("system"), turns)
        tools = read_tools(row.get("tools"), "tools")
        if not require_answer:
            turns = without_empty_answer(turns)
        check_turns(turns, draft.place, require_answer)
    elif not draft.text.strip():
        raise UnfitError(draft.place, "empty text")
    name = row.get("id")
    if name is None or (isinstance(name, str | int) and not isinstance(name, bool)):
        used.add("id")
    else:
        name = None
    return Conversation(
        id=str(name) if name not in (None, "") else f"{Path(origin.file).stem}:{origin.line}",
        origin=origin,
        messages=tuple(turn.message for turn in turns),
        tools=tools,
        text=draft.text,
        source=source,
        meta=_meta({column: value for column, value in row.items() if column not in used}, form),
    )


def _refuse_other_kinds(row: Columns) -> None:
    """Rows that would train something else than they mean: preference pairs, and text about pictures left out."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise UnfitError("chosen", "is one side of a preference pair; write the chosen answer as an assistant turn")
    for column in NOT_TEXT:
        if row.get(column):
            raise UnfitError(column, "only text can be trained on; remove the column to train without it")


def _with_system(value: Any, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A `system` column is the first turn; null and blank text are none."""
    if value is None or not text_of(value, "system").strip():
        return turns
    if turns and turns[0].message.role == "system":
        raise UnfitError("system", f"is a second system text beside {turns[0].place}; keep one")
    return (system("system", value), *turns)


def _meta(rest: dict[str, Any], form: Format) -> dict[str, Any]:
    """The columns that nothing used. In `messages` rows an object under `meta` counts as columns (see `write`)."""
    inner = rest.get("meta")
    if form.name != "messages" or not isinstance(inner, Mapping):
        return rest
    outer = {column: value for column, value in rest.items() if column != "meta"}
    return outer | dict(inner) if outer.keys().isdisjoint(inner) else rest


def unused_message_keys(row: Columns) -> set[str]:
    """Keys of the row's messages that have no place in a Message, so that dropping them can be said."""
    unused: set[str] = set()
    for column in ("messages", "conversations", "conversation"):
        values = row.get(column)
        for value in values if isinstance(values, list) else ():
            if isinstance(value, Mapping):
                unused.update(value.keys() - MESSAGE_KEYS)
    return unused
