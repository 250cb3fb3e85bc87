"""What a source names, a file, a folder or a data set of the hub, and its rows in order, each with its place.

Speaks of addresses, suffixes and rows. Knows no format: a row is a mapping from column names to values.
A row that cannot be read is a Reject and the others go on; a file that cannot be read is an InputError.
"""

from __future__ import annotations

import codecs
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from graft.data.reading import catalogue, hub
from graft.data.reading.catalogue import Entry
from graft.data.reading.columnar import read_arrow, read_parquet, saved_files, saved_parts
from graft.data.reading.folder import choose_files, is_split
from graft.data.reading.json_files import read_json, read_jsonl, read_text
from graft.data.reading.rows import PACKED, File, Raw, file_of
from graft.data.reading.tables import read_csv, read_tsv, read_xlsx
from graft.errors import InputError

READERS: dict[str, Callable[[File], Iterator[Raw]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_text,
    ".md": read_text,
    ".markdown": read_text,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".xlsx": read_xlsx,
}
TEXT = (".txt", ".md", ".markdown")
"""Files that are one row each."""
BINARY = (".parquet", ".arrow", ".xlsx")
"""Files that are packed in themselves."""
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
"""Byte-order marks of text that is not UTF-8."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one layout: a file, all text files of a folder, or a split of a data set."""

    name: str
    """What messages call it."""
    files: tuple[str, ...]
    """What is read, resolved: no two parts of a command may share one."""
    rows: Callable[[], Iterator[Raw]]
    entry: Entry | None = None
    """What a catalogue says of its layout; None where its rows speak for themselves."""
    among_others: bool = False
    """It is one of several files of a folder, not named by itself."""


@dataclass(frozen=True, slots=True)
class Opened:
    """What an address names."""

    parts: list[Part]
    notes: list[str]
    """One sentence per decision taken, such as which files of a folder were left out."""


def read_rows(address: Path | str) -> Iterator[Raw]:
    """All rows that an address names, in order.

    Raises:
        InputError: see `open_address`; or a file is unreadable, UTF-16, broken as a whole, or has no rows.
    """
    return chain.from_iterable(part.rows() for part in open_address(str(address)).parts)


def open_address(address: str) -> Opened:
    """The parts that an address names: a file of READERS, also packed as .gz or .zst; `FILE.xlsx#SHEET`; a folder of
    files, with `#SPLIT` where it has several; a folder that `datasets` saved; `hf:owner/name`, see `read_hub`;
    `dataset_info.json#NAME`, or its `FOLDER#NAME`: a data set of a catalogue, see `catalogue`.

    Raises:
        InputError: nothing is there, it has no known suffix, or a sheet or split must be named.
    """
    if address.startswith(hub.PREFIX):
        wanted = hub.parse_address(address)
        return Opened([Part(address, (address,), lambda: _not_empty(address, hub.read_hub(wanted)))], [])
    path, part = Path(address), ""
    try:
        if not path.exists() and "#" in address:  # a file may have `#` in its name
            name, _, part = address.rpartition("#")
            path = Path(name)
        if path.is_dir():
            return _open_folder(address, path, part)
        if not path.exists():
            raise InputError(_missing_message(path))
        if path.is_file() and (part or path.name == catalogue.NAME) and path.suffix == ".json":
            return _open_entry(path, part)
        if not path.is_file():
            raise InputError(f"{path}: is a pipe or a device; save what it gives as a file, which is read twice")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    return Opened([_part(address, [file_of(path, part)])], [])


def _open_entry(path: Path, name: str) -> Opened:
    """A data set of a catalogue.

    Raises:
        InputError: the file is no catalogue, or has no such data set.
    """
    entries = catalogue.read_catalogue(path)
    if entries is None:
        what = f"leave `#{name}` out" if name else "name the files of data"
        raise InputError(f"{path}: is no catalogue of data sets (name: {{file_name: ...}}); {what}")
    if not name:
        raise InputError(f"{path}: is a catalogue of data sets; name one: {path}#{next(iter(entries))}")
    entry = catalogue.find_entry(path, entries, name)
    if entry.hub is not None:
        address = f"{hub.PREFIX}{entry.hub}"
        wanted = hub.HubSet(address, entry.hub, entry.subset, entry.revision, entry.split or "train", entry.folder)
        return Opened(
            [
                _of_entry(
                    Part(entry.address, (entry.address,), lambda: _not_empty(entry.address, hub.read_hub(wanted))),
                    entry,
                )
            ],
            [*entry.notes, f"{entry.address}: {address}, as {entry.format}"],
        )
    file = entry.file
    assert file is not None  # an entry has one place or the other
    opened = open_address(f"{file}#{entry.split}" if entry.split and file.is_dir() else str(file))
    return Opened(
        [_of_entry(part, entry) for part in opened.parts],
        [*opened.notes, *entry.notes, f"{entry.address}: {file}, as {entry.format}"],
    )


def _of_entry(part: Part, entry: Entry) -> Part:
    return replace(part, rows=lambda: entry.rows(part.rows), entry=entry)


def _open_folder(address: str, path: Path, part: str) -> Opened:
    """A data set of its catalogue, a folder that `datasets` saved, or one of files."""
    if part and (path / catalogue.NAME).is_file():
        entries = catalogue.read_catalogue(path / catalogue.NAME)
        if entries is not None and (part in entries or not is_split(part)):
            return _open_entry(path / catalogue.NAME, part)
    splits = saved_parts(path)
    if splits:
        if not part and len(splits) > 1:
            raise InputError(f"{path}: has the splits {', '.join(splits)}; name one: {path}#{splits[0]}")
        if part and part not in splits:
            raise InputError(f"{path}: has no split `{part}`; it has {', '.join(splits)}")
        path, part = path / (part or splits[0]), ""
    if files := saved_files(path):
        if part:
            raise InputError(f"{address}: {path} is a saved data set without splits; leave `#{part}` out")
        return Opened([_part(address, [file_of(file) for file in files])], [])
    chosen = choose_files(path, part, tuple(READERS), TEXT)
    files_read = [file_of(file) for file in chosen.files]
    if chosen.are_text:
        return Opened([_part(address, files_read)], chosen.notes)
    parts = [_part(str(file.path), [file]) for file in files_read]
    return Opened([replace(part, among_others=len(parts) > 1) for part in parts], chosen.notes)


def _part(name: str, files: list[File]) -> Part:
    for file in files:
        _check(file)
    keys = tuple(f"{file.path.resolve()}#{file.part}" for file in files)
    return Part(name, keys, lambda: _not_empty(name, _rows(files)))


def _rows(files: list[File]) -> Iterator[Raw]:
    for file in files:
        _check_readable(file)
        yield from READERS[file.suffix](file)


def _check(file: File) -> None:
    """Refuse a file that no reader takes, before any file is read."""
    packed = file.path.suffix.lower() in PACKED
    if file.suffix not in READERS:
        raise InputError(
            f"{file.path}: unknown suffix `{file.suffix}`; graft reads {' '.join(READERS)}, text also as "
            f"{' '.join(PACKED)}: convert or rename the file"
        )
    if packed and file.suffix in BINARY:
        raise InputError(f"{file.path}: a {file.suffix} file is not read through {file.path.suffix}; unpack it first")
    if file.part and file.suffix != ".xlsx":
        raise InputError(f"{file.path}: only an .xlsx file has sheets; leave `#{file.part}` out")


def _check_readable(file: File) -> None:
    with file.open() as content:
        start = content.read(4)
    if file.suffix in BINARY:
        return
    name = "UTF-32" if start in UTF_32 else "UTF-16" if start[:2] in UTF_16 else ""
    if name:
        raise InputError(f"{file.path}: is {name} text; save it as UTF-8, for example: iconv -f {name} -t UTF-8")


def _not_empty(name: str, rows: Iterator[Raw]) -> Iterator[Raw]:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InputError(f"{name}: is empty, it has no rows; check how it was written")


def _missing_message(path: Path) -> str:
    folder = path.parent
    if path.is_symlink():
        return f"{path}: is a link to {path.readlink()}, which is not there; correct the link"
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder} either; check the path, or write hf:{path} for the hub"
    near = difflib.get_close_matches(path.name, [item.name for item in folder.iterdir()], n=1)
    hint = f"did you mean {folder / near[0]}?" if near else f"check the path (looked in {folder.resolve()})"
    return f"{path}: no such file; {hint}"
