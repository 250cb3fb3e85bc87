"""Rows of labelled sets: read from files, their columns sorted into roles.

Speaks of files, columns, roles and labels. Knows no templates.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from graft.config.prompts import Prompts
from graft.data.layout.choose import NotRowsError, is_description, refuse_unreadable
from graft.data.prompts.columns import Assigned, any_role, as_json, assign, find_column, first_answer, json_answer
from graft.data.prompts.columns import role_value as text_of_role
from graft.data.prompts.headerless import read_headerless
from graft.data.prompts.labels import label_key
from graft.data.prompts.languages import NAMES, language_name
from graft.data.prompts.tasks import LABEL, Role, Task
from graft.data.reading.read import open_address
from graft.data.reading.rows import Raw, file_of
from graft.data.splitting.split import Part, part_of
from graft.data.values import UnfitError, kind
from graft.errors import InputError
from graft.types import Conversation, Message, Origin, Reject

SAMPLE_ROWS = 100
"""Readable rows at the beginning of a part that decide its columns."""
_PARTS: dict[str, Part] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
_LANGUAGES = ("source_language", "target_language")


@dataclass(frozen=True, slots=True)
class Labelled:
    """One row, ready for a template."""

    origin: Origin
    id: str
    values: Mapping[str, Any]
    """What templates see: roles and their texts; for templates that name columns, the columns as they are."""
    label: str | None
    """The value of the label column, not yet its name; None where there is no such column."""
    key: bytes
    """Digest of what is asked about: rows that differ in nothing but their answers have the same."""
    part: Part
    rest: Mapping[str, Any]
    """Columns without a role."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How the rows of one part of the data are read."""

    task: Task
    columns: Assigned
    by_column: bool
    """Templates name columns: values keep their types."""
    answered: bool
    numbers: frozenset[str]
    """Columns of whole numbers written as text, as csv has them; for templates that name columns."""
    part_column: str | None
    constants: Mapping[str, str]

    def read(self, raw: Raw, name: str, val: float, test: float) -> Labelled | Reject:
        """The row, or why it cannot be asked about. `name` stands before the line in its id."""
        if isinstance(raw.value, Reject):
            return raw.value
        row = _flat(raw.value)
        try:
            values = self._by_column(row) if self.by_column else self._by_role(row)
        except UnfitError as error:
            return Reject(raw.origin.file, raw.origin.line, error.field, error.reason)
        label = None
        if self.answered and LABEL in self.columns:
            label = label_key(row.get(self.columns[LABEL][0]) if row.get(self.columns[LABEL][0]) is not None else "")
        asked = {name: value for name, value in values.items() if name not in (self.task.answer, LABEL)}
        used = {column for columns in self.columns.values() for column in columns} | {self.part_column, "id"}
        return Labelled(
            raw.origin,
            _row_id(row, f"{name}:{raw.origin.line}"),
            values,
            label,
            hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).digest(),
            self._part(row, asked, val, test),
            {} if self.by_column else {column: value for column, value in row.items() if column not in used},
        )

    def _by_role(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {
            role.name: "" for role in self.task.roles if not role.needed and role.name not in _LANGUAGES
        }
        for role, columns in self.columns.items():
            if role == self.task.answer and not self.answered:
                continue
            if role == LABEL:
                if isinstance(row.get(columns[0]), list | Mapping):
                    raise UnfitError(columns[0], f"is {kind(row[columns[0]])}, not one label")
                if row.get(columns[0]) is None or not label_key(row[columns[0]]):
                    raise UnfitError(columns[0], "is empty; it is the label")
            elif role == self.task.answer and self.task.name == "extraction":
                answer = json_answer(row, columns)
                values[role] = as_json(answer)
                if isinstance(answer, Mapping):
                    values["fields"] = list(answer)
            else:
                given = (
                    {column: first_answer(row.get(column)) for column in columns} if role == self.task.answer else row
                )
                needed = next((item.needed for item in self.task.roles if item.name == role), True)
                if needed or any(given.get(column) not in (None, "") for column in columns):
                    values[role] = text_of_role(given, role, columns)
        return {**values, **self.constants}

    def _by_column(self, row: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(row)
        for name in self.numbers:
            if isinstance(row.get(name), str) and _WHOLE.fullmatch(row[name].strip()):
                values[name] = int(row[name])
        for role, columns in self.columns.items():
            values[role] = values.get(columns[0]) if len(columns) == 1 else text_of_role(row, role, columns)
        return values

    def _part(self, row: Mapping[str, Any], asked: Mapping[str, Any], val: float, test: float) -> Part:
        """As the set's own column says, else by a hash of what is asked about, as `graft data split` does it."""
        if self.part_column is not None:
            return _PARTS.get(str(row.get(self.part_column)).strip().casefold(), "train")
        if not val + test:
            return "train"
        text = "\n".join(value for value in asked.values() if isinstance(value, str))
        return part_of(Conversation("", Origin("", 0), (Message("user", text),)), val, test)


_WHOLE = re.compile(r"-?\d{1,9}")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row, with a `translation` object of two languages spread into two columns."""
    inner = row.get("translation")
    if isinstance(inner, Mapping) and len(inner) == 2 and all(isinstance(text, str) for text in inner.values()):
        return {column: value for column, value in row.items() if column != "translation"} | dict(inner)
    return row


def _row_id(row: Mapping[str, Any], place: str) -> str:
    name = row.get("id")
    return place if name in (None, "") or not isinstance(name, str | int) or isinstance(name, bool) else str(name)


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of the data, a file mostly, with how it is read."""

    name: str
    shape: Shape
    _address: str
    _number: int
    _header: tuple[str, ...]
    _stem: str

    def rows(self, val: float, test: float) -> Iterator[Labelled | Reject]:
        """Every row in order; may be asked for again."""
        for raw in _raw_rows(self._address, self._number, self._header):
            yield self.shape.read(raw, self._stem, val, test)


@dataclass(frozen=True, slots=True)
class Opened:
    """What the addresses name."""

    pieces: list[Piece]
    decisions: list[str]


def open_labelled(
    addresses: Sequence[str], task: Task, settings: Prompts, by_column: bool = False, answered: bool = True
) -> Opened:
    """The parts of the data, each with its columns sorted into roles by its first rows.

    Raises:
        InputError: a file cannot be read, is named twice, or lacks a column that the task needs.
        ConfigError: `columns` names a role that the task does not have.
    """
    pieces: list[Piece] = []
    decisions: list[str] = []
    seen: set[str] = set()
    stems: Counter[str] = Counter()
    for address in addresses:
        for number, (name, files, among_others) in enumerate(_parts(address, settings.header)):
            if seen.intersection(files):
                raise InputError(f"{name}: named twice; name every file once")
            seen.update(files)
            try:
                rows = _raw_rows(address, number, settings.header)
                shape, said = _shape_of(name, rows, task, settings, by_column, answered)
            except NotRowsError as error:
                if not among_others:
                    raise
                decisions.append(f"{name}: passed over, it holds no rows of data ({error.why})")
                continue
            decisions += said
            stem = Path(name).stem or name
            stems[stem] += 1
            stem = stem if stems[stem] == 1 else f"{stem}#{stems[stem]}"
            pieces.append(Piece(name, shape, address, number, settings.header, stem))
    if not pieces:
        raise InputError(f"{', '.join(addresses)}: no file there holds rows of data")
    return Opened(pieces, decisions)


def _parts(address: str, header: tuple[str, ...]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Name and files of each part of an address, and whether it is one of several in a folder."""
    if header:
        return [(address, (str(Path(address).resolve()),), False)]
    return [(part.name, part.files, part.among_others) for part in open_address(address).parts]


def _raw_rows(address: str, number: int, header: tuple[str, ...]) -> Iterator[Raw]:
    if header:
        return read_headerless(file_of(Path(address)), header)
    return open_address(address).parts[number].rows()


def _shape_of(
    name: str, rows: Iterator[Raw], task: Task, settings: Prompts, by_column: bool, answered: bool
) -> tuple[Shape, list[str]]:
    """How a part is read, by its first rows, and the decisions in words.

    Raises:
        NotRowsError: it holds no rows, but a description of some.
        InputError: not one of them can be read, or a column is missing.
    """
    head = list(islice(rows, SAMPLE_ROWS))
    sample = [_flat(raw.value) for raw in head if not isinstance(raw.value, Reject)]
    if not sample:
        refuse_unreadable(name, head)
    why_not = f"one object with {', '.join([*sample[0]][:6])}"
    fits = not {role.name for role in task.roles}.isdisjoint(sample[0])
    if by_column and not fits and is_description(name, head, sample):
        raise NotRowsError(f"{name}: has none of the columns that the templates name", why_not)
    try:
        return _shape(name, sample, task, settings, by_column, answered)
    except InputError as error:
        if is_description(name, head, sample):
            raise NotRowsError(str(error), why_not) from None
        raise


def _shape(
    name: str, sample: list[dict[str, Any]], task: Task, settings: Prompts, by_column: bool, answered: bool
) -> tuple[Shape, list[str]]:
    found = list(dict.fromkeys(column for row in sample for column in row))
    roles = [role for role in task.roles if answered or role.name != task.answer]
    numbers: frozenset[str] = frozenset()
    constants: dict[str, str] = {}
    if by_column:
        missing = [role.name for role in task.roles if role.name not in found and role.name not in settings.columns]
        known = [role for role in map(any_role, missing) if role.aliases]
        given_roles = [Role(given, (), needed=False) for given in settings.columns]
        columns = assign([*given_roles, *known], found, settings.columns, name)
        if LABEL in found and any(role.name == LABEL for role in task.roles):
            columns.setdefault(LABEL, (LABEL,))
        numbers = frozenset(column for column in found if _is_whole(sample, column))
    elif task.name == "translation":
        columns, constants = _translation(roles, found, settings, name)
    else:
        columns = assign(roles, found, settings.columns, name)
    part_column = _part_column(sample, found, {column for used in columns.values() for column in used})
    decisions = []
    if columns:
        said = ", ".join(f"{role} = {' + '.join(of)}" for role, of in columns.items())
        decisions.append(f"{name}: {said}")
    if part_column:
        decisions.append(f"{name}: `{part_column}` says which rows are held out")
    if numbers:
        decisions.append(f"{name}: text read as whole numbers: {', '.join(sorted(numbers))}")
    return Shape(task, columns, by_column, answered, numbers, part_column, constants), decisions


def _is_whole(sample: Sequence[Mapping[str, Any]], column: str) -> bool:
    values = [row[column] for row in sample if row.get(column) not in (None, "")]
    return bool(values) and all(isinstance(value, str) and _WHOLE.fullmatch(value.strip()) for value in values)


def _part_column(sample: Sequence[Mapping[str, Any]], found: Sequence[str], taken: set[str]) -> str | None:
    column = find_column(("split", "part"), found, taken)
    if column is None or any(str(row.get(column)).strip().casefold() not in _PARTS for row in sample):
        return None
    return column


def _translation(
    roles: Sequence[Role], found: Sequence[str], settings: Prompts, name: str
) -> tuple[Assigned, dict[str, str]]:
    """Columns and languages of a translation set: columns may be called by their languages, as `de` and `en`."""
    given = dict(settings.columns)
    codes = [column for column in found if column.lower() in NAMES]
    languages = settings.languages.split("-") if settings.languages else []
    if not languages and len(codes) == 2 and not {"source", "target"} & given.keys():
        languages = codes
    if len(languages) == 2 and set(languages) <= set(found):
        given = {"source": languages[0], "target": languages[1]} | given
    wanted = [role for role in roles if role.name in {"source", "target"} | (set() if languages else set(_LANGUAGES))]
    asked = {role: column for role, column in given.items() if role in {item.name for item in roles}}
    columns = assign(
        [*wanted, *(role for role in roles if role.name in asked and role not in wanted)], found, asked, name
    )
    if languages:
        return columns, {
            role: language_name(code, settings.lang) for role, code in zip(_LANGUAGES, languages, strict=True)
        }
    if not set(_LANGUAGES) <= columns.keys():
        raise InputError(f"{name}: nothing says which languages these are; say it, for example --languages de-en")
    return columns, {}
