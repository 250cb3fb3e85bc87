"""Encoded examples on disk, memory-mapped: encoded once, then shared by every run and rank that wants the same ids.

The key is a hash of everything that shapes the ids (conversations, tokenizer, template, settings, encoder version), so
a changed template cannot meet old tokens, and deleting the cache changes nothing but the time.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graft.config.train import Encode
from graft.console import warn_once
from graft.errors import InputError
from graft.runs import fsync_folder, make_writable, write_atomic
from graft.tokens import row_weight
from graft.tokens.columns import Columns, Unwritable, naming_refusals
from graft.tokens.encode import encode_each
from graft.tokens.renderer import Renderer
from graft.tokens.spread import default_workers
from graft.types import Conversation, Example, FloatArray, IntArray, Reject

ENCODER_VERSION = 1
"""Raised whenever the same conversation would be encoded to other ids."""

WAYS = ("template", "composed", "text")

COLUMNS = {
    "first": np.int64, "start": np.int64, "prompt_len": np.int32, "turn": np.int32, "way": np.int32, "ids": np.int32,
    "weights": np.float32,
}  # fmt: skip
"""Arrays of an ExampleStore, one file each."""


@dataclass(frozen=True, slots=True)
class ExampleStore:
    """E examples of C conversations; the arrays may be memory-mapped."""

    conversations: tuple[str, ...]
    """[C] ids of the conversations that have an example, in the data's order."""
    first: npt.NDArray[np.int64]
    """[C + 1] examples of conversation c are first[c] up to first[c + 1]."""
    start: npt.NDArray[np.int64]
    """[E + 1] tokens of example e are start[e] up to start[e + 1]."""
    prompt_len: IntArray
    """[E]"""
    turn: IntArray
    """[E]"""
    way: IntArray
    """[E] index into WAYS."""
    ids: IntArray
    """[T] token ids of all examples, one after the other."""
    weights: FloatArray
    """[T]"""
    rejects: tuple[Reject, ...]
    notes: Mapping[str, int]
    """What the encoder had to say, with counts."""
    key: str

    def __len__(self) -> int:
        return len(self.conversations)

    def examples_of(self, conversation: int) -> list[Example]:
        """The examples of the conversation with this index."""
        return [self._example(e, conversation) for e in range(self.first[conversation], self.first[conversation + 1])]

    def examples(self, conversations: Iterable[int]) -> list[Example]:
        """The examples of several conversations, in their order."""
        return [example for conversation in conversations for example in self.examples_of(int(conversation))]

    def _example(self, e: int, conversation: int) -> Example:
        span = slice(self.start[e], self.start[e + 1])
        return Example(
            self.conversations[conversation],
            int(self.turn[e]),
            self.ids[span],
            self.weights[span],
            int(self.prompt_len[e]),
            WAYS[self.way[e]],
        )


def encode_stored(
    conversations: Collection[Conversation], renderer: Renderer, settings: Encode, workers: int | None = None
) -> ExampleStore:
    """Encode conversations, or map what an earlier run encoded from exactly the same.

    Args:
        conversations: read twice, for the key and for the ids; they need not be in memory.
        renderer: makes the ids.
        settings: shape them.
        workers: processes that encode; None takes as many as pay. The ids are the same for any number.

    Raises:
        InputError: neither the cache nor the folder for temporary files can be written.
    """
    key = store_key(conversations, renderer, settings)
    folder = cache_folder() / key
    if (folder / "meta.json").is_file():
        return _placed(_read(folder, key, mapped=True), conversations)

    def results(notes: Counter[str]) -> Iterator[list[Example] | Reject]:
        count = default_workers(len(conversations)) if workers is None else workers
        return encode_each(conversations, renderer, settings, notes, count)

    try:
        _write(folder, results)
    except Unwritable as error:
        warn_once(f"{folder.parent}: encoded data cannot be cached ({error}); set GRAFT_CACHE to a folder")
    else:
        return _read(folder, key, mapped=True)
    try:
        with tempfile.TemporaryDirectory() as aside:
            _write(Path(aside) / key, results)
            return _read(Path(aside) / key, key, mapped=False)
    except Unwritable as error:
        raise InputError(f"{tempfile.gettempdir()}: no room for encoded data either ({error}); set TMPDIR") from None


def open_stored(key: str) -> ExampleStore:
    """What another process of this host has encoded and kept.

    Raises:
        InputError: it is not in the cache.
    """
    folder = cache_folder() / key
    if not (folder / "meta.json").is_file():
        raise InputError(
            f"{folder}: the encoded data is not there, though another process of this host has made it; set "
            "GRAFT_CACHE to a folder that all of them can write to and read"
        )
    return _read(folder, key, mapped=True)


