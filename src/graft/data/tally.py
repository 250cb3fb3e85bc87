"""Counts of what became of the rows of a stream: kept + rejected = read, and why.

Speaks of rejects and shares. Its size does not grow with the number of rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

from graft.errors import DataRefused
from graft.types import Reject
from graft.words import counted, one_or_many

MAX_KINDS = 1000
"""Kinds of reasons that are told apart; a file of pure noise must not fill the memory with its reasons."""
_NUMBER = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(slots=True)
class PartTally:
    """What one file, or all text files of a folder, or one split of a data set has given."""

    name: str
    format: str
    kept: int = 0
    rejected: int = 0

    @property
    def read(self) -> int:
        return self.kept + self.rejected


@dataclass(slots=True)
class Tally:
    """What a stream has given so far."""

    kept: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """How often each kind of reason occurred; reasons that differ in numbers only are one kind."""
    first: dict[str, Reject] = field(default_factory=dict)
    """The first reject of each kind."""
    decisions: list[str] = field(default_factory=list)
    """One sentence per decision taken, such as `a.json: alpaca: 1666 of 1666 rows have instruction, output`."""

    parts: list[PartTally] = field(default_factory=list)
    """The same counts file by file; the last one is that being read."""

    @property
    def read(self) -> int:
        """Rows read; blank lines are no rows."""
        return self.kept + self.rejected

    def keep(self) -> None:
        """Count a row that was kept."""
        self.kept += 1
        if self.parts:
            self.parts[-1].kept += 1

    def reject(self, reject: Reject) -> None:
        """Count a row that was rejected."""
        self.rejected += 1
        if self.parts:
            self.parts[-1].rejected += 1
        kind = _NUMBER.sub("N", reject.reason)
        if kind not in self.first:
            if len(self.first) >= MAX_KINDS:
                kind = "another reason"
            self.first.setdefault(kind, reject)
        self.reasons[kind] += 1

    def commonest(self, most: int = 3) -> list[tuple[int, Reject]]:
        """How often each kind of reason occurs, commonest first, each with its first reject."""
        return [(count, self.first[kind]) for kind, count in self.reasons.most_common(most)]

    def refuse_if_too_many(self, limit: float) -> None:
        """Stop when more than `limit` (a share) of the rows read were rejected, or all of them.

        Raises:
            DataRefused: with both numbers, the three commonest reasons with an example place each, and the next step.
        """
        if not self.rejected or (self.rejected <= limit * self.read and self.kept):
            return
        share = self.rejected / self.read
        of = f"{self.rejected} of {counted(self.read, 'row')} ({share:.1%}) {one_or_many(self.rejected, 'was', 'were')}"
        lines = [f"{of} rejected, max_rejected allows {limit:.1%}"]
        for count, reject in self.commonest():
            name = f"{reject.field}: " if reject.field else ""
            lines.append(f"  {count} x {name}{reject.reason}  (first at {reject.file}:{reject.line})")
        if not self.kept:
            lines.append("nothing is left; correct the rows, or see docs/data.md for the formats")
        else:
            enough = math.ceil(share * 1000) / 1000
            how = f"max_rejected={enough:g} (--max-rejected {enough:g} for graft data)"
            lines.append(f"correct the rows, or go on without them: {how}")
        raise DataRefused("\n".join(lines))
