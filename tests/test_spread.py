"""Encoding in several processes, into files that grow: the same bytes as in one process and in memory."""

import dataclasses
import errno

import numpy as np
import pytest
from test_store import as_tuples, conversations_of, renderer_of
from tiny import make_conversations

from graft.config.train import Encode
from graft.errors import InputError
from graft.tokens import columns, spread, store
from graft.tokens.columns import Columns, Unwritable
from graft.tokens.encode import encode_all
from graft.tokens.store import encode_stored, store_key


def test_any_number_of_processes_gives_the_same_files(tmp_path, monkeypatch):
    rows = make_conversations(40)
    rows[3]["messages"][1]["content"] = "y" * 5000
    rows += [{"id": f"raw{n}", "text": "孩子不肯按时吃饭 " * n} for n in range(3)]
    conversations, renderer = [], renderer_of(tmp_path)
    for number in range(20):
        part = conversations_of(tmp_path, [row for row in rows if "text" not in row], f"{number}.jsonl")
        conversations += [dataclasses.replace(c, id=f"{number}:{c.id}") for c in part]
    conversations += conversations_of(tmp_path, rows[-3:], "texts.jsonl")
    assert len(conversations) > 2 * spread.CHUNK
    files = {}
    for workers in (1, 2, 3):
        monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / f"cache{workers}"))
        stored = encode_stored(conversations, renderer, Encode(max_length=64), workers)
        folder = tmp_path / f"cache{workers}" / stored.key
        files[workers] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert files[1] == files[2] == files[3]
    assert stored.rejects
    encoded = encode_all(conversations, renderer, Encode(max_length=64))
    assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(encoded.examples)
    assert (stored.rejects, dict(stored.notes)) == (encoded.rejects, encoded.notes)
    assert len(stored) + len(stored.rejects) == len(conversations), "kept + rejected = read"


def test_processes_are_taken_where_they_pay(monkeypatch):
    monkeypatch.setattr(spread, "usable_workers", lambda: 4)
    assert [spread.default_workers(n * spread.PER_WORKER) for n in (0, 1, 2, 3, 100)] == [1, 1, 2, 3, 4]


class ReadTwice:
    """Conversations that are made as they are needed, as from a file."""

    def __init__(self, conversations):
        self.conversations = conversations

    def __len__(self):
        return len(self.conversations)

    def __contains__(self, item):
        raise AssertionError("nobody searches")

    def __iter__(self):
        for conversation in self.conversations:
            yield dataclasses.replace(conversation)


def test_conversations_need_not_be_in_memory(tmp_path):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    stored = encode_stored(ReadTwice(conversations), renderer, Encode())
    assert stored.key == store_key(conversations, renderer, Encode())
    assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(
        encode_all(conversations, renderer, Encode()).examples
    )


def test_every_part_of_a_message_is_in_the_key(tmp_path):
    (first, *_), renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    other = {"role": "tool", "tool_calls": ({"function": {"name": "f"}},), "weight": 0.5}
    keys = {store_key([first], renderer, Encode())}
    for field in dataclasses.fields(first.messages[0]):
        changed = dataclasses.replace(first.messages[0], **{field.name: other.get(field.name, "another")})
        keys.add(store_key([dataclasses.replace(first, messages=(changed, *first.messages[1:]))], renderer, Encode()))
    assert len(keys) == 1 + len(dataclasses.fields(first.messages[0]))


def test_columns_are_numpy_files(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "PENDING", 3)
    with Columns(tmp_path, {"numbers": np.int64, "parts": np.float32, "none": np.int32}) as written:
        for number in range(10):
            written.add("numbers", [number])
            written.add("parts", np.full(number, number, np.float32))
    assert np.load(tmp_path / "numbers.npy").tolist() == list(range(10))
    parts = np.load(tmp_path / "parts.npy", mmap_mode="r")
    assert parts.tolist() == [float(n) for n in range(10) for _ in range(n)]
    assert parts.dtype == np.float32
    assert len(np.load(tmp_path / "none.npy")) == 0


def test_a_full_disk_is_said_and_costs_time_only(tmp_path, monkeypatch):
    """The cache's disk fills in the middle: the data is encoded again elsewhere; with no room there, that is said."""
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    honest, full = columns._Column.add, [str(tmp_path / "cache")]

    def add(self, values):
        if any(self._file.name.startswith(place) for place in full) and self._length + len(values) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(self, values)

    monkeypatch.setattr(columns._Column, "add", add)
    stored = encode_stored(conversations, renderer, Encode())
    assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(
        encode_all(conversations, renderer, Encode()).examples
    )
    assert not list((tmp_path / "cache").iterdir()), "nothing half-written stays"
    full.append("/")
    with pytest.raises(InputError, match="No space left"):
        encode_stored(conversations, renderer, Encode(max_length=100))


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)

    def broken(*_):
        raise FileNotFoundError(2, "the data is gone")
        yield

    monkeypatch.setattr(store, "encode_each", broken)
    with pytest.raises(FileNotFoundError, match="the data is gone"):
        encode_stored(conversations, renderer, Encode())
    with pytest.raises(Unwritable):
        Columns(tmp_path / "absent", {"a": np.int32})
