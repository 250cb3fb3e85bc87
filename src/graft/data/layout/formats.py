"""The layouts that rows come in, and how each becomes a Conversation: one function and one table entry per format.

Speaks of columns, formats and conversations. Knows no files beyond their names in messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from graft.config.data import Source
from graft.data.layout import layouts
from graft.data.layout.calls import read_tools
from graft.data.layout.columns import SIDE_ALIASES
from graft.data.layout.layouts import CHOSEN, CONVERSATIONS, REJECTED, Columns, Draft
from graft.data.layout.order import check_turns, without_empty_answer
from graft.data.layout.turns import MESSAGE_KEYS, Turn, content_text, system
from graft.data.reading.rows import PACKED
from graft.data.reading.tables import NAMELESS
from graft.data.values import UnfitError
from graft.errors import InputError
from graft.types import Conversation, Origin, Reject


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of rows."""

    name: str
    columns: tuple[tuple[str, ...], ...]
    """Alternatives: a row that has every column of one of them fits."""
    read: Callable[[Columns, bool], Draft]
    """Draft of a row, and whether an answer is required. Raises UnfitError where a column does not hold what it
    promises."""
    beside: frozenset[str] | None = None
    """Columns that may stand beside these for the format to be detected; None is any."""
    asks: tuple[str, ...] = ()
    """Columns of which one is enough where no answer is required."""

    def fit(self, row: Columns, detecting: bool = False, required: bool = True) -> tuple[str, ...] | None:
        """The columns by which a row fits (none of them null), or None. `detecting` regards `beside` too."""
        for columns in self.columns:
            if all(row.get(column) is not None for column in columns):
                alone = self.beside is None or self.beside.issuperset(set(row) - set(columns))
                return columns if alone or not detecting else None
        if not required:
            return next(((column,) for column in self.asks if row.get(column) is not None), None)
        return None


_BESIDE_TEXT = frozenset(
    {
        *("id", "url", "source", "title", "timestamp", "date", "created", "added", "lang", "language"),
        *("language_score", "file_path", "dump", "token_count", "meta", "metadata"),
    }
)
"""Beside other columns (a label, a category) `text` is probably to be classified, not to be learnt by heart."""

_ANSWERS_TO_QUESTIONS = (("question", "answer"), ("query", "response"), ("question", "response"), ("query", "answer"))
_PAIRS = (
    *(("chosen", "rejected"), ("chosen_messages", "rejected_messages"), ("preferred_output", "non_preferred_output")),
    *(("messages", "rejected_response"), ("messages", "rejected_messages")),
)
_LABELS = frozenset(
    {
        *("label", "labels", "category", "class", "topic", "intent", "sentiment", "stars", "rating", "score"),
        *("summary", "summary1", "tag", "tags", "star", "coarse_label", "fine_label", "label_text"),
    }
)
"""Columns that a set made for classification or summarising has."""

FORMATS: dict[str, Format] = {
    item.name: item
    for item in (  # a row that fits several counts for the first
        Format("preference", _PAIRS, layouts.preference),
        Format("messages", (("messages",),), layouts.messages),
        Format("sharegpt", tuple((column,) for column in CONVERSATIONS), layouts.sharegpt),
        Format(
            "alpaca",
            (("instruction", "output"), ("instruction", "response"), ("instruction", "instances")),
            layouts.alpaca,
            asks=("instruction",),
        ),
        Format(
            "prompt-completion",
            (("prompt", "completion"), ("prompt", "response")),
            layouts.prompt_completion,
            asks=("prompt",),
        ),
        Format("question-answer", _ANSWERS_TO_QUESTIONS, layouts.question_answer, asks=("question", "query")),
        Format("text", (("text",), ("content",), ("response",)), layouts.text, beside=_BESIDE_TEXT),
    )
}

NOT_TEXT = ("images", "videos", "audios", "image", "video", "audio")
RESERVED = frozenset(
    [name for item in FORMATS.values() for columns in item.columns for name in columns]
    + ["id", "meta", "tools", "system", "history", "input", "context", "kto_tag", *CHOSEN, *REJECTED, *NOT_TEXT]
    + [alias for aliases in SIDE_ALIASES.values() for alias in aliases]
)
"""Columns that mean something to a format: never written as they are when they are only `meta`."""


def detect(rows: Sequence[Columns], file: str, required: bool = True, source: Source | None = None) -> Format:
    """The format that most of the rows fit, by their columns alone. `source` is where the user named the file.

    Raises:
        InputError: not one row fits any format; names the columns found and the formats known.
    """
    votes: Counter[str] = Counter()
    for row in rows:
        votes.update([name for name, item in FORMATS.items() if item.fit(row, True, required)][:1])
    if not votes:
        raise InputError(f"{file}: no format fits {_columns_found(rows)}; {_advice(rows, source or Source(path=file))}")
    best = max(votes.values())
    return next(item for name, item in FORMATS.items() if votes[name] == best)


