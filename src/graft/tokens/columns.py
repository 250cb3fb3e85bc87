"""Arrays that grow on disk, one `.npy` file each, so that no more is held in memory than was added last.

Speaks arrays and files. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

BUFFER = 1 << 18
"""Bytes of a file gathered before they are written."""

PENDING = 1 << 12
"""Single numbers gathered before they become an array."""


class Unwritable(Exception):
    """The file system refused a file; the text says why. Apart from OSError, so that no other one is taken for it."""


@contextlib.contextmanager
def naming_refusals() -> Iterator[None]:
    """Turns what the file system refuses in the block into `Unwritable`."""
    try:
        yield
    except OSError as error:
        raise Unwritable(error.strerror or str(error)) from None


class Columns:
    """Several one-dimensional arrays that are written at the same time; they are whole when the block ends well."""

    def __init__(self, folder: Path, kinds: Mapping[str, Any]) -> None:
        """Columns of these names and element types in files `NAME.npy`.

        Raises:
            Unwritable: a file cannot be made.
        """
        with contextlib.ExitStack() as files:
            self._columns: dict[str, _Column] = {}
            for name, kind in kinds.items():
                with naming_refusals():
                    file = files.enter_context((folder / f"{name}.npy").open("wb", buffering=BUFFER))
                    self._columns[name] = _Column(file, np.dtype(kind))
            self._files = files.pop_all()

    def add(self, name: str, values: npt.NDArray[Any] | list[int]) -> None:
        """Append an array, or single numbers, to a column; a column takes either arrays or numbers.

        Raises:
            Unwritable: the file system refused.
        """
        try:  # and not `naming_refusals`, which costs more than adding
            self._columns[name].add(values)
        except OSError as error:
            raise Unwritable(error.strerror or str(error)) from None

    def __enter__(self) -> Columns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(OSError):
                self._files.close()
            return
        with naming_refusals():
            for column in self._columns.values():
                column.finish()
            self._files.close()


class _Column:
    """A `.npy` file whose header is written twice, the second time with the length."""

    def __init__(self, file: BinaryIO, kind: np.dtype[Any]) -> None:
        self._file, self._kind, self._length = file, kind, 0
        self._pending: list[int] = []
        self._write_header()
        self._start = file.tell()

    def add(self, values: npt.NDArray[Any] | list[int]) -> None:
        if isinstance(values, list):
            self._pending += values
            if len(self._pending) < PENDING:
                return
            values, self._pending = np.array(self._pending, self._kind), []
        self._file.write(np.ascontiguousarray(values, dtype=self._kind).data)
        self._length += len(values)

    def finish(self) -> None:
        self.add(np.array(self._pending, self._kind))
        self._file.seek(0)
        self._write_header()
        # numpy pads the header so that a growing first axis never moves the data (GROWTH_AXIS_MAX_DIGITS).
        assert self._file.tell() == self._start

    def _write_header(self) -> None:
        described = {"descr": self._kind.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, described)
