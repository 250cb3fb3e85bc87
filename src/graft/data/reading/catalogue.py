"""LLaMA-Factory's `dataset_info.json`: data sets by name, each with its file, layout, columns and tags.

Speaks of entries, columns and tags. What an entry says holds: a column that it does not name is no part of its turns.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from graft.config.base import did_you_mean
from graft.data.reading.rows import BOM, Raw, reject_row
from graft.data.values import kind, parse_json
from graft.errors import InputError, first_line
from graft.types import Reject

NAME = "dataset_info.json"
_PLACES = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
"""Keys that say where an entry's rows are; each entry has one of them."""
_KEYS = (
    *_PLACES,
    *("formatting", "ranking", "subset", "split", "folder", "revision", "num_samples", "columns", "tags"),
)
_COLUMNS = (
    *("prompt", "query", "response", "history", "messages", "system", "tools", "chosen", "rejected", "kto_tag"),
    *("images", "videos", "audios"),
)
_MEDIA = ("images", "videos", "audios")
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""Columns of an entry that names none; and what graft calls them."""
_OURS = {
    **_ALPACA,
    **{name: name for name in ("history", "system", "tools", "chosen", "rejected")},
    "kto_tag": "label",
}
_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
    "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system",
}  # fmt: skip
_OPENAI_TAGS = {
    **_TAGS, "role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
    "observation_tag": "tool",
}  # fmt: skip
_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "function_call",
    "system_tag": "system",
}  # fmt: skip
_READ_UNASKED = frozenset(
    {
        *("instruction", "input", "output", "history", "system", "tools", "context", "response", "instances"),
        *("system_prompt", "system_message", "functions", "conversations", "conversation", "items", "messages", "text"),
    }
)
"""Columns that graft's formats would read by their names."""
_TURNS = ("conversations", "messages", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Entry:
    """One data set of a catalogue."""

    address: str
    """The catalogue and the name, as messages call it."""
    file: Path | None
    """Its file or folder; None where it is on the hub."""
    hub: str | None
    """Its name on the Hugging Face hub."""
    format: str
    """By graft's name."""
    columns: Mapping[str, str]
    """Graft's name: the file's."""
    tags: Mapping[str, str]
    """What the keys and roles of its messages are called; empty where its rows have no messages."""
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    revision: str | None = None
    num_samples: int | None = None
    notes: tuple[str, ...] = field(default=())

    def rows(self, read: Callable[[], Iterator[Raw]]) -> Iterator[Raw]:
        """The entry's rows, in the words of `columns` and with messages of role and content."""
        drawn = read() if self.num_samples is None else _drawn(read, self.num_samples)
        return map(self._row, drawn)

    def _row(self, raw: Raw) -> Raw:
        if isinstance(raw.value, Reject):
            return raw
        row = dict(raw.value)
        for name in _READ_UNASKED & row.keys():  # a column that the entry does not name is no part of the turns
            if name not in self.columns.values():
                row[_free(name, row)] = row.pop(name)
        for ours in _TURNS if self.tags else ():
            theirs = self.columns.get(ours, "")
            value = row.get(theirs)
            try:
                if isinstance(value, list):
                    row[theirs] = [self._message(item, f"{theirs}[{index}]") for index, item in enumerate(value)]
                elif isinstance(value, dict):
                    row[theirs] = self._message(value, theirs)
            except _MissingError as missing:
                return reject_row(raw.origin, missing.place, "is missing")
        return Raw(raw.origin, self._with_one_system(row))

    def _message(self, value: Any, place: str) -> Any:
        """A message with role and content under the names that graft reads."""
        if not isinstance(value, dict):
            return value
        role_key, content_key = self.tags["role_tag"], self.tags["content_tag"]
        for key in (role_key, content_key):
            if key not in value and not (key == content_key and value.get("tool_calls")):
                raise _MissingError(f"{place}.{key}")
        said = value[role_key]
        role = next((ours for tag, ours in _ROLES.items() if self.tags[tag] == said), said)
        rest = {key: item for key, item in value.items() if key not in (role_key, content_key)}
        return {"role": role, "content": value.get(content_key), **rest}

    def _with_one_system(self, row: dict[str, Any]) -> dict[str, Any]:
        """A system turn that begins the conversation wins over the `system` column, as the catalogue's form has it."""
        column = self.columns.get("system")
        turns = row.get(self.columns.get("conversations", self.columns.get("messages", "")))
        first = turns[0] if isinstance(turns, list) and turns else None
        if column in row and isinstance(first, dict) and first.get("role") == "system":
            row[column] = None
        return row


class _MissingError(Exception):
    """A key that the tags promise."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


def _free(name: str, row: Mapping[str, Any]) -> str:
    name = f"other_{name}"
    while name in row:
        name += "_"
    return name


def _drawn(read: Callable[[], Iterator[Raw]], count: int) -> Iterator[Raw]:
    """So many rows drawn from all, in their order and the same ones each time; all where there are no more."""
    total = sum(1 for _ in read())
    if total <= count:
        return read()
    numbers = set(random.Random(0).sample(range(total), count))  # noqa: S311  # no secret
    return (raw for number, raw in enumerate(read()) if number in numbers)


def read_catalogue(path: Path) -> dict[str, Any] | None:
    """The entries of a file of that form; None where it is something else, as `datasets` writes under the same name.

    Raises:
        InputError: it cannot be read, or is no JSON.
    """
    try:
        value = parse_json(path.read_bytes().removeprefix(BOM).decode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({first_line(error)})") from None
    entries = isinstance(value, dict) and value
    if not entries or not all(isinstance(item, dict) and item.keys() & set(_PLACES) for item in value.values()):
        return None
    return dict(value)


def find_entry(path: Path, entries: Mapping[str, Any], name: str) -> Entry:
    """What a catalogue says of a name.

    Raises:
        InputError: there is no such entry, or it names what graft cannot read; says which key.
    """
    if name not in entries:
        raise InputError(f"{path}: has no data set `{name}`{did_you_mean(name, list(entries))}; {listed(entries)}")
    address, given = f"{path}#{name}", entries[name]
    formatting = given.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise InputError(f"{address}: formatting `{formatting}` is none of alpaca, sharegpt, openai")
    columns = _mapping(address, given, "columns", _COLUMNS)
    tags = _mapping(address, given, "tags", tuple(_TAGS))
    if media := [key for key in _MEDIA if columns.get(key)]:
        raise InputError(
            f"{address}: names {media[0]} (column `{columns[media[0]]}`), and only text can be trained on; choose "
            f"another data set: {listed({key: None for key in entries if not _has_media(entries[key])})}"
        )
    hub, file = _place(path, address, given)
    form, ours = _layout(formatting, bool(given.get("ranking")), columns, "columns" in given)
    count = given.get("num_samples")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise InputError(f"{address}: num_samples is {kind(count)} ({count!r}), not a whole number from 1 on")
    notes = []
    if unknown := [key for key in given if key not in _KEYS]:
        hint = did_you_mean(unknown[0], _KEYS)
        notes.append(f"{address}: keys that graft has no use for: {', '.join(unknown)}{hint}")
    if count is not None:
        notes.append(f"{address}: num_samples {count}: at most so many rows, drawn from all of them")
    return Entry(
        address=address,
        file=file,
        hub=hub,
        format=form,
        columns=ours,
        tags={} if formatting == "alpaca" else (_OPENAI_TAGS if formatting == "openai" else _TAGS) | tags,
        subset=_text(address, given, "subset"),
        split=_text(address, given, "split"),
        folder=_text(address, given, "folder"),
        revision=_text(address, given, "revision"),
        num_samples=count,
        notes=tuple(notes),
    )


def _has_media(given: Mapping[str, Any]) -> bool:
    columns = given.get("columns")
    return isinstance(columns, dict) and any(columns.get(key) for key in _MEDIA)


def listed(entries: Mapping[str, Any]) -> str:
    """The names for a message."""
    names = list(entries)
    return f"it has {', '.join(names[:20])}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _place(path: Path, address: str, given: Mapping[str, Any]) -> tuple[str | None, Path | None]:
    """Where the rows are: a name on the hub, or a file. The hub wins, as with whoever wrote the catalogue."""
    if hub := _text(address, given, "hf_hub_url"):
        return hub, None
    if script := _text(address, given, "script_url"):
        raise InputError(
            f"{address}: its rows come from a script (script_url: {script}), and graft runs no code that comes with "
            "data; save what it gives as jsonl"
        )
    if name := _text(address, given, "file_name"):
        file = path.parent / name
        _refuse_outside(path, address, name)
        if not file.exists():
            raise InputError(
                f"{address}: its file {file} is not there; put it beside {path.name}, or correct file_name"
            )
        return None, file
    key = next(key for key in _PLACES if key in given)
    raise InputError(f"{address}: is only at {key}: {given[key]}; download it, and name its files as file_name")


def _refuse_outside(path: Path, address: str, name: str) -> None:
    """A catalogue is often downloaded with its data: what it names lies beside it, also where that is a link.

    The hub's cache is allowed its form: `snapshots/COMMIT/FILE` is a link into `blobs` of the same data set.

    Raises:
        InputError: the entry's file lies elsewhere.
    """
    folder = Path(os.path.realpath(path.parent))
    if folder.parent.name == "snapshots":
        folder = folder.parent.parent
    file = Path(os.path.realpath(path.parent / name))
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not file.is_relative_to(folder):
        raise InputError(
            f"{address}: file_name {name!r} is {file}, outside of the catalogue's folder {path.parent}; name that file "
            "itself as data if it is yours, or copy it there"
        )


def _layout(formatting: str, ranking: bool, columns: Mapping[str, str], named: bool) -> tuple[str, dict[str, str]]:
    """Graft's format, and its columns, ours: theirs."""
    side = {_OURS[key]: theirs for key, theirs in columns.items() if key in ("system", "tools", "kto_tag")}
    pair = {key: columns.get(key, key) for key in ("chosen", "rejected")} if ranking else {}
    if formatting != "alpaca":
        column = "messages" if formatting == "openai" else "conversations"
        turns = {column: columns.get("messages", column)}
        form = "messages" if formatting == "openai" else "sharegpt"
        return ("preference" if ranking else form), {**turns, **pair, **side}
    given = columns if named else _ALPACA
    asked = {_OURS[key]: given[key] for key in ("prompt", "query", "history") if key in given}
    if ranking:
        return "preference", {**asked, **pair, **side}
    if "response" not in given and "prompt" in given:  # how the form writes text to be learnt by heart
        return "text", {"text": given["prompt"]}
    answer = {"output": given["response"]} if "response" in given else {}
    return "alpaca", {**asked, **answer, **side}


def _mapping(address: str, given: Mapping[str, Any], key: str, known: tuple[str, ...]) -> dict[str, str]:
    """`columns` or `tags`: texts by known names; null is the same as absent."""
    value = given.get(key) or {}
    if not isinstance(value, dict):
        raise InputError(f"{address}: {key} is {kind(value)}, not an object")
    for name, theirs in value.items():
        if name not in known:
            raise InputError(
                f"{address}: {key} has no `{name}`{did_you_mean(name, known)}; known are {', '.join(known)}"
            )
        if theirs is not None and not isinstance(theirs, str):
            raise InputError(f"{address}: {key}.{name} is {kind(theirs)}, not text")
    return {name: theirs for name, theirs in value.items() if theirs}


def _text(address: str, given: Mapping[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f"{address}: {key} is {kind(value)}, not text")
    return value or None