def _advice(rows: Sequence[Columns], source: Source) -> str:
    """What can be done with rows that fit no format."""
    names = [name for name, _ in Counter(name for row in rows for name in row).most_common()]
    if names and all(NAMELESS.fullmatch(name) for name in names):
        return (
            "its first line names no columns, so they are called column_1, ...: add a header line; a labelled set "
            "becomes conversations with `graft data prompts`"
        )
    if labels := [name for name in names if name.strip().lower() in _LABELS]:
        learn = f"; to learn its `text` by heart, say {source.how_to_ask_for('text')}" if "text" in names else ""
        return f"with `{labels[0]}` it looks like a labelled set: `graft data prompts` makes conversations of it{learn}"
    if asks := [name for name in names for item in FORMATS.values() if name in item.asks]:
        return (
            f"`{asks[0]}` has questions without answers: `graft data import --questions` keeps them as such, "
            "`graft data synth` has them answered"
        )
    learn = "; to learn its `text` by heart and leave the other columns, say "
    hint = learn + source.how_to_ask_for("text") if "text" in names else ""
    known = ", ".join(f"{item.name} ({', '.join(item.columns[0])})" for item in FORMATS.values())
    say = {"text": names[0]} if len(names) == 1 else {"question": "A", "answer": "B"}
    heart = ", to learn it by heart" if len(names) == 1 else ""
    return (
        f"known are {known}; rename its columns to those, or say what they are: {source.how_to_name(say)}{heart}{hint}"
    )


def check_asked(
    asked: Format, rows: Sequence[Columns], file: str, required: bool = True, source: Source | None = None
) -> None:
    """Refuse a file of which no row fits the format that the user named.

    Raises:
        InputError: names the columns found and those needed.
    """
    if not any(asked.fit(row, required=required) for row in rows):
        need = " or ".join(", ".join(columns) for columns in asked.columns)
        how = (source or Source(path=file)).how_to_name(dict.fromkeys(asked.columns[0], "THEIRS"))
        raise InputError(
            f"{file}: format {asked.name} needs the columns {need}, but no row fits; it has {_columns_found(rows)}; "
            f"rename columns, leave the format out to have it detected, or say what they are: {how}"
        )


def _columns_found(rows: Sequence[Columns]) -> str:
    seen = Counter(name for row in rows for name in row)
    names = [name[:40] for name, _ in seen.most_common(12)]
    more = f" and {len(seen) - 12} more" if len(seen) > 12 else ""
    return f"the columns {', '.join(names)}{more}" if names else "rows without columns"


def to_conversation(
    form: Format, row: Columns, origin: Origin, source: str, require_answer: bool = True, check: bool = True
) -> Conversation | Reject:
    """The row as a Conversation, or why it cannot be one.

    Its id is the `id` column (text or a whole number), else FILE-STEM:LINE; it is not yet unique over files.
    Without `check` the order of the turns is taken as it is: whoever asks for that repairs it.
    """
    try:
        return _to_conversation(form, row, origin, source, require_answer, check)
    except UnfitError as error:
        return Reject(origin.file, origin.line, error.field, error.reason)


def _to_conversation(
    form: Format, row: Columns, origin: Origin, source: str, require_answer: bool, check: bool
) -> Conversation:
    _refuse_other_kinds(form, row)
    draft = form.read(row, require_answer)
    used, turns = set(draft.used), draft.turns
    tools: tuple[dict[str, Any], ...] = ()
    if draft.text is None:
        used |= {"system", "tools"}
        turns = _with_system(row.get("system"), turns)
        tools = read_tools(row.get("tools"), "tools")
        if not require_answer:
            turns = without_empty_answer(turns)
        if check:
            check_turns(turns, draft.place, require_answer)
    elif not draft.text.strip():
        raise UnfitError(draft.place, "empty text")
    name = row.get("id")
    if name is None or (isinstance(name, str | int) and not isinstance(name, bool)):
        used.add("id")
    else:
        name = None
    return Conversation(
        id=str(name) if name not in (None, "") else f"{_stem(origin.file)}:{origin.line}",
        origin=origin,
        messages=tuple(turn.message for turn in turns),
        tools=tools,
        text=draft.text,
        source=source,
        meta=_meta({column: value for column, value in row.items() if column not in used}, form),
    )


@lru_cache(maxsize=16)
def _stem(file: str) -> str:
    """The file's name without its suffixes; a byte of it that is no text is shown as one that is missing."""
    path = Path(Path(file).name.encode(errors="replace").decode())
    return path.with_suffix("").stem if path.suffix in PACKED else path.stem


def _refuse_other_kinds(form: Format, row: Columns) -> None:
    """Refuse rows that would train something else than they mean: unwanted answers, text about pictures left out."""
    if form.name != "preference" and row.get("chosen") is not None and row.get("rejected") is not None:
        raise UnfitError("chosen", "is one side of a preference pair; say format: preference to take its chosen answer")
    for column in ("label", "kto_tag") if form.name != "text" else ():
        if row.get(column) is False:
            raise UnfitError(column, "is false: an answer that is not wanted (KTO) is nothing to learn")
    for column in NOT_TEXT:
        if row.get(column):
            raise UnfitError(column, "only text can be trained on; remove the column to train without it")


def _with_system(value: Any, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """A `system` column is the first turn; null and blank text are none."""
    said = "" if value is None else content_text(value, "system")
    if not said.strip():
        return turns
    if turns and turns[0].message.role == "system":
        raise UnfitError("system", f"is a second system text beside {turns[0].place}; keep one")
    return (system("system", said), *turns)


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
    for column in ("messages", *CONVERSATIONS):
        values = row.get(column)
        for value in values if isinstance(values, list) else ():
            if isinstance(value, dict) and not MESSAGE_KEYS.issuperset(value):
                unused.update(value.keys() - MESSAGE_KEYS)
    return unused
