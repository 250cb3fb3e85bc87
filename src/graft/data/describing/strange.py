"""Which rows stand out of a set, by stated measures. Speaks of conversations, measures and scores; knows no tokens.

Every measure is a number per row. A row's score under it is the modified z-score of Iglewicz and Hoaglin ("How to
Detect and Handle Outliers", 1993): (value - median) / (1.4826 x median absolute deviation). Where more than half of
the rows are equal, so that the latter is 0, 1.2533 x mean absolute deviation takes its place. Both factors make it
the usual z-score on normal data; a measure's own `unit` is the least divisor. Only the rows with the largest values
are held, so memory grows by 8 bytes a row and measure.
"""

from __future__ import annotations

import heapq
import json
import unicodedata
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from math import log1p

import numpy as np

from graft.types import Conversation

OUTLIER = 3.5
"""Score from which Iglewicz and Hoaglin call a value an outlier."""
SAME_REASON = 3
"""Most rows of a list that are there for one reason, so that one long tail does not fill it."""
HELD = 30
"""Rows held per measure."""
MOST_COMPRESSED = 1 << 16
"""Characters of a text that are compressed."""
LEAST_COMPRESSED = 300
"""A shorter text says nothing by how well it compresses."""

_ODD = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "So", "Sk"))
_SHOWN = 2_000
"""Characters of a turn that are held to be shown."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What is measured, and how a value is told."""

    said: str
    """With `{value}` and `{median}`."""
    unit: float
    """Least deviation that scores 1: where nearly all rows are equal, the next best row is not a wonder yet."""
    logarithmic: bool = False
    """The deviation is taken of log(1 + value): lengths are spread by factors."""
    smallest: bool = False
    """A small value is strange, not a large one."""


MEASURES = {
    "long": Measure("long: {value:,.0f} characters (median {median:,.0f})", 0.1, logarithmic=True),
    "short": Measure(
        "short answer: {value:,.0f} characters (median {median:,.0f})", 0.1, logarithmic=True, smallest=True
    ),
    "turns": Measure("many turns: {value:,.0f} (median {median:,.0f})", 0.1, logarithmic=True),
    "odd": Measure("unusual characters (controls, symbols, private use): {value:.1%} (median {median:.1%})", 0.01),
    "repeats": Measure("repeats itself: compresses {value:.1f} to 1 (median {median:.1f})", 0.05, logarithmic=True),
    "noise": Measure(
        "hardly compresses, as keys and noise do: {value:.1f} to 1 (median {median:.1f})", 0.05, smallest=True
    ),
    "language": Measure("language unclear: confidence {value:.2f} (median {median:.2f})", 0.1, smallest=True),
    "tokens": Measure(
        "foreign to the tokenizer: {value:.2f} tokens per character (median {median:.2f})", 0.05, logarithmic=True
    ),
}


@dataclass(frozen=True, slots=True)
class Shown:
    """A row as a page shows it; long turns are cut."""

    row: int
    """0-based number among the kept rows."""
    id: str
    place: str
    turns: tuple[tuple[str, str, int], ...]
    """Role, beginning of the content, number of characters left out."""


@dataclass(frozen=True, slots=True)
class Strange:
    """A row that stands out, and by what."""

    shown: Shown
    score: float
    reasons: tuple[str, ...]
    """The strongest first."""


@dataclass(slots=True)
class _Held:
    values: array[float] = field(default_factory=lambda: array("d"))
    largest: list[tuple[float, int, Shown]] = field(default_factory=list)
    """A heap of (how large, minus the row's number, the row)."""


