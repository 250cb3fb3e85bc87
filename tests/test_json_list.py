"""A json list is read element by element, and comes out as if it had been decoded at once."""

import io
import json
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.reading import json_list
from graft.data.reading.json_list import ListError, stream_list
from graft.data.reading.read import read_rows
from graft.data.values import parse_json
from graft.errors import InputError
from graft.types import Reject

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def small_chunks(monkeypatch):
    """Every element, escape and character is cut somewhere."""
    monkeypatch.setattr(json_list, "CHUNK", 3)


def both(text: str) -> tuple[object, object]:
    """What streaming and decoding at once make of a text: values with their types, or the line and column of a flaw."""
    try:
        streamed: object = repr(list(stream_list(io.BytesIO(text.encode(errors="surrogatepass")))))
    except ListError as error:
        streamed = error.line
    try:
        value = parse_json(text)
        at_once: object = repr(value) if isinstance(value, list) else 1
    except json.JSONDecodeError as error:
        at_once = error.lineno
    return streamed, at_once


@settings(max_examples=300, deadline=None)
@given(st.lists(json_values, max_size=6), st.sampled_from([None, 1]), st.booleans())
def test_streamed_equals_decoded_at_once(values, indent, ascii_only):
    before, json_list.CHUNK = json_list.CHUNK, 5
    try:
        streamed, at_once = both(json.dumps(values, indent=indent, ensure_ascii=ascii_only))
        assert streamed == at_once
        assert isinstance(at_once, str)
    finally:
        json_list.CHUNK = before


NUMBERS = "[0, -0, -0.0, 1.0, 1E5, 0.1, 123456789012345678901234567890, 1e-320, 3.141592653589793238, NaN, 12]"


@pytest.mark.parametrize("chunk", range(1, 40))
def test_numbers_are_those_of_json_wherever_they_are_cut(monkeypatch, chunk):
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    streamed, at_once = both(NUMBERS)
    assert streamed == at_once
    assert "123456789012345678901234567890" in at_once


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_a_flaw_is_found_on_the_same_line(seed, chunk):
    chance = random.Random(seed)
    rows = [{"a": chance.random(), "b": "x\\ny 你 😀", "c": [1, None, True]} for _ in range(4)]
    text = json.dumps(rows, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
    at = chance.randrange(len(text))
    text = chance.choice([text[:at], text[:at] + chance.choice('[]{},:"\n1x\\') + text[at + chance.randrange(2) :]])
    before, json_list.CHUNK = json_list.CHUNK, chunk
    try:
        streamed, at_once = both(text)
    finally:
        json_list.CHUNK = before
    assert streamed == at_once, text


def test_the_broken_line_is_named_after_the_rows_before_it(tmp_path, small_chunks):
    path = tmp_path / "a.json"
    lines = [json.dumps({"n": number}) for number in range(10)]
    lines[5] = '{"n": 5,, "m": 1}'
    path.write_text("[" + ",\n".join(lines) + "]")
    rows = read_rows(path)
    assert [next(rows).value for _ in range(5)] == [{"n": number} for number in range(5)]
    with pytest.raises(InputError, match=r"a\.json, line 6: broken JSON at column 9 \(Expecting property name"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"a": 1},\n {"a": 2},\n]', ", line 3: broken JSON at column 1"),
        (b'[{"a": 1},\n {"a": "x\n"}]', ", line 2: broken JSON at column 10 (Invalid control character"),
        (b'[{"a": 1}\n {"a": 2}]', ", line 2: broken JSON at column 2 (Expecting ',' delimiter)"),
        (b'[{"a": 1},\n\n {"a": 2}', ", line 3: broken JSON at column 10"),
        (b'[{"a": 1},\n{}] {"a": 2}', ", line 2: broken JSON at column 5 (Extra data)"),
        (b'[{"a": 1},\n\xe4\xbd\xa0\n {"a": "\xb0\xa1"}]', ", line 3: byte 0xb0 is not UTF-8"),
        (b'[{"a": 1},\n {"a": "\xe4\xbd', ", line 2: byte 0xe4 is not UTF-8"),
        (b'[{"a": 1},\n {"a": 1e999}]', ", line 2: unusable JSON (the number 1e999 is too large)"),
        (b"[" * 100_000, "nested more than 100 levels deep"),
    ],
)
def test_every_flaw_has_its_line(tmp_path, small_chunks, content, said):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    if content.startswith(b"[["):
        json_list.CHUNK = 1 << 20  # deep, not cut
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert said in str(error.value)


def test_lone_halves_of_characters_cost_their_row_only(tmp_path, small_chunks):
    path = tmp_path / "a.json"
    path.write_text('[{"a": "\\ud83d"}, {"a": "\\ud83d\\ude00"}, 7]')
    rows = [row.value for row in read_rows(path)]
    assert isinstance(rows[0], Reject)
    assert "surrogate" in rows[0].reason
    assert rows[1] == {"a": "😀"}
    assert isinstance(rows[2], Reject)
    assert rows[2].reason == "the row is a number, not an object with columns"


def test_memory_does_not_grow_with_the_list(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 500}], "n": 1})
    path = tmp_path / "a.json"
    peaks = []
    for count in (10_000, 40_000):
        path.write_text("[" + ", ".join([row] * count) + "]")  # one line
        tracemalloc.start()
        assert sum(1 for _ in read_rows(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < path.stat().st_size
