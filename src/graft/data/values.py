"""One decoded value of a data file: JSON parsed strictly, and made safe for everything behind it.

Speaks of values, columns and their flaws. Knows no files, no formats and no conversations.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100
"""Deeper rows are refused: no data set needs it, and Python's own JSON writer would give up on them later."""


class UnfitError(Exception):
    """A value that cannot be used; whoever knows the row's place makes a Reject of it. Never reaches the user."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)  # both: it may cross from one process to another
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


def _constant(name: str) -> None:
    """NaN is how pandas writes a missing value, so it is read as null; an infinity has no such reading."""
    if name != "NaN":
        raise ValueError(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float)


def parse_json(text: str) -> Any:
    """The value of a JSON text; NaN becomes None.

    Raises:
        json.JSONDecodeError: it is no JSON; knows line and column.
        ValueError: it holds an infinity or a number that is too large, or is nested too deeply to be parsed.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None


def decode_value(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at `start` of a text, and where it ends; as `parse_json` otherwise."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from None
    return value, end


def kind(value: Any) -> str:
    """What a value is, in the words of a message to the user."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "an object" if isinstance(value, Mapping) else "a list"


def tidy(value: Any, place: str = "") -> Any:
    """The same value with only what JSON and UTF-8 can hold: NaN and missing become None, dates become ISO text.

    Raises:
        UnfitError: a lone surrogate, bytes that are not UTF-8, an infinity, or nesting deeper than MAX_DEPTH.
    """
    return value if _is_tidy(value, 0) else _tidied(value, place, 0)


def _is_tidy(value: Any, depth: int) -> bool:
    """Whether there is nothing to do: nearly always, so this names no places and makes nothing new."""
    what = type(value)
    if what is str:
        return value.isascii() or _is_text(value)
    if value is None or what is bool or what is int:
        return True
    if what is dict:
        return depth < MAX_DEPTH and all(
            type(key) is str and _is_tidy(key, depth) and _is_tidy(item, depth + 1) for key, item in value.items()
        )
    if what is list:
        return depth < MAX_DEPTH and all(_is_tidy(item, depth + 1) for item in value)
    return what is float and math.isfinite(value)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tidied(value: Any, place: str, depth: int) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _text(value, place)
    if not isinstance(value, Mapping | list | tuple):
        return _other(value, place)
    if depth == MAX_DEPTH:
        raise UnfitError(place, f"nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        return {
            _text(str(key), place): _tidied(item, f"{place}.{key}" if place else str(key), depth + 1)
            for key, item in value.items()
        }
    return [_tidied(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]


def _other(value: Any, place: str) -> Any:
    """Numbers, and what only parquet holds: bytes, dates, decimals."""
    if isinstance(value, float):
        if math.isinf(value):
            raise UnfitError(place, "is infinite")
        return None if math.isnan(value) else value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UnfitError(place, f"{len(value)} bytes that are not UTF-8 text") from None
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _text(value: str, place: str) -> str:
    """Refuse lone surrogates: no tokenizer takes them and no UTF-8 file can hold them."""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        where = place.encode(errors="backslashreplace").decode()
        if 0xDC80 <= code <= 0xDCFF:  # how Python hands on a byte that it could not decode
            reason = f"byte 0x{code - 0xDC00:02x} is not UTF-8; save the file as UTF-8"
        else:
            reason = f"half of a surrogate pair (U+{code:04X}) at character {error.start + 1} is no text"
        raise UnfitError(where, reason) from None
    return value


def text_of(value: Any, place: str) -> str:
    """The value, which must be text.

    Raises:
        UnfitError: it is something else.
    """
    if isinstance(value, str):
        return value
    if value is None:
        raise UnfitError(place, "is missing")
    raise UnfitError(place, f"is {kind(value)}, not text")


def list_of(value: Any, place: str) -> list[Any]:
    """The value, which must be a list or the JSON text of one; null and empty text are the empty list.

    Raises:
        UnfitError: it is something else, or no JSON.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value = parsed(value, place)
    if not isinstance(value, list):
        raise UnfitError(place, f"is {kind(value)}, not a list")
    return value


def parsed(text: str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        UnfitError: it is no JSON.
    """
    try:
        return tidy(parse_json(text), place)
    except ValueError as error:
        raise UnfitError(place, f"is text that should be JSON: {error}") from None
