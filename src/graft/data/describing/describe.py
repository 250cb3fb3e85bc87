"""What a set of conversations consists of, told from its text: counted row by row, in memory that hardly grows.

Speaks of conversations, roles, characters and columns. Knows no files and no tokens.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log
from typing import Any

from graft.data.alike.dedup import exact_key
from graft.data.describing.histogram import Spread, spread
from graft.types import ROLES, Conversation

MOST_VALUES = 50
"""A column with more different values is no label."""
MOST_COLUMNS = 100
LONGEST_VALUE = 80
MOST_OPENINGS = 50_000
"""Different first words that are counted at once; beyond it the rarer half is forgotten."""

_WORD = re.compile(r"[^\W\d_]+")
_HAN = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_LEAST_ROWS_OF_TERM = 3
_COMMON_TERM = 0.25
"""A word in more than this share of the prompts is the language's, not a topic's."""


@dataclass(frozen=True, slots=True)
class Role:
    """All messages of one role."""

    messages: int
    characters: int


@dataclass(frozen=True, slots=True)
class Column:
    """A column that no format claimed, or the answer itself."""

    name: str
    rows: int
    """Rows that have it."""
    values: tuple[tuple[str, int], ...]
    """Different values with the rows that have them, commonest first; empty where they are too many."""

    @property
    def balance(self) -> float:
        """Rows of the rarest value per row of the commonest one: 1 is even."""
        return self.values[-1][1] / self.values[0][1] if self.values else 0.0


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Rows that say the same after normalisation."""

    rows: int
    id: str
    """Of the first that repeats an earlier one."""
    place: str


@dataclass(frozen=True, slots=True)
class Description:
    """The text of a set, in numbers."""

    rows: int
    sources: Mapping[str, int]
    """Rows kept of each source."""
    roles: Mapping[str, Role]
    has: Mapping[str, int]
    """Rows with a system turn, tools, reasoning, ...; those that occur."""
    turns: Mapping[int, int]
    """Number of assistant turns -> rows; 0 is raw text."""
    prompt: Spread
    """Characters of all that is no assistant turn, per row."""
    answer: Spread
    """Characters of the assistant turns (raw text: all), per row."""
    characters: int
    labels: tuple[Column, ...]
    """Columns with few different values, and the answers where they are few."""
    columns: tuple[Column, ...]
    """The other columns."""
    openings: tuple[tuple[str, int, str], ...]
    """First word of the first prompt, its rows, what most often follows it."""
    openings_exact: bool
    duplicates: int
    """Rows that repeat an earlier one."""
    duplicate_groups: int
    largest_duplicates: tuple[Duplicate, ...]


