"""Tables without a header line, whose columns the user names.

Speaks of cells and rows, as `graft.data.reading.tables` does for tables that name their own columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Literal

from graft.data.reading.rows import File, Raw, make_row, reject_row
from graft.errors import InputError


def read_headerless(file: File, header: Sequence[str]) -> Iterator[Raw]:
    """Rows of a csv, tsv or txt file (tabs between) that has no header line.

    In a txt file quotes are characters like any other.

    Raises:
        InputError: another kind of file, or it cannot be read, or is empty.
    """
    if file.suffix not in (".csv", ".tsv", ".txt"):
        raise InputError(f"{file.path}: --header names the columns of a csv, tsv or txt file; leave it out here")
    if not file.path.is_file():
        raise InputError(f"{file.path}: no such file; check the path")
    csv.field_size_limit(2**31 - 1)  # the default refuses cells over 128 KiB: long documents
    quoting: Literal[0, 3] = csv.QUOTE_NONE if file.suffix == ".txt" else csv.QUOTE_MINIMAL
    empty = True
    with file.open() as content, io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter="," if file.suffix == ".csv" else "\t", strict=True, quoting=quoting)
        while True:
            origin = file.origin(reader.line_num + 1)
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                yield reject_row(origin, "", f"not {file.suffix[1:]}: {error}; double the quotes inside a quoted cell")
                continue
            if not cells:
                continue
            empty = False
            if len(cells) != len(header):
                yield reject_row(origin, "", f"the row has {len(cells)} cells, --header names {len(header)}")
            else:
                yield make_row(origin, dict(zip(header, cells, strict=True)))
    if empty:
        raise InputError(f"{file.path}: is empty, it has no rows; check how it was written")
