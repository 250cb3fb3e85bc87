"""Tables of cells under a header: csv, tsv and xlsx, one row after the other, each with its line.

Speaks of cells, headers and rows. Knows no format: a row is a mapping from column names to values.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

from graft.data.reading.rows import BOM, MOST_ROW, File, Raw, bomb, make_row, most_unpacked, reject_row
from graft.errors import InputError, first_line
from graft.types import Origin

NAMELESS = re.compile(r"column_\d+")
"""What a column without a name is called."""


def read_csv(file: File) -> Iterator[Raw]:
    """Cells between commas; where the header has none, between the semicolons that Excel writes in many countries."""
    return _read_delimited(file, _delimiter(file))


def read_tsv(file: File) -> Iterator[Raw]:
    """Cells between tabs."""
    return _read_delimited(file, "\t")


def _delimiter(file: File) -> str:
    """What stands between the cells of the first line that is not blank."""
    with file.open() as content:
        line = next((line for line in content if line.removeprefix(BOM).strip()), b"")
    bare = re.sub(rb'"[^"]*"', b"", line)
    if b"," in bare:
        return ","
    return max(",", ";", "\t", key=lambda sign: bare.count(sign.encode()))


def _read_delimited(file: File, delimiter: str) -> Iterator[Raw]:
    """Rows under a header line; quoted cells may hold line ends. A row's line is the one on which it begins."""
    csv.field_size_limit(MOST_ROW)  # the default refuses cells over 128 KiB: long documents
    # A byte that is not UTF-8 must cost its own row only, so it is let through here and refused in `tidy`.
    with file.open() as content, io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="") as text:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            origin = file.origin(reader.line_num + 1)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if not header:
                    raise InputError(
                        f"{origin}: the header is not {file.suffix[1:]} ({error}); check its quotes"
                    ) from None
                yield reject_row(origin, "", f"not {file.suffix[1:]}: {error}; double the quotes inside a quoted cell")
                continue
            if not cells:
                continue
            if not header:
                header = _header(origin, cells)
                if has_names(cells):
                    continue
            if len(cells) != len(header):
                yield reject_row(origin, "", f"the row has {len(cells)} cells, the header {len(header)}")
            else:
                yield make_row(origin, dict(zip(header, cells, strict=True)))


def has_names(cells: Sequence[str]) -> bool:
    """Whether a first line names columns. A number names none, unless all count up from 0 as pandas writes them."""
    given = [cell.strip() for cell in cells if cell.strip()]
    counted = given == [str(number) for number in range(len(given))]
    return bool(given) and (counted or not any(_is_number(cell) for cell in given))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _header(origin: Origin, cells: Sequence[str]) -> list[str]:
    """Column names; a nameless column, as pandas writes its index, is called column_N."""
    if not has_names(cells):
        return [f"column_{number}" for number in range(1, len(cells) + 1)]
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{origin}: the header names `{twice[0]}` more than once; give every column its own name")
    return names


def read_xlsx(file: File) -> Iterator[Raw]:
    """Rows of the first sheet, or of the one named; the header is the first row that is not empty."""
    import openpyxl

    try:
        with zipfile.ZipFile(file.path) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > most_unpacked(file.path):
                raise bomb(file.path)
        book = openpyxl.load_workbook(file.path, read_only=True, data_only=True)
        try:
            yield from _read_sheet(file, book)
        finally:
            book.close()
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # of a damaged file: whatever zip, zlib, XML and the library's own classes raise
        raise InputError(f"{file.path}: not a whole xlsx file ({first_line(error)}); save it again") from None


def _read_sheet(file: File, book: Any) -> Iterator[Raw]:
    names = [sheet.title for sheet in book.worksheets]
    if file.part and file.part not in names:
        raise InputError(f"{file.path}: has no sheet `{file.part}`; its sheets are {', '.join(names)}")
    if not names:
        return
    header: list[str] = []
    for number, values in enumerate(book[file.part or names[0]].iter_rows(values_only=True), 1):
        cells = list(values)
        if all(cell is None or cell == "" for cell in cells):
            continue
        origin = file.origin(number)
        if not header:
            while cells and cells[-1] is None:  # a sheet often is wider than what stands in it
                cells.pop()
            header = _header(origin, ["" if cell is None else str(cell) for cell in cells])
            if has_names(["" if cell is None else str(cell) for cell in cells]):
                continue
        if any(cell is not None for cell in cells[len(header) :]):
            yield reject_row(origin, "", f"the row has {len(cells)} cells, the header {len(header)}")
        else:
            cells += [None] * (len(header) - len(cells))
            yield make_row(origin, dict(zip(header, map(_cell, cells), strict=False)))


def _cell(value: Any) -> Any:
    """A table holds text: Excel makes a number of an answer `42`, and of `2024` too."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value
