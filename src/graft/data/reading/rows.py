"""What every reader of files has in common: a row with its place, and a file that may be packed.

Speaks of files, places and rows. Knows no layout of any file and no format.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from graft.data.values import UnfitError, kind, tidy
from graft.errors import InputError, first_line
from graft.types import Origin, Reject

BOM = b"\xef\xbb\xbf"
PACKED = (".gz", ".zst")
"""Last suffixes of files that are unpacked while they are read."""


MOST_RATIO = 300
MOST_UNPACKED = 1 << 30
"""A packed file may unpack to so many times its size, and to so many bytes in any case."""
MOST_ROW = 1 << 28
"""Bytes of a row."""


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as its file has it."""

    origin: Origin
    value: dict[str, Any] | Reject
    """Columns and their values, or why the row could not be read."""


@dataclass(frozen=True, slots=True)
class File:
    """A file to read, or a part of one."""

    path: Path
    suffix: str
    """What its content is, in lower case: `.jsonl` for a.jsonl.gz."""
    part: str = ""
    """The sheet of an xlsx file that was named behind `#`; empty where none was."""

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The content, unpacked.

        Raises:
            InputError: the file cannot be read, or its packing is broken; also while it is being read.
        """
        packing = self.path.suffix.lower()
        broken: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
        if packing == ".zst":
            import zstandard

            broken = (EOFError, zstandard.ZstdError)
        try:
            with self.path.open("rb") as file:
                if packing in PACKED:
                    unpacked = gzip.GzipFile(fileobj=file) if packing == ".gz" else _Zst(file)
                    most = most_unpacked(self.path)
                    yield cast(BinaryIO, io.BufferedReader(_Bounded(self.path, unpacked, most), 1 << 17))
                else:
                    yield file
        except broken as error:
            raise InputError(
                f"{self.path}: not a whole {packing[1:]} file ({first_line(error)}); write it again"
            ) from None
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise InputError(f"{self.path}: cannot be read ({reason}); check its permissions") from None

    def origin(self, line: int) -> Origin:
        """The place of a row."""
        return Origin(str(self.path), line)


def most_unpacked(path: Path) -> int:
    """Bytes to which a packed file may unpack."""
    return max(MOST_UNPACKED, MOST_RATIO * path.stat().st_size)


def bomb(path: Path) -> InputError:
    """What is said of a file that unpacks to more."""
    return InputError(
        f"{path}: its {path.stat().st_size:,} bytes unpack to more than {most_unpacked(path) >> 20:,} MiB, as no text "
        "does; if you trust it, unpack it yourself and name what comes out"
    )


class _Bounded(io.RawIOBase):
    """Unpacked content, up to a size that no data has: a few megabytes can be made to unpack without end."""

    def __init__(self, path: Path, inner: io.BufferedIOBase | io.RawIOBase, most: int) -> None:
        self._path, self._inner, self._most = path, inner, most
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Fill the target; 0 at the end.

        Raises:
            InputError: there is too much of it.
        """
        count = self._inner.readinto(target) or 0
        self._done += count
        if self._done > self._most:
            raise bomb(self._path)
        return count


class _Zst(io.RawIOBase):
    """The unpacked content of a zst file. Unlike the library's own reader it tells a file that was cut short."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._frame, self._left = file, _new_frame(), b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        """Fill the target; 0 at the end.

        Raises:
            EOFError: the file ends in the middle of a frame.
        """
        while not self._left:
            packed = self._frame.unused_data if self._frame.eof else b""
            packed = packed or self._file.read(1 << 17)
            if not packed:
                if self._begun and not self._frame.eof:
                    raise EOFError("it ends before its end-of-frame mark was reached")
                return 0
            if self._frame.eof:
                self._frame = _new_frame()
            self._begun = True
            self._left = self._frame.decompress(packed)
        count = min(len(target), len(self._left))
        target[:count], self._left = self._left[:count], self._left[count:]
        return count


def _new_frame() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def file_of(path: Path, part: str = "") -> File:
    """The file with the suffix of its content: that before `.gz` or `.zst`."""
    name = path.with_suffix("") if path.suffix.lower() in PACKED else path
    return File(path, name.suffix.lower(), part)


def make_row(origin: Origin, value: Any) -> Raw:
    """A decoded row, or the reject that it makes."""
    if not isinstance(value, dict):
        return reject_row(origin, "", f"the row is {kind(value)}, not an object with columns")
    try:
        return Raw(origin, tidy(value))
    except UnfitError as error:
        return reject_row(origin, error.field, error.reason)


def reject_row(origin: Origin, field: str, reason: str) -> Raw:
    """A row that could not be read."""
    return Raw(origin, Reject(origin.file, origin.line, field, reason))
