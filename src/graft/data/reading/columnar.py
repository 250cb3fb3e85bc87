"""Columnar files: parquet, Arrow, and folders that `datasets` saved, one row after the other.

Speaks of record batches and rows. Knows no format: a row is a mapping from column names to values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graft.data.reading.rows import File, Raw, make_row, reject_row
from graft.data.values import parse_json
from graft.errors import InputError, first_line

JSON_COLUMNS = b"graft.json"
"""Key of the schema's metadata that lists the columns whose text is JSON, in files that graft wrote."""


def read_parquet(file: File) -> Iterator[Raw]:
    """The rows of a parquet file."""
    import pyarrow.parquet as pq  # here, because it would slow the start of every other command

    with _naming(file, "parquet"), file.path.open("rb") as content, pq.ParquetFile(content) as table:
        yield from _rows(file, table.schema_arrow, table.iter_batches(batch_size=1024))


def read_arrow(file: File) -> Iterator[Raw]:
    """The rows of an Arrow IPC file, or of an IPC stream (what `datasets` writes)."""
    import pyarrow as pa

    with _naming(file, "arrow"), file.path.open("rb") as content:
        magic = content.read(6)
        content.seek(0)
        if magic == b"ARROW1":
            table = pa.ipc.open_file(content)
            yield from _rows(file, table.schema, map(table.get_batch, range(table.num_record_batches)))
        else:
            stream = pa.ipc.open_stream(content)
            yield from _rows(file, stream.schema, stream)


@contextmanager
def _naming(file: File, what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, OverflowError, MemoryError) as error:  # a damaged length asks for all memory
        raise InputError(f"{file.path}: not a whole {what} file ({first_line(error)}); write it again") from None


def _rows(file: File, schema: Any, batches: Iterable[Any]) -> Iterator[Raw]:
    encoded = (schema.metadata or {}).get(JSON_COLUMNS, b"").decode().split()
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):  # an Arrow batch may be the whole file
            for value in _values(batch.slice(start, 1024)):
                number += 1
                if isinstance(value, Exception):
                    yield reject_row(file.origin(number), "", f"a value cannot be read ({first_line(value)})")
                else:
                    yield _decode(file, number, value, encoded)


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """Rows of a batch; one that is damaged, or that Python cannot hold (a date before year 1), is its error.

    Arrow trusts what a file says of its own lengths; without the full check a damaged one would read foreign memory.
    """
    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # an ArrowInvalid is a ValueError
        if batch.num_rows == 1:
            yield error
            return
        for row in range(batch.num_rows):
            yield from _values(batch.slice(row, 1))


def _decode(file: File, number: int, value: dict[str, Any], encoded: list[str]) -> Raw:
    """The row with its columns of JSON text decoded; where there are such, null is an absent column."""
    if encoded:
        value = {column: item for column, item in value.items() if item is not None}
    for column in encoded:
        if isinstance(value.get(column), str):
            try:
                value[column] = parse_json(value[column])
            except ValueError as error:
                return reject_row(file.origin(number), column, f"is text that should be JSON: {error}")
    return make_row(file.origin(number), value)


def saved_parts(folder: Path) -> list[str]:
    """The splits of a folder that `DatasetDict.save_to_disk` wrote; empty where it is none."""
    return [str(name) for name in _listed(folder / "dataset_dict.json", "splits")]


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files, in order, of a folder that `Dataset.save_to_disk` wrote; empty where it is none."""
    return [folder / str(item.get("filename")) for item in _listed(folder / "state.json", "_data_files")]


def _listed(path: Path, key: str) -> list[Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    items = value.get(key) if isinstance(value, dict) else None
    return [item for item in items if isinstance(item, str | dict)] if isinstance(items, list) else []
