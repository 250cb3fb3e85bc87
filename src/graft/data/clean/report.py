"""What each step did, in counts and examples that do not grow with the data.

Speaks of steps, conversations and excerpts. Reports of batches add up to the same whatever the batches' workers.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from graft.data.clean.step import Drop, Notes, texts
from graft.types import Conversation, Origin

_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\d+(?:\.\d+)?%?")
MAX_KINDS = 200
"""Kinds of reasons and notes that are told apart per step."""
_AROUND = 60
"""Characters that an example shows on either side of the first change."""
SECRET = frozenset({"personal"})
"""Steps whose examples must not repeat what they found: a report is passed around."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A conversation or row that was let go: a line of the rejects file."""

    file: str
    line: int
    step: str
    """The step that dropped it; `read` where the row could not be read at all."""
    field: str
    reason: str


@dataclass(slots=True)
class StepReport:
    """Counts of one step: entered + added = left + dropped."""

    step: str
    entered: int = 0
    changed: int = 0
    """Conversations that left otherwise than they had entered, parts of a cut one counted once."""
    added: int = 0
    """Conversations more than entered, from cutting."""
    dropped: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Drops by kind of reason; numbers and quoted words, which stand as N here, do not tell kinds apart."""
    first: dict[str, str] = field(default_factory=dict)
    """The first reason of each kind, by which people are told what it is."""
    notes: Notes = field(default_factory=Counter)
    changes: list[dict[str, Any]] = field(default_factory=list)
    """The first changes: file, line, field, before, after."""
    drops: list[dict[str, Any]] = field(default_factory=list)
    """The first drops: file, line, field, reason, text."""

    @property
    def left(self) -> int:
        """Conversations that the next step sees."""
        return self.entered + self.added - self.dropped

    def add(self, other: StepReport, examples: int) -> None:
        """Count a later batch's report of the same step in."""
        self.entered += other.entered
        self.changed += other.changed
        self.added += other.added
        self.dropped += other.dropped
        for kind, reason in other.first.items():
            self._count_reason(kind, other.reasons[kind], reason)
        for kind, count in other.notes.items():
            self.notes[_told_apart(kind, self.notes)] += count
        self.changes += other.changes[: examples - len(self.changes)]
        self.drops += other.drops[: examples - len(self.drops)]

    def count_change(self, before: Conversation, after: Conversation, examples: int) -> None:
        """Count a conversation that the step changed."""
        self.changed += 1
        if len(self.changes) < examples:
            shown = _first_change(before, after)
            if self.step in SECRET:
                shown.pop("before", None)
            self.changes.append({"file": before.origin.file, "line": before.origin.line, **shown})

    def count_drop(self, conversation: Conversation, drop: Drop, examples: int) -> Dropped:
        """Count a conversation that the step dropped; the line that says so."""
        self.dropped += 1
        self._count_reason(_VARYING.sub("N", drop.reason), 1, drop.reason)
        origin = conversation.origin
        if len(self.drops) < examples:
            example: dict[str, Any] = {"file": origin.file, "line": origin.line, "field": drop.field}
            example["reason"] = drop.reason
            if self.step not in SECRET:
                example["text"] = _excerpt(_text_of(conversation, drop.field), 0)
            self.drops.append(example)
        return dropped(origin, self.step, drop)

    def _count_reason(self, kind: str, count: int, reason: str) -> None:
        known = _told_apart(kind, self.reasons)
        self.reasons[known] += count
        self.first.setdefault(known, reason if known == kind else known)

    def commonest(self) -> str:
        """The commonest reason in words, by its first example; empty where nothing was dropped."""
        if not self.reasons:
            return ""
        ((kind, count),) = self.reasons.most_common(1)
        reason = self.first[kind]
        if count == 1:
            return reason
        return f"{count} x {reason}" if reason == kind else f"{reason}, and {count - 1} like it"

    def as_json(self) -> dict[str, Any]:
        """Everything, with the commonest reasons first, each kind by its first example."""
        value = asdict(self)
        value["reasons"] = {self.first[kind]: count for kind, count in self.reasons.most_common()}
        del value["first"]
        value["notes"] = dict(sorted((kind, count) for kind, count in self.notes.items() if count))
        return {"step": value.pop("step"), "entered": value.pop("entered"), "left": self.left, **value}


def _told_apart(kind: str, known: Counter[str]) -> str:
    """The kind itself; `others` where there are too many already."""
    return kind if kind in known or len(known) < MAX_KINDS else "others"


def dropped(origin: Origin, step: str, drop: Drop) -> Dropped:
    """The line of the rejects file."""
    return Dropped(origin.file, origin.line, step, drop.field, drop.reason)


def _first_change(before: Conversation, after: Conversation) -> dict[str, Any]:
    """The first text that differs, around its first difference; the roles where turns came or went."""
    old, new = list(texts(before)), list(texts(after))
    if len(old) != len(new):
        return {"field": "messages", "before": _roles(before), "after": _roles(after)}
    for (place, _, one), (_, _, other) in zip(old, new, strict=True):
        if one != other:
            start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
            return {"field": place, "before": _excerpt(one, start), "after": _excerpt(other, start)}
    return {"field": "messages", "before": "arguments of a tool call", "after": "changed"}


def _roles(conversation: Conversation) -> str:
    return " ".join(message.role for message in conversation.messages)


def _excerpt(text: str, start: int) -> str:
    first, last = max(0, start - _AROUND), start + 2 * _AROUND
    return ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")


def _text_of(conversation: Conversation, place: str) -> str:
    """The text of a field; for the whole conversation its last answer."""
    found = {name: text for name, _, text in texts(conversation)}
    return found.get(place) or next((text for text in reversed(found.values()) if text.strip()), "")
