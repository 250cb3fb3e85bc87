"""Encoded examples on disk, memory-mapped: encoded once, then shared by every run and rank that wants the same ids.

The key is a hash of everything that shapes the ids (conversations, tokenizer, template, settings, encoder version), so
a changed template cannot meet old tokens, and deleting the cache changes nothing but the time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graft.config.train import Encode
from graft.console import warn_once
from graft.runs import fsync_folder, write_atomic
from graft.tokens.encode import Encoded, encode_all
from graft.tokens.renderer import Renderer
from graft.types import Conversation, Example, FloatArray, IntArray, Reject

ENCODER_VERSION = 1
"""Raised whenever the same conversation would be encoded to other ids."""

WAYS = ("template", "composed", "text")


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


def encode_stored(conversations: Sequence[Conversation], renderer: Renderer, settings: Encode) -> ExampleStore:
    """Encode conversations, or map what an earlier run encoded from exactly the same."""
    key = store_key(conversations, renderer, settings)
    folder = cache_folder() / key
    if not (folder / "meta.json").is_file():
        encoded = encode_all(conversations, renderer, settings)
        try:
            _write(folder, encoded)
        except OSError as error:
            warn_once(f"{folder.parent}: encoded data cannot be cached ({error.strerror}); set GRAFT_CACHE to a folder")
            with tempfile.TemporaryDirectory() as aside:
                _write(Path(aside) / key, encoded)
                return _read(Path(aside) / key, key, mapped=False)
    return _read(folder, key, mapped=True)


def store_key(conversations: Iterable[Conversation], renderer: Renderer, settings: Encode) -> str:
    """Hash of everything that shapes the ids."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (str(ENCODER_VERSION), renderer.fingerprint(), settings.model_dump_json(exclude={"date"})):
        digest.update(part.encode() + b"\0")
    for conversation in conversations:
        digest.update(repr(conversation).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where encoded data is kept: $GRAFT_CACHE, else the user's cache folder."""
    if "GRAFT_CACHE" in os.environ:
        return Path(os.environ["GRAFT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graft" / "encoded"


def _write(folder: Path, encoded: Encoded) -> None:
    """Write beside and rename, so that two runs that encode the same data at once cannot tear each other's files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, array in _arrays(encoded.examples).items():
            np.save(aside / f"{name}.npy", array)
        meta = {
            "conversations": list(dict.fromkeys(example.conversation for example in encoded.examples)),
            "rejects": [asdict(reject) for reject in encoded.rejects],
            "notes": dict(encoded.notes),
        }
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


def _arrays(examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
    changes = [
        e for e, example in enumerate(examples) if e == 0 or example.conversation != examples[e - 1].conversation
    ]
    return {
        "first": np.array([*changes, len(examples)], np.int64),
        "start": np.cumsum([0, *(len(example.ids) for example in examples)], dtype=np.int64),
        "prompt_len": np.array([example.prompt_len for example in examples], np.int32),
        "turn": np.array([example.turn for example in examples], np.int32),
        "way": np.array([WAYS.index(example.way) for example in examples], np.int32),
        "ids": np.concatenate([np.empty(0, np.int32), *(example.ids for example in examples)]),
        "weights": np.concatenate([np.empty(0, np.float32), *(example.weights for example in examples)]),
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