def store_key(conversations: Iterable[Conversation], renderer: Renderer, settings: Encode) -> str:
    """Hash of everything that shapes the ids. Where files lie does not: a run may be resumed from another folder."""
    digest = hashlib.blake2b(digest_size=16)
    shaping = settings.model_dump_json(exclude={"date", "template"})  # the renderer's fingerprint holds their texts
    for part in (str(ENCODER_VERSION), renderer.fingerprint(), shaping):
        digest.update(part.encode() + b"\0")
    for conversation in conversations:
        origin = conversation.origin
        turns = tuple(map(_SHAPING, conversation.messages))
        shapes = (conversation.id, _name(origin.file), origin.line, turns, conversation.tools, conversation.text)
        digest.update(repr(shapes).encode("utf-8", "surrogatepass") + b"\0")
        if conversation.meta.get(row_weight.COLUMN) is not None:
            digest.update(repr(conversation.meta[row_weight.COLUMN]).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _name(file: str) -> str:
    return file.rsplit("/", 1)[-1]


def _placed(store: ExampleStore, conversations: Iterable[Conversation]) -> ExampleStore:
    """The store with its rejects where the files are now: it may have been encoded when they lay elsewhere."""
    if not store.rejects:
        return store
    files = {(_name(c.origin.file), c.origin.line): c.origin.file for c in conversations}
    placed = (
        replace(reject, file=files.get((_name(reject.file), reject.line), reject.file)) for reject in store.rejects
    )
    return replace(store, rejects=tuple(placed))


_SHAPING = operator.attrgetter("role", "content", "reasoning", "tool_calls", "name", "tool_call_id", "weight")
"""The parts of a message, as one tuple: a dataclass's own repr takes four times as long."""


def cache_folder() -> Path:
    """Where encoded data is kept: $GRAFT_CACHE, else the user's cache folder."""
    if "GRAFT_CACHE" in os.environ:
        return Path(os.environ["GRAFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graft" / "encoded"


def refuse_unwritable_cache() -> None:
    """Where several processes are to read what one of them encodes.

    Raises:
        InputError: the cache cannot be written.
    """
    try:
        make_writable(cache_folder())
    except InputError as error:
        raise InputError(f"the cache of encoded data: {error}, and name it with GRAFT_CACHE") from None


def _write(folder: Path, results: Callable[[Counter[str]], Iterable[list[Example] | Reject]]) -> None:
    """Write beside and rename, so that two runs that encode the same data at once cannot tear each other's files.

    Raises:
        Unwritable: the file system refused.
    """
    with naming_refusals():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        meta = _write_examples(aside, results)
        with naming_refusals():
            write_atomic(aside / "meta.json", json.dumps(meta, ensure_ascii=False))
            if not (folder / "meta.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)  # what a crash left
            try:
                aside.rename(folder)
            except OSError:
                if not (folder / "meta.json").is_file():  # else another run was faster
                    raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_folder(folder.parent)


def _write_examples(
    folder: Path, results: Callable[[Counter[str]], Iterable[list[Example] | Reject]]
) -> dict[str, Any]:
    """Write examples as they come, holding none; returns what goes into meta.json."""
    names: list[str] = []
    rejects: list[dict[str, Any]] = []
    notes: Counter[str] = Counter()
    examples = tokens = 0
    with Columns(folder, COLUMNS) as columns:
        columns.add("start", [0])
        for result in results(notes):
            if isinstance(result, Reject):
                rejects.append(asdict(result))
                continue
            names.append(result[0].conversation)
            columns.add("first", [examples])
            for example in result:
                tokens += len(example.ids)
                columns.add("start", [tokens])
                columns.add("prompt_len", [example.prompt_len])
                columns.add("turn", [example.turn])
                columns.add("way", [WAYS.index(example.way)])
                columns.add("ids", example.ids)
                columns.add("weights", example.weights)
            examples += len(result)
        columns.add("first", [examples])
    return {
        "conversations": names,
        "rejects": rejects,
        "notes": {said: count for said, count in notes.items() if count},
    }


def _read(folder: Path, key: str, mapped: bool) -> ExampleStore:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def array(name: str) -> npt.NDArray[Any]:
        path = folder / f"{name}.npy"
        empty = path.stat().st_size <= 128  # a header alone cannot be mapped
        loaded: npt.NDArray[Any] = np.load(path, mmap_mode="r" if mapped and not empty else None, allow_pickle=False)
        return loaded

    return ExampleStore(
        conversations=tuple(meta["conversations"]),
        first=array("first"),
        start=array("start"),
        prompt_len=array("prompt_len"),
        turn=array("turn"),
        way=array("way"),
        ids=array("ids"),
        weights=array("weights"),
        rejects=tuple(Reject(**reject) for reject in meta["rejects"]),
        notes=meta["notes"],
        key=key,
    )
