"""Files of JSON, jsonl or one list of objects, and plain text files: one row after the other, each with its line.

Speaks of lines, elements and rows. Knows no format: a row is a mapping from column names to values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from graft.data.reading.json_list import ListError, not_utf8, stream_list
from graft.data.reading.rows import BOM, MOST_ROW, File, Raw, make_row, reject_row
from graft.data.values import MAX_DEPTH, kind, parse_json
from graft.errors import InputError
from graft.types import Origin

WRAPPERS = ("data", "train", "rows")
"""Keys under which a json file that is one object may hold its list of rows."""

MOST_WHOLE = 1 << 31
"""Bytes of a file that must be held whole: an object around a list of rows, a text."""


def read_jsonl(file: File) -> Iterator[Raw]:
    """Lines, unless the file turns out to be a json list by another name."""
    first, _ = _first_line(file)
    return _read_list(file) if first.startswith(b"[") and _is_list(file) else _read_lines(file)


def read_json(file: File) -> Iterator[Raw]:
    """A list of objects, an object that wraps one, or lines of objects (jsonl by another name).

    A list is read element by element; where it is broken, the rows before that have been given already.
    """
    first, more = _first_line(file)
    if not first:
        return iter(())
    if more and _is_value(first):
        return _read_lines(file)
    if first.startswith(b"["):
        return _read_list(file)
    data = _whole(file)
    try:
        value = parse_json(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if _has_object_lines(data):
            return _read_lines(file)
        raise InputError(f"{file.path}, line {line}: {not_utf8(error)}") from None
    except json.JSONDecodeError as error:
        if _has_object_lines(data):
            return _read_lines(file)
        raise InputError(
            f"{file.path}, line {error.lineno}: broken JSON at column {error.colno} ({error.msg}); "
            "the file must be one list of objects, or one object per line"
        ) from None
    except ValueError as error:
        raise InputError(f"{file.path}: unusable JSON ({error}); remove that value") from None
    return _read_elements(file, _unwrap(file, value))


def read_text(file: File) -> Iterator[Raw]:
    """The whole file as one row with the column `text`; a file of blanks only has no row."""
    data = _whole(file)
    if not data.strip():
        return
    try:
        yield make_row(file.origin(1), {"text": data.decode().replace("\r\n", "\n")})
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{data[error.start]:02x} in line {line} is not UTF-8; save the file as UTF-8"
        yield reject_row(file.origin(1), "text", reason)


def _whole(file: File) -> bytes:
    with file.open() as content:
        data = content.read(MOST_WHOLE + 1)
    if len(data) > MOST_WHOLE:
        raise InputError(
            f"{file.path}: more than {MOST_WHOLE >> 20:,} MiB in one piece; split it, or write jsonl, one row per line"
        )
    return data.removeprefix(BOM)


def _read_lines(file: File) -> Iterator[Raw]:
    """One JSON object per line. Lines end at \\n only: Unicode has other line ends, and they may stand inside text."""
    with file.open() as lines:
        for number, line in enumerate(iter(partial(lines.readline, MOST_ROW), b""), 1):
            if len(line) == MOST_ROW:
                raise InputError(f"{file.path}:{number}: a row of more than {MOST_ROW >> 20} MiB; split it, or drop it")
            content = line.removeprefix(BOM) if number == 1 else line
            if content.strip():
                yield parse_line(file.origin(number), content.rstrip())


def parse_line(origin: Origin, line: bytes) -> Raw:
    """The row that a line of JSON holds, or the reject that it makes."""
    try:
        value = parse_json(line.decode())
        # Without an escape there is no half of a surrogate pair, and without brackets no depth: nothing to tidy.
        if type(value) is dict and b"\\u" not in line and line.count(b"{") + line.count(b"[") < MAX_DEPTH:
            return Raw(origin, value)
        return make_row(origin, value)
    except UnicodeDecodeError as error:
        byte = line[error.start]
        reason = f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8; save the file as UTF-8"
        return reject_row(origin, "", reason)
    except json.JSONDecodeError as error:
        return reject_row(origin, "", f"broken JSON at column {error.colno}: {error.msg}")
    except ValueError as error:
        return reject_row(origin, "", f"unusable JSON: {error}")


LONGEST_LINE = 1 << 20
"""Bytes of a first line that are looked at: a list of gigabytes may be one line."""


def _first_line(file: File) -> tuple[bytes, bool]:
    """The first line that is not blank, or as much of it as is looked at, stripped, and whether more follows."""
    first = b""
    with file.open() as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE):
            content = (line.removeprefix(BOM) if number == 0 else line).strip()
            number += 1
            if content and first:
                return first, True
            first = first or content
    return first, False


def _is_value(line: bytes) -> bool:
    """Whether a line is by itself an object, or a list: then the lines are rows, if not good ones."""
    return _is_object(line) or (line.endswith(b"]") and _is_json(line, list))


def _is_object(line: bytes) -> bool:
    return _is_json(line, dict)


def _is_json(line: bytes, what: type) -> bool:
    try:
        return isinstance(parse_json(line.decode()), what)
    except ValueError:  # also no UTF-8
        return False


def _is_list(file: File) -> bool:
    """Whether a file is one JSON list from its beginning to its end."""
    with file.open() as content:
        try:
            for _ in stream_list(content):
                pass
        except ListError:
            return False
    return True


def _has_object_lines(data: bytes) -> bool:
    """Whether a file that is broken as a whole is meant line by line: an unindented line is an object by itself."""
    return any(line.startswith(b"{") and _is_object(line) for line in data.split(b"\n"))


def _unwrap(file: File, value: Any) -> list[Any]:
    """The list of rows of a decoded json file; an object that wraps no list is a single row."""
    path = file.path
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


def _read_list(file: File) -> Iterator[Raw]:
    with file.open() as content:
        try:
            yield from _read_elements(file, stream_list(content))
        except ListError as error:
            # In words: `FILE:3` is the third element everywhere else.
            raise InputError(f"{file.path}, line {error.line}: {error.reason}") from None


def _read_elements(file: File, values: Iterable[Any]) -> Iterator[Raw]:
    for number, value in enumerate(values, 1):
        yield make_row(file.origin(number), value)
