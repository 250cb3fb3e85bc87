"""The store: what was encoded once is the same as encoding it again, and nothing stale is ever met."""

import shutil

import numpy as np
import pytest
from tiny import CHATML, make_conversations, make_tokenizer, write_rows

from graft.config.data import Source
from graft.config.train import Encode
from graft.data.load import load_sources
from graft.tokens import store
from graft.tokens.encode import encode_all
from graft.tokens.load import load_renderer
from graft.tokens.store import encode_stored, store_key


def conversations_of(tmp_path, rows=None, name="data.jsonl"):
    rows = make_conversations() if rows is None else rows
    return load_sources([Source(path=write_rows(tmp_path / name, rows))]).conversations


def renderer_of(tmp_path, chat_template=CHATML, date="2026-01-01", name="tokenizer"):
    folder = tmp_path / name
    make_tokenizer(chat_template).save_pretrained(folder)
    return load_renderer(str(folder), date=date)


def as_tuples(examples):
    return [(e.conversation, e.turn, e.ids.tolist(), e.weights.tolist(), e.prompt_len, e.way) for e in examples]


def test_a_stored_set_is_the_encoded_set(tmp_path):
    rows = make_conversations()
    rows[2]["messages"][1]["weight"] = 0.5
    conversations, renderer = conversations_of(tmp_path, rows), renderer_of(tmp_path)
    texts = conversations_of(tmp_path, [{"id": "raw", "text": "孩子不肯按时吃饭"}], "texts.jsonl")
    for part in (conversations, texts):
        encoded = encode_all(part, renderer, Encode(max_length=64))
        stored = encode_stored(part, renderer, Encode(max_length=64))
        assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(encoded.examples)
        assert len(encoded.examples) >= len(part)
        assert stored.conversations == tuple(c.id for c in part)
        again = encode_stored(part, renderer, Encode(max_length=64))
        assert isinstance(again.ids, np.memmap)
        assert as_tuples(again.examples(range(len(again)))) == as_tuples(encoded.examples)


def test_the_second_time_nothing_is_encoded_and_deleting_the_cache_changes_nothing(tmp_path, monkeypatch):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    first = encode_stored(conversations, renderer, Encode(max_length=24))
    assert first.rejects, "the set must have rejects, or their round trip says nothing"
    with monkeypatch.context() as patch:
        patch.setattr(store, "encode_each", lambda *_: pytest.fail("encoded again"))
        second = encode_stored(conversations, renderer, Encode(max_length=24))
    assert (second.rejects, second.notes) == (first.rejects, first.notes)
    shutil.rmtree(tmp_path / "cache")
    third = encode_stored(conversations, renderer, Encode(max_length=24))
    assert third.key == first.key
    assert as_tuples(third.examples(range(len(third)))) == as_tuples(first.examples(range(len(first))))


def test_everything_that_shapes_ids_changes_the_key(tmp_path, monkeypatch):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    key = store_key(conversations, renderer, Encode())
    changed = conversations_of(tmp_path, [*make_conversations(39), {"id": "x", "text": "other"}][:39], "data.jsonl")
    other = make_conversations()
    other[5]["messages"][1]["content"] += "!"
    keys = {
        "fewer rows": store_key(changed, renderer, Encode()),
        "one character": store_key(conversations_of(tmp_path, other), renderer, Encode()),
        "order": store_key(conversations[::-1], renderer, Encode()),
        "template": store_key(conversations, renderer_of(tmp_path, CHATML + " ", name="t2"), Encode()),
        "max_length": store_key(conversations, renderer, Encode(max_length=64)),
        "train_on": store_key(conversations, renderer, Encode(train_on="last_turn")),
        "overlong": store_key(conversations, renderer, Encode(overlong="drop_oldest_turns")),
    }
    monkeypatch.setattr(store, "ENCODER_VERSION", 99)
    keys["encoder"] = store_key(conversations, renderer, Encode())
    assert len({key, *keys.values()}) == 1 + len(keys), keys


def test_what_shapes_nothing_does_not_change_the_key(tmp_path):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    key = store_key(conversations, renderer, Encode())
    assert (
        store_key(conversations, renderer_of(tmp_path, date="2030-12-31", name="t3"), Encode(date="2030-12-31")) == key
    )
    dated = CHATML.replace("<|im_start|>assistant\n", "{{ strftime_now('%Y') }}<|im_start|>assistant\n")
    one, other = (renderer_of(tmp_path, dated, date, name=date) for date in ("2026-01-01", "2030-01-01"))
    assert store_key(conversations, one, Encode()) != store_key(conversations, other, Encode()), "it writes the date"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "file" / "cache"))
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    stored = encode_stored(conversations, renderer, Encode())
    assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(
        encode_all(conversations, renderer, Encode()).examples
    )


def test_a_half_written_entry_is_not_read(tmp_path):
    conversations, renderer = conversations_of(tmp_path), renderer_of(tmp_path)
    key = store_key(conversations, renderer, Encode())
    half = tmp_path / "cache" / key
    half.mkdir(parents=True)
    (half / "ids.npy").write_bytes(b"torn")
    stored = encode_stored(conversations, renderer, Encode())
    assert as_tuples(stored.examples(range(len(stored)))) == as_tuples(
        encode_all(conversations, renderer, Encode()).examples
    )
    assert (half / "meta.json").is_file(), "it was replaced"
