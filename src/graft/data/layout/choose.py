"""What the rows of a file are: their format and what their columns are called, from the first of them.

Speaks of samples, columns and formats. Every choice is said, and what could be two things is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from graft.config.base import did_you_mean
from graft.config.data import Source
from graft.data.layout.columns import infer_columns, rename, said, side_columns
from graft.data.layout.formats import FORMATS, Format, check_asked, detect
from graft.data.reading.rows import Raw, file_of
from graft.errors import InputError
from graft.types import Reject
from graft.words import counted

SAMPLE_ROWS = 100
"""Readable rows at the beginning of a file that decide its format."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How a file is read."""

    form: Format
    columns: Mapping[str, str]
    """Ours: theirs, where they differ."""
    rows: Iterator[Raw]
    """All rows, those of the sample too."""
    notes: list[str] = field(default_factory=list)

    def in_our_words(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with our column names."""
        return rename(row, self.columns) if self.columns else row

    def in_their_words(self, reject: Reject) -> Reject:
        """The reject with the column's name as the file has it."""
        name = re.match(r"\w*", reject.field)
        if not name or name[0] not in self.columns:
            return reject
        return replace(reject, field=self.columns[name[0]] + reject.field[name.end() :])


class NotRowsError(InputError):
    """A .json file that describes data rather than holds them: among other files it is passed over."""

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


def choose(name: str, source: Source, rows: Iterator[Raw], required: bool = True) -> Choice:
    """The format and the columns of a file called `name`.

    Raises:
        InputError: none of the first rows can be read, no format fits them, a column that was named is not there, or
            two columns could be the same thing.
        NotRowsError: what it holds are no rows.
    """
    head, sample = _sample(name, rows)
    try:
        return _choose(name, source, head, sample, rows, required)
    except InputError as error:
        if is_description(name, head, sample):
            raise NotRowsError(str(error), f"one object with {', '.join([*sample[0]][:6])}") from None
        raise


def is_description(name: str, head: Sequence[Raw], sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a file that fits nothing may be a description beside data: .json, and a single object."""
    return file_of(Path(name)).suffix == ".json" and len(head) == len(sample) == 1


def _choose(
    name: str, source: Source, head: list[Raw], sample: list[dict[str, Any]], rows: Iterator[Raw], required: bool
) -> Choice:
    columns = {ours: theirs for ours, theirs in source.columns.items() if ours != theirs}
    _check_columns(name, columns, sample)
    how = "as asked"
    named = [rename(row, columns) for row in sample] if columns else sample
    asked = FORMATS.get(source.format)
    forms = [asked] if asked else list(FORMATS.values())
    if not any(form.fit(row, not asked, required) for row in named for form in forms):
        found = infer_columns(_filled(named), name, source)
        columns |= {ours: columns.get(theirs, theirs) for ours, theirs in found.items() if ours != theirs}
        how = "by their names" if found else how
    sides = side_columns(_filled(named))
    columns |= {ours: theirs for ours, theirs in sides.items() if ours not in columns}
    named = [rename(row, columns) for row in sample] if columns else sample
    if asked:
        check_asked(asked, named, name, required, source)
    form = asked or detect(named, name, required, source)
    if form.name == "text" and not asked:
        for raw in head:
            _refuse_table(raw, source)
    notes = [f"{name}: columns read ({how}) as {said(columns)}"] if columns else []
    return Choice(form, columns, chain(head, rows), notes)


def _sample(name: str, rows: Iterator[Raw]) -> tuple[list[Raw], list[dict[str, Any]]]:
    """The first rows up to SAMPLE_ROWS readable ones, and these."""
    head: list[Raw] = []
    sample: list[dict[str, Any]] = []
    for raw in rows:
        head.append(raw)
        if not isinstance(raw.value, Reject):
            sample.append(raw.value)
        if len(sample) == SAMPLE_ROWS:
            break
    if not sample:
        refuse_unreadable(name, head)
    return head, sample


def refuse_unreadable(name: str, head: Sequence[Raw]) -> NoReturn:
    """Stop at a file of whose first rows not one can be read.

    Raises:
        NotRowsError: they are elements of a .json list without columns.
        InputError: otherwise.
    """
    rejects = [raw.value for raw in head if isinstance(raw.value, Reject)]
    first = rejects[0]
    said = (
        f"{name}: none of its {counted(len(head), 'row')} can be read; the first, line {first.line}: "
        f"{first.field + ': ' if first.field else ''}{first.reason}"
    )
    if file_of(Path(name)).suffix == ".json" and not any(reject.field for reject in rejects):
        raise NotRowsError(said, first.reason)
    raise InputError(said)


def _filled(rows: list[dict[str, Any]]) -> list[str]:
    """Columns that have a value somewhere, in order of first appearance."""
    return list({name: None for row in rows for name, value in row.items() if value not in (None, "")})


def _check_columns(name: str, columns: Mapping[str, str], sample: list[dict[str, Any]]) -> None:
    present = list({column: None for row in sample for column in row})
    for ours, theirs in columns.items():
        if theirs not in present:
            raise InputError(
                f"{name}: `columns` reads {ours} from `{theirs}`, but there is no such column"
                f"{did_you_mean(theirs, present)}; there are {', '.join(present[:20])}"
            )


TABLE_LINES = 10
"""A text whose lines, at least so many, all have the same number of tabs is a table."""


def _refuse_table(raw: Raw, source: Source) -> None:
    """Refuse a text file that is a table by another name: its labels are not to be learnt by heart.

    Raises:
        InputError: it is one.
    """
    text = raw.value.get("text") if isinstance(raw.value, dict) else None
    if not isinstance(text, str) or "\t" not in text or file_of(Path(raw.origin.file)).suffix != ".txt":
        return
    lines = [line for line in text.split("\n") if line.strip()]
    cells = {line.count("\t") + 1 for line in lines}
    if len(lines) >= TABLE_LINES and len(cells) == 1:
        raise InputError(
            f"{raw.origin.file}: has {len(lines)} lines of {cells.pop()} cells each, it is a table: rename it to "
            f"{Path(raw.origin.file).with_suffix('.tsv').name} (a labelled set becomes conversations with "
            f"`graft data prompts`), or say {source.how_to_ask_for('text')} to learn it by heart"
        )
