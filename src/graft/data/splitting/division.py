"""What is asked of a split, and what came of it: counts, decisions and notes.

Speaks of rows, groups, parts and overlaps. Reads and writes no file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from graft.data.alike.dedup import NEAR
from graft.data.splitting.divide import PARTS, TRAIN, Codes
from graft.data.splitting.grouping import Grouped, Grouping
from graft.data.splitting.strata import Columns, Strata, missing_column
from graft.data.tally import Tally
from graft.errors import ConfigError, DataRefused, InputError
from graft.words import counted

LARGE_GROUP = 0.1
"""Share of the rows from which a single group is worth a warning: it goes to one part as a whole."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """How files are to be divided."""

    val: float = 0.05
    """Share of the rows below 1; a count of rows from 1 on."""
    test: float = 0.05
    group: str = "near"
    """exact, near, none, or a column."""
    stratify: str = "auto"
    """auto, none, file, or a column."""
    near: float = NEAR
    """Jaccard similarity from which texts are near, in groups and in overlaps."""
    against: tuple[str, ...] = ()
    """Evaluation files."""
    drop: bool = True
    """Whether rows that overlap an evaluation file are dropped; otherwise they are listed."""
    gram_share: float = 0.0
    """Least share of an evaluation row's 13-grams that counts as an overlap; 0: any one 13-gram."""
    check: bool = False
    """Whether to look for overlaps of the training part with the held-out parts."""
    max_rejected: float = 0.01
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes of parts that mean nothing.

        Raises:
            ConfigError: a count that is no whole number, or shares that leave nothing.
        """
        for name, wish in (("val", self.val), ("test", self.test)):
            if wish >= 1 and not float(wish).is_integer():
                raise ConfigError(f"--{name} {wish:g}: a share is below 1, a count of rows is a whole number")
        if self.val < 1 and self.test < 1 and self.val + self.test >= 1:
            raise ConfigError(
                f"--val {self.val:g} + --test {self.test:g} leave nothing to train on; make their sum less than 1"
            )


@dataclass(slots=True)
class Outcome:
    """What became of the rows: tally.read == sum(rows) + tally.rejected + dropped."""

    tally: Tally
    dropped: int = 0
    """Rows left out because they overlap an evaluation file."""
    decisions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)
    """Rows of each file that was written."""
    rows: dict[str, int] = field(default_factory=dict)
    """Rows of each part."""
    groups: dict[str, int] = field(default_factory=dict)
    """Groups of each part."""
    largest_group: int = 0
    stratum: str | None = None
    strata: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows of each value of the stratum, by part."""
    same_prompt: int = 0
    """Held-out rows whose normalised first prompt is in another part too."""
    against: Counter[str] = field(default_factory=Counter)
    """Rows that overlap an evaluation file, by kind."""
    evaluation_rows: int = 0
    parts_overlap: Counter[str] | None = None
    """Training rows that overlap a held-out part, by kind; None where that was not looked for."""


def refuse_nothing(count: int, outcome: Outcome, wanted: Wanted) -> None:
    """Stop where `count` rows leave nothing to train on.

    Raises:
        ConfigError: more rows are wanted than there are.
        DataRefused: every row overlaps an evaluation file.
    """
    if not count:
        raise DataRefused(
            f"all {outcome.dropped} rows overlap {', '.join(wanted.against)} (see rejects.jsonl); "
            "is it a copy of the data? To keep the rows: --against-action report"
        )
    held_out = sum(wish if wish >= 1 else wish * count for wish in (wanted.val, wanted.test))
    if held_out >= count:
        raise ConfigError(
            f"--val {wanted.val:g} + --test {wanted.test:g} of {count} rows leave nothing to train on; "
            "make their sum less than that"
        )


def describe(outcome: Outcome, grouped: Grouped, strata: Strata | None, parts: Codes) -> None:
    """Count rows, groups, strata and shared prompts of the parts."""
    first, sizes = np.unique(grouped.groups, return_counts=True)
    outcome.largest_group = int(sizes.max())
    outcome.rows = _by_part(np.bincount(parts, minlength=len(PARTS)).tolist())
    outcome.groups = _by_part(np.bincount(parts[first], minlength=len(PARTS)).tolist())
    _, prompt = np.unique(grouped.prompts, return_inverse=True)
    met = np.zeros((len(PARTS), int(prompt.max()) + 1), np.bool_)  # [part, prompt]
    met[parts, prompt] = True
    outcome.same_prompt = int(np.count_nonzero((met.sum(axis=0) > 1)[prompt] & (parts != TRAIN)))
    if strata is not None:
        outcome.stratum = strata.column
        cells = np.bincount(np.asarray(strata.codes) * len(PARTS) + parts, minlength=len(strata.names) * len(PARTS))
        for name, counts in zip(strata.names, cells.reshape(-1, len(PARTS)).tolist(), strict=True):
            outcome.strata[name] = _by_part(counts)


def _by_part(counts: list[int]) -> dict[str, int]:
    return dict(zip(PARTS, counts, strict=True))


def said_of_groups(grouping: Grouping, columns: Columns, outcome: Outcome, count: int) -> str:
    """How rows were grouped.

    Raises:
        InputError: the column that was asked for is in no row.
    """
    if grouping.without_value == count:
        raise InputError(missing_column("--group", grouping.how, ["exact", "near", "none", *columns.met]))
    how = {
        "exact": "rows of one first prompt, normalised",
        "near": "rows of one first prompt, and near-duplicates of a prompt or of a whole conversation",
        "none": "every row by itself",
    }.get(grouping.how, f"rows of one {grouping.how}")
    missing = f" ({grouping.without_value} rows without one by their prompt)" if grouping.without_value else ""
    return (
        f"grouped by {grouping.how}: {sum(outcome.groups.values())} groups of {counted(count, 'row')}: {how}{missing}"
    )


def notes_on(outcome: Outcome, wanted: Wanted, count: int) -> list[str]:
    """What may not be as the user meant it."""
    notes = []
    for name, wish in (("val", wanted.val), ("test", wanted.test)):
        if wish > 0 and not outcome.rows[name]:
            asked = f"{wish:.1%} of {count} rows" if wish < 1 else f"{wish:g} rows"
            notes.append(f"the {name} part is empty: {asked} met no whole group; raise it or add rows")
        elif wish >= 1 and outcome.rows[name] < wish:
            notes.append(f"the {name} part has {outcome.rows[name]} rows of {wish:g}: no group was small enough")
    if outcome.largest_group > max(LARGE_GROUP * count, 10):
        notes.append(
            f"the largest group has {outcome.largest_group} of {count} rows, which go one way together; "
            "raise --near, or try --group exact"
        )
    if outcome.same_prompt:
        notes.append(f"{outcome.same_prompt} held-out rows have a first prompt that another part has too")
    return notes
