"""Which files of a folder are its data, and that train and test are never read as one.

Speaks of folders, suffixes and splits. Opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.data.reading.rows import file_of
from graft.errors import InputError
from graft.words import counted

DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that `datasets` and LLaMA-Factory lay beside data to describe it."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Chosen:
    """The files to read, in order."""

    files: list[Path]
    are_text: bool
    """They are text files, one row each, rather than files of rows."""
    notes: list[str]


def choose_files(folder: Path, split: str, suffixes: Sequence[str], text: Sequence[str]) -> Chosen:
    """The data files of a folder and those below it, sorted; text files only where there are no files of rows.

    `split` picks the files whose name, or whose folder's, has that word: train, val or test, or what stands for them.

    Raises:
        InputError: there are no data files, none of that split, or several splits and none was named.
    """
    found = [path for path in _walk(folder) if file_of(path).suffix in suffixes and path.name not in DESCRIPTIONS]
    tables = [path for path in found if file_of(path).suffix not in text]
    files = tables or found
    if not files:
        raise InputError(f"{folder}: is a folder without data files; name a file ({' '.join(suffixes)})")
    by_split: dict[str, list[Path]] = {}
    for path in files if tables else ():
        by_split.setdefault(split_of(path.relative_to(folder)), []).append(path)
    named = {name: len(paths) for name, paths in by_split.items() if name}
    if split:
        files = by_split.get(_SPLITS.get(split.lower(), split), [])
        if not files:
            has = f"it has {_listed(named)}" if named else "no file name there has a split's word, such as train"
            raise InputError(f"{folder}: has no files of the split `{split}`; {has}")
    elif len(named) > 1:
        raise InputError(f"{folder}: has files of the splits {_listed(named)}; name one: {folder}#{next(iter(named))}")
    left = len(found) - len(files)
    notes = [f"{folder}: {counted(len(files), 'file')} read, {left} left out"] if left else []
    return Chosen(files, not tables, notes)


def is_split(word: str) -> bool:
    """Whether a word stands for train, val or test."""
    return word.lower() in _SPLITS


def split_of(path: Path) -> str:
    """train, val or test where a word of the path says so, the file's name before its folders'; else nothing."""
    for part in (file_of(path).path.name, *reversed(path.parent.parts)):
        for word in _WORD.findall(part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _walk(folder: Path) -> Iterable[Path]:
    """Files in and below a folder, sorted by path; hidden ones and those in hidden folders are left out."""
    files = (path for path in folder.rglob("*") if path.is_file())
    seen = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted(seen, key=lambda path: path.relative_to(folder).parts)


def _listed(named: dict[str, int]) -> str:
    return ", ".join(f"{name} ({counted(count, 'file')})" for name, count in named.items())