class Describer:
    """Counts conversations as they pass by."""

    def __init__(self) -> None:
        self._rows = 0
        self._sources: Counter[str] = Counter()
        self._messages: Counter[str] = Counter()
        self._role_characters: Counter[str] = Counter()
        self._has: Counter[str] = Counter()
        self._turns: Counter[int] = Counter()
        self._prompt, self._answer = array("q"), array("q")
        self._columns: dict[str, _Values] = {}
        self._answers = _Values()
        self._openings: Counter[tuple[str, str]] = Counter()
        self._openings_exact = True
        self._seen: dict[bytes, int] = {}
        """Key of a conversation -> number of the row that had it first."""
        self._repeated: dict[int, list[Any]] = {}
        """First row of a group -> [rows, id and place of the second]: those of every row would fill the memory."""

    def add(self, conversation: Conversation) -> None:
        """Count one more row."""
        prompt = answer = turns = 0
        for message in conversation.messages:
            length = len(message.content) + len(message.reasoning or "")
            self._messages[message.role] += 1
            self._role_characters[message.role] += length
            if message.role == "assistant":
                answer += length
                turns += 1
            else:
                prompt += length
        if conversation.text is not None:
            answer = len(conversation.text)
        self._sources[conversation.source] += 1
        self._prompt.append(prompt)
        self._answer.append(answer)
        self._turns[turns] += 1
        self._has.update(_features(conversation))
        self._add_columns(conversation)
        self._add_opening(conversation)
        self._add_key(conversation)
        self._rows += 1

    def _add_columns(self, conversation: Conversation) -> None:
        for name, value in conversation.meta.items():
            if name in self._columns or len(self._columns) < MOST_COLUMNS:
                self._columns.setdefault(name, _Values()).add(value)
        answers = [message.content for message in conversation.messages if message.role == "assistant"]
        if answers:
            self._answers.add(answers[-1])

    def _add_opening(self, conversation: Conversation) -> None:
        self._openings[opening(first_prompt(conversation))] += 1
        if len(self._openings) > MOST_OPENINGS:
            self._openings = Counter(dict(self._openings.most_common(MOST_OPENINGS // 2)))
            self._openings_exact = False

    def _add_key(self, conversation: Conversation) -> None:
        first = self._seen.setdefault(exact_key(conversation), self._rows)
        if first != self._rows:
            group = self._repeated.setdefault(first, [1, conversation.id, str(conversation.origin)])
            group[0] += 1

    def description(self) -> Description:
        """What was counted."""
        columns = [column.named(name) for name, column in self._columns.items()]
        labels = [column for column in columns if _is_label(column)]
        answers = self._answers.named("(the answer)")
        if _is_label(answers) and answers.rows > 2 * MOST_VALUES:
            labels.append(answers)
        largest = sorted(self._repeated.items(), key=lambda item: (-item[1][0], item[0]))[:5]
        return Description(
            rows=self._rows,
            sources=dict(self._sources),
            roles={
                role: Role(self._messages[role], self._role_characters[role]) for role in ROLES if self._messages[role]
            },
            has={name: count for name, count in self._has.most_common() if count},
            turns=dict(sorted(self._turns.items())),
            prompt=spread(self._prompt),
            answer=spread(self._answer),
            characters=sum(self._prompt) + sum(self._answer),
            labels=tuple(labels),
            columns=tuple(column for column in columns if column not in labels),
            openings=self._commonest_openings(12),
            openings_exact=self._openings_exact,
            duplicates=sum(rows - 1 for rows, _, _ in self._repeated.values()),
            duplicate_groups=len(self._repeated),
            largest_duplicates=tuple(Duplicate(rows, name, place) for _, (rows, name, place) in largest),
        )

    def _commonest_openings(self, most: int) -> tuple[tuple[str, int, str], ...]:
        first: Counter[str] = Counter()
        following: dict[str, tuple[int, str]] = {}
        for (word, after), count in self._openings.items():
            first[word] += count
            if after and count > following.get(word, (0, ""))[0]:
                following[word] = (count, after)
        ranked = sorted(((word, count) for word, count in first.items() if word), key=lambda item: (-item[1], item[0]))
        return tuple((word, count, following.get(word, (0, ""))[1]) for word, count in ranked[:most])


class _Values:
    """The different values of a column, until they are too many for a label."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: Counter[str] | None = Counter()

    def add(self, value: Any) -> None:
        if value is None:
            return
        self.rows += 1
        if self.counts is None:
            return
        if isinstance(value, list | dict | float) or len(text := str(value)) > LONGEST_VALUE:
            self.counts = None
            return
        self.counts[text] += 1
        if len(self.counts) > MOST_VALUES:
            self.counts = None

    def named(self, name: str) -> Column:
        counts: Counter[str] = self.counts or Counter()
        return Column(name, self.rows, tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0]))))


def _is_label(column: Column) -> bool:
    """Two values or more, each met twice on average."""
    return 2 <= len(column.values) <= column.rows / 2


def _features(conversation: Conversation) -> list[str]:
    """What a row has that is worth a count."""
    if conversation.text is not None:
        return ["raw text"]
    messages = conversation.messages
    found = {
        "a system turn": any(m.role == "system" for m in messages),
        "tools": bool(conversation.tools),
        "tool calls": any(m.tool_calls for m in messages),
        "reasoning": any(m.reasoning for m in messages),
        "several answers": sum(m.role == "assistant" for m in messages) > 1,
        "weights of its own": any(m.weight is not None for m in messages),
        "an open question at the end": bool(messages) and messages[-1].role != "assistant",
    }
    return [name for name, there in found.items() if there]


def first_prompt(conversation: Conversation) -> str:
    """The first user turn; raw text itself."""
    if conversation.text is not None:
        return conversation.text
    return next((message.content for message in conversation.messages if message.role == "user"), "")


def opening(text: str) -> tuple[str, str]:
    """The first word and the one after it; of Chinese or Japanese the first two characters and the next two."""
    head = text[:400]
    word = _WORD.search(head)
    if word is None:
        return "", ""
    han = _HAN.match(word[0])
    if han:
        return han[0][:2], han[0][2:4]
    after = _WORD.search(head, word.end())
    return word[0].casefold()[:30], after[0].casefold()[:30] if after else ""


def common_terms(texts: Iterable[str], most: int = 30) -> list[tuple[str, int]]:
    """Words (of Chinese and Japanese: pairs of characters) that tell what texts are about, with how many have them.

    Ranked by n x log(texts / n)^2, which passes over both what is everywhere and what is hardly anywhere.
    """
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        total += 1
        counts.update(_terms(text[:2000]))
    known = [(term, n) for term, n in counts.items() if n >= _LEAST_ROWS_OF_TERM and n <= max(_COMMON_TERM * total, 3)]
    return sorted(known, key=lambda item: (-item[1] * log(total / item[1]) ** 2, item[0]))[:most]


def _terms(text: str) -> set[str]:
    found = {word for word in (match[0].casefold() for match in _WORD.finditer(text)) if 3 < len(word) <= 30}
    found = {word for word in found if not _HAN.search(word)}
    for run in _HAN.findall(text):
        found.update(run[i : i + 2] for i in range(len(run) - 1))
    return found
