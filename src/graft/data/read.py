"""Files of rows: jsonl, json, csv, tsv and parquet, one row after the other, each with its place.

Speaks of files, lines and rows. Knows no format: a row is a mapping from column names to values.
A row that cannot be read is a Reject and the others go on; a file that cannot be read is an InputError.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.values import UnfitError, kind, parse_json, tidy
from graft.errors import InputError
from graft.types import Origin, Reject

BOM = b"\xef\xbb\xbf"
WRAPPERS = ("data", "train", "rows")
"""Keys under which a json file that is one object may hold its list of rows."""


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as its file has it."""

    origin: Origin
    value: dict[str, Any] | Reject
    """Columns and their values, or why the row could not be read."""


def read_rows(path: Path) -> Iterator[Raw]:
    """The rows of a file in order, by its suffix: .jsonl .ndjson .json .csv .tsv .parquet.

    A byte-order mark and blank lines are passed over. A .json file may be a list of objects, jsonl by another name,
    or one object that holds the list under one of WRAPPERS.

    Raises:
        InputError: no such file, a folder, unreadable, an unknown suffix, UTF-16, broken as a whole, or no rows.
    """
    reader = READERS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise InputError(_folder_message(path))
        if not path.exists():
            raise InputError(_missing_message(path))
        if reader is None:
            raise InputError(
                f"{path}: unknown suffix `{path.suffix}`; graft reads {' '.join(READERS)}: convert or rename the file"
            )
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if start in (b"\xff\xfe", b"\xfe\xff") and path.suffix.lower() != ".parquet":
        raise InputError(f"{path}: is UTF-16 text; save it as UTF-8, for example: iconv -f UTF-16 -t UTF-8")
    return _not_empty(path, reader(path))


def _not_empty(path: Path, rows: Iterator[Raw]) -> Iterator[Raw]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InputError(f"{path}: is empty, it has no rows ({path.stat().st_size} bytes); check how it was written")


def _folder_message(path: Path) -> str:
    names = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)
    if not names:
        return f"{path}: is a folder without data files; name a file ({' '.join(READERS)})"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{path}: is a folder, not a file; name a file in it: {', '.join(names[:5])}{more}"


def _missing_message(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder} either; check the path"
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1)
    hint = f"did you mean {folder / near[0]}?" if near else f"check the path (looked in {folder.resolve()})"
    return f"{path}: no such file; {hint}"


def _row(origin: Origin, value: Any) -> Raw:
    """A decoded row, or the reject that it makes."""
    if not isinstance(value, Mapping):
        return _reject(origin, "", f"the row is {kind(value)}, not an object with columns")
    try:
        return Raw(origin, tidy(value))
    except UnfitError as error:
        return _reject(origin, error.field, error.reason)


def _reject(origin: Origin, field: str, reason: str) -> Raw:
    return Raw(origin, Reject(origin.file, origin.line, field, reason))


def _read_lines(path: Path) -> Iterator[Raw]:
    """One JSON object per line. Lines end at \\n only: Unicode has other line ends, and they may stand inside text."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield _parse_line(Origin(str(path), number), content.rstrip())


def _parse_line(origin: Origin, line: bytes) -> Raw:
    try:
        return _row(origin, parse_json(line.decode()))
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return _reject(
            origin, "", f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return _reject(origin, "", f"broken JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return _reject(origin, "", f"unusable JSON: {error}")


def _read_jsonl(path: Path) -> Iterator[Raw]:
    """Lines, unless the file turns out to be a json list by another name."""
    first, _ = _first_line(path)
    if not first.startswith(b"["):
        return _read_lines(path)
    try:
        value = parse_json(path.read_bytes().removeprefix(BOM).decode())
    except ValueError:
        return _read_lines(path)
    return _read_elements(path, value) if isinstance(value, list) else _read_lines(path)


def _read_json(path: Path) -> Iterator[Raw]:
    """A list of objects, an object that wraps one, or lines of objects (jsonl by another name)."""
    first, more = _first_line(path)
    if not first:
        return iter(())
    if more and _is_object(first):
        return _read_lines(path)
    data = path.read_bytes().removeprefix(BOM)
    try:
        value = parse_json(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if _has_object_lines(data):
            return _read_lines(path)
        raise InputError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8, "
            "for example: iconv -f GB18030 -t UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        if _has_object_lines(data):
            return _read_lines(path)
        raise InputError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}); "
            "the file must be one list of objects, or one object per line"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: unusable JSON ({error}); remove that value") from None
    return _read_elements(path, _unwrap(path, value))


def _first_line(path: Path) -> tuple[bytes, bool]:
    """The first line that is not blank, stripped, and whether another one follows it."""
    first = b""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            content = (line.removeprefix(BOM) if number == 0 else line).strip()
            if content and first:
                return first, True
            first = first or content
    return first, False


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode()), dict)
    except ValueError:  # also no UTF-8
        return False


def _has_object_lines(data: bytes) -> bool:
    """Whether a file that is broken as a whole is meant line by line: an unindented line is an object by itself."""
    return any(line.startswith(b"{") and _is_object(line) for line in data.split(b"\n"))


def _unwrap(path: Path, value: Any) -> list[Any]:
    """The list of rows of a decoded json file; an object that wraps no list is a single row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {kind(value)}, not rows; it must be a list of objects, or one object per line")
    lists = [key for key in WRAPPERS if _has_objects(value.get(key))]
    if len(lists) > 1:
        raise InputError(f"{path}: holds several lists ({', '.join(lists)}); save the one to use as a file of its own")
    return list(value[lists[0]]) if lists else [value]


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def _read_elements(path: Path, values: Iterable[Any]) -> Iterator[Raw]:
    for number, value in enumerate(values, 1):
        yield _row(Origin(str(path), number), value)


def _read_csv(path: Path) -> Iterator[Raw]:
    return _read_delimited(path, ",")


def _read_tsv(path: Path) -> Iterator[Raw]:
    return _read_delimited(path, "\t")


def _read_delimited(path: Path, delimiter: str) -> Iterator[Raw]:
    """Rows under a header line; quoted cells may hold line ends. A row's line is the one on which it begins."""
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB: long documents
    # A byte that is not UTF-8 must cost its own row only, so it is let through here and refused in `tidy`.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            origin = Origin(str(path), reader.line_num + 1)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if not header:
                    raise InputError(
                        f"{origin}: the header is not {path.suffix[1:]} ({error}); check its quotes"
                    ) from None
                yield _reject(origin, "", f"not {path.suffix[1:]}: {error}; double the quotes inside a quoted cell")
                continue
            if not cells:
                continue
            if not header:
                header = _header(origin, cells)
            elif len(cells) != len(header):
                yield _reject(origin, "", f"the row has {len(cells)} cells, the header {len(header)}")
            else:
                yield _row(origin, dict(zip(header, cells, strict=True)))


def _header(origin: Origin, cells: list[str]) -> list[str]:
    """Column names; a nameless column, as pandas writes its index, is called column_N."""
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{origin}: the header names `{twice[0]}` more than once; give every column its own name")
    return names


def _read_parquet(path: Path) -> Iterator[Raw]:
    import pyarrow as pa  # here, because it would slow the start of every other command
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield _row(Origin(str(path), number), value)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a whole parquet file (after row {number}: {reason}); write it again") from None


READERS: dict[str, Callable[[Path], Iterator[Raw]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
