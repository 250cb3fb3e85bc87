"""The columns by which a split can be stratified, gathered row by row, and which of them is taken.

Speaks of columns and their values. Knows no groups and no parts.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

from graft.config.base import did_you_mean
from graft.errors import InputError
from graft.types import Conversation

LABELS = ("label", "labels", "class", "category", "intent", "topic", "task", "source", "dataset")
"""Columns that `auto` regards, in this order."""
FILE = "file"
"""What stands for the file that a row came from."""
MOST_VALUES = 1000
"""A column of more values than this divides nothing; `auto` forgets it."""
ROWS_PER_VALUE = 10
"""Rows that a value of a column must have on average for `auto` to take it."""


@dataclass(frozen=True, slots=True)
class Strata:
    """One column's values over all rows."""

    column: str
    names: list[str]
    codes: array[int]
    """[n] index in `names` of each row's value."""


class Columns:
    """The values of the columns that may be asked for, as they come."""

    def __init__(self, wanted: str) -> None:
        """`wanted` is a column, `file`, `auto` or `none`."""
        self._wanted = wanted
        names = {"auto": (*LABELS, FILE), "none": ()}.get(wanted, (wanted,))
        self._codes = {name: array("i") for name in names}
        self._values: dict[str, dict[str, int]] = {name: {} for name in names}
        self._missing: Counter[str] = Counter()
        self._rows = 0
        self.met: dict[str, None] = {}
        """Columns met, in order of first appearance; the first MOST_VALUES of them."""

    def add(self, conversation: Conversation) -> None:
        """Take note of one row."""
        self._rows += 1
        if len(self.met) < MOST_VALUES:
            self.met.update(dict.fromkeys(conversation.meta))
        for name in list(self._codes):
            value = value_of(conversation, name)
            if value is None:
                self._missing[name] += 1
                value = ""
            values = self._values[name]
            self._codes[name].append(values.setdefault(value, len(values)))
            if self._wanted == "auto" and len(values) > MOST_VALUES:
                del self._codes[name], self._values[name]

    def choose(self) -> tuple[Strata | None, str]:
        """The strata to keep and a sentence on why.

        Raises:
            InputError: the column that was asked for is in no row.
        """
        if self._wanted == "none":
            return None, "not stratified, as asked"
        if self._wanted == "auto":
            name = next((name for name in self._codes if self._serves(name)), None)
            if name is None:
                return None, "not stratified: no label column of few values, and one file"
        else:
            name = self._wanted
            if self._missing[name] == self._rows:
                raise InputError(missing_column("--stratify", name, [*self.met, FILE]))
        strata = self._in_order(name)
        missing = f", {self._missing[name]} rows without one" if self._missing[name] else ""
        values = "1 value" if len(strata.names) == 1 else f"{len(strata.names)} values"
        return strata, f"stratified by {name}: {values}{missing}"

    def _serves(self, name: str) -> bool:
        """Most rows have a value, there are several, and each has enough rows to be divided."""
        different = len(self._values[name])
        return different > 1 and self._rows >= ROWS_PER_VALUE * different and self._missing[name] < self._rows / 2

    def _in_order(self, name: str) -> Strata:
        """Values by name, so that the order of the rows does not matter."""
        values = self._values[name]
        names = sorted(values)
        place = {values[value]: index for index, value in enumerate(names)}
        return Strata(name, names, array("i", (place[code] for code in self._codes[name])))


def value_of(conversation: Conversation, column: str) -> str | None:
    """The value of a column as text; None where the row has none. `file` is the row's file, if it is no column."""
    value: Any = conversation.meta.get(column)
    if value is None and column == FILE:
        value = conversation.source
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def missing_column(option: str, name: str, known: list[str]) -> str:
    """What to say of a column that no row has."""
    known = [column for column in known if column != name]
    shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    return f"{option} {name}: no row has a value in such a column{did_you_mean(name, known)}; known are {shown}"