class Watch:
    """Takes the measures of rows as they pass by, and names the strangest in the end."""

    def __init__(self) -> None:
        self._held = {name: _Held() for name in MEASURES}

    def add(self, name: str, value: float, row: int, conversation: Conversation) -> None:
        """Take one measure of one row; rows come in their order."""
        held = self._held[name]
        held.values.append(value)
        rank = -value if MEASURES[name].smallest else value
        if len(held.largest) < HELD:
            heapq.heappush(held.largest, (rank, -row, shown(row, conversation)))
        elif rank > held.largest[0][0]:
            heapq.heapreplace(held.largest, (rank, -row, shown(row, conversation)))

    def add_text(self, row: int, conversation: Conversation) -> None:
        """Take the measures that a conversation's text alone gives."""
        texts = texts_of(conversation)
        whole = "".join(texts)
        self.add("long", len(whole), row, conversation)
        self.add("odd", odd_share(whole), row, conversation)
        if conversation.text is None:
            answers = [len(m.content) + 100 * len(m.tool_calls) for m in conversation.messages if m.role == "assistant"]
            if answers:
                self.add("short", min(answers), row, conversation)
            self.add("turns", len(conversation.messages), row, conversation)
        ratio = compression(whole)
        if ratio is not None:
            self.add("repeats", ratio, row, conversation)
            self.add("noise", ratio, row, conversation)

    def strangest(self, most: int) -> list[Strange]:
        """Up to `most` rows with the highest scores above 0, at most SAME_REASON of them for one reason."""
        rows: dict[int, Shown] = {}
        found: dict[int, list[tuple[float, str, str]]] = {}
        for name, held in self._held.items():
            for score, said, row, row_shown in _scores(MEASURES[name], held):
                rows[row] = row_shown
                found.setdefault(row, []).append((score, said, name))
        chosen: list[Strange] = []
        used: Counter[str] = Counter()
        for row, reasons in sorted(found.items(), key=lambda item: (-max(item[1])[0], item[0])):
            reasons.sort(key=lambda reason: -reason[0])
            score, _, name = reasons[0]
            if used[name] == SAME_REASON or len(chosen) == most:
                continue
            used[name] += 1
            strong = [said for value, said, _ in reasons if value >= OUTLIER] or [reasons[0][1]]
            chosen.append(Strange(rows[row], round(score, 1), tuple(strong)))
        return chosen


def _scores(measure: Measure, held: _Held) -> list[tuple[float, str, int, Shown]]:
    """Score, reason, number and text of the rows held under one measure, those above 0."""
    values = np.frombuffer(held.values, dtype=np.float64) if held.values else np.empty(0)
    if not len(values):
        return []
    scaled = np.log1p(values) if measure.logarithmic else values
    middle = float(np.median(scaled))
    deviations = np.abs(scaled - middle)
    unit = max(1.4826 * float(np.median(deviations)) or 1.2533 * float(deviations.mean()), measure.unit)
    found = []
    for rank, minus_row, row_shown in held.largest:
        value = -rank if measure.smallest else rank
        away = (log1p(value) if measure.logarithmic else value) - middle
        score = (-away if measure.smallest else away) / unit
        if score > 0:
            said = measure.said.format(value=value, median=float(np.median(values)))
            found.append((score, said, -minus_row, row_shown))
    return found


def texts_of(conversation: Conversation) -> list[str]:
    """Every text of a conversation, in order."""
    if conversation.text is not None:
        return [conversation.text]
    return [text for m in conversation.messages for text in (m.reasoning or "", m.content) if text]


def shown(row: int, conversation: Conversation) -> Shown:
    """The beginning of each of its turns, fewer characters of each where there are many."""
    turns = []
    if conversation.text is not None:
        turns.append(_cut("text", conversation.text))
    for message in conversation.messages:
        if message.reasoning:
            turns.append(_cut(f"{message.role}, reasoning", message.reasoning))
        if message.content or not message.tool_calls:
            turns.append(_cut(message.role, message.content))
        calls = (dict(call.get("function") or call) for call in message.tool_calls)
        turns += [_cut(f"{message.role}, tool call", json.dumps(call, ensure_ascii=False)) for call in calls]
    return Shown(row, conversation.id, str(conversation.origin), tuple(turns))


def _cut(role: str, text: str) -> tuple[str, str, int]:
    return role, text[:_SHOWN], max(0, len(text) - _SHOWN)


def odd_share(text: str) -> float:
    """Share of characters that running text seldom has: controls, symbols, private use, replacements."""
    if not text:
        return 0.0
    odd = sum(count for char, count in Counter(text).items() if _is_odd(char))
    return odd / len(text)


@cache
def _is_odd(char: str) -> bool:
    return char not in "\t\n\r" and (char == "\ufffd" or unicodedata.category(char) in _ODD)


def compression(text: str) -> float | None:
    """How many times smaller zlib makes a text; None where it is too short to say."""
    if len(text) < LEAST_COMPRESSED:
        return None
    raw = text[:MOST_COMPRESSED].encode("utf-8", "surrogatepass")
    return len(raw) / len(zlib.compress(raw, 1))
