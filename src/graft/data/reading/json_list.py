"""The elements of a file that is one JSON list, one after the other, whatever the size of the file.

Speaks of text, elements and lines. Knows no rows. The elements are decoded by the same decoder that decodes a line of
jsonl, so that numbers, escapes and complaints are the same.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from graft.data.reading.rows import BOM, MOST_ROW
from graft.data.values import decode_value

CHUNK = 1 << 20
"""Bytes read at once. What is held is at most an element and about as much again."""
_BLANKS = re.compile(r"[ \t\n\r]*")
_GOES_ON = "e+"
"""What may stand between the digits of a number: where the end of what was read cuts it, it looks whole before that."""
_LONGEST_WORD = 16
"""An escape (`\\ud83d`) or a word (`-Infinity`) that the end of what was read cuts is no longer than this."""


class ListError(ValueError):
    """The file is no JSON list that can be used; `line` is where that shows. Whoever knows its name tells the user."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason
        """With what to do about it."""


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to say of a byte that no UTF-8 text has."""
    return (
        f"byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8, for example: "
        "iconv -f GB18030 -t UTF-8"
    )


def stream_list(file: BinaryIO) -> Iterator[Any]:
    """The decoded elements, in order.

    Raises:
        ListError: at the element where the file stops being a list, or about as soon as text that is not UTF-8 is read.
    """
    text = _Text(file)
    text.expect("[", "Expecting a list")
    if text.next_sign() == "]":
        text.skip(1)
    else:
        while True:
            yield text.decode()
            sign = text.next_sign()
            if sign not in (",", "]"):
                text.fail("Expecting ',' delimiter")
            text.skip(1)
            if sign == "]":
                break
            if text.next_sign() == "]":
                text.fail("Expecting value")  # a comma that nothing follows
    if text.next_sign():
        text.fail("Extra data")


class _Text:
    """The part of a file's text that is being looked at: from the next element to what was read so far."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._held = ""
        self._at = 0
        self._line, self._column = 1, 1
        """Of the first character held."""
        self._ended = False
        self._read()
        self._held = self._held.removeprefix(BOM.decode())

    def next_sign(self) -> str:
        """The next character that is not blank; empty at the end. Stays before it."""
        while True:
            found = _BLANKS.match(self._held, self._at)
            assert found is not None  # it matches no blanks too
            self._at = found.end()
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read():
                return ""

    def expect(self, sign: str, otherwise: str) -> None:
        if self.next_sign() != sign:
            self.fail(otherwise)
        self._at += 1

    def skip(self, characters: int) -> None:
        self._at += characters

    def decode(self) -> Any:
        """The value that begins here; more is read until it is whole."""
        self.next_sign()
        while True:
            try:
                value, end = decode_value(self._held, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self._held) - _LONGEST_WORD or error.msg.startswith("Unterminated string")
                if self._ended or not cut:
                    self.fail(error.msg, error.pos)
            except ValueError as error:
                raise ListError(self._place(self._at)[0], f"unusable JSON ({error}); remove that value") from None
            else:
                whole = end + len(_GOES_ON) < len(self._held) if isinstance(value, int | float) else True
                if whole or self._ended:
                    self._at = end
                    return value
            if len(self._held) - self._at > MOST_ROW:
                reason = f"an element of more than {MOST_ROW >> 20} MiB; split it, or drop it"
                raise ListError(self._place(self._at)[0], reason)
            self._read()

    def fail(self, reason: str, at: int | None = None) -> None:
        """Raise a ListError that says where."""
        line, column = self._place(self._at if at is None else at)
        raise ListError(
            line,
            f"broken JSON at column {column} ({reason}); the file must be one list of objects, or one object per line",
        )

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of a place in what is held."""
        line = self._line + self._held.count("\n", 0, at)
        newline = self._held.rfind("\n", 0, at)
        return line, (self._column + at if newline < 0 else at - newline)

    def _read(self) -> bool:
        """Read on, at least as much again as the value that is not whole yet; what was passed is let go."""
        if self._ended:
            return False
        self._line, self._column = self._place(self._at)
        self._held, self._at = self._held[self._at :], 0
        data = self._file.read(max(CHUNK, len(self._held)))
        self._ended = not data
        try:
            self._held += self._decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._held.count("\n") + error.object.count(b"\n", 0, error.start)
            raise ListError(line, not_utf8(error)) from None
        return not self._ended
