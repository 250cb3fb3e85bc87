"""Files of rows: places are right, a broken row costs only itself, a broken file says what to do."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.reading.read import READERS, read_rows
from graft.errors import InputError
from graft.types import Origin, Reject


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list:
    """Rows as (line, columns), or (line, field, reason) where rejected."""
    return [
        (row.origin.line, row.value.field, row.value.reason)
        if isinstance(row.value, Reject)
        else (row.origin.line, row.value)
        for row in read_rows(path)
    ]


def test_jsonl_passes_over_blank_lines_bom_and_carriage_returns_and_keeps_line_numbers(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe4\xbd\xa0"}')
    assert values(path) == [(1, {"a": 1}), (4, {"a": "你"})]
    assert next(read_rows(path)).origin == Origin(str(path), 1)


def test_unicode_line_ends_inside_text_do_not_end_a_line(tmp_path):
    text = "one\u2028two\u2029three\x85four"
    path = write(tmp_path, "a.jsonl", json.dumps({"a": text}, ensure_ascii=False) + '\n{"a": 2}\n')
    assert values(path) == [(1, {"a": text}), (2, {"a": 2})]


def test_broken_json_in_line_7_is_one_reject_with_its_column(tmp_path):
    lines = [json.dumps({"n": number}) for number in range(1, 11)]
    lines[6] = '{"n": 7,, "m": 1}'
    rows = values(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert len(rows) == 10
    line, field, reason = rows[6]
    assert (line, field) == (7, "")
    assert reason.startswith("broken JSON at column 9: ")
    assert [row for row in rows if len(row) == 2] == [(n, {"n": n}) for n in range(1, 11) if n != 7]


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"a": "\xb0\xa1"}', "", "byte 0xb0 at column 8 is not UTF-8; save the file as UTF-8"),
        (b"[1, 2]", "", "the row is a list, not an object with columns"),
        (b"null", "", "the row is null, not an object with columns"),
        (b'{"a": Infinity}', "", "unusable JSON: Infinity is not JSON"),
        (b'{"a": 1e999}', "", "unusable JSON: the number 1e999 is too large"),
        (b'{"a": {"b": ["x", "\\ud83d"]}}', "a.b[1]", "half of a surrogate pair (U+D83D) at character 1 is no text"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}", "a" + "[0]" * 99, "nested more than 100 levels deep"),
        (b'{"a": ' + b"[" * 90000 + b"]" * 90000 + b"}", "", "unusable JSON: nested more than 100 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "", None),
    ],
)
def test_a_line_that_cannot_be_used_names_place_and_reason(tmp_path, line, field, reason):
    rows = values(write(tmp_path, "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n'))
    assert rows[0] == (1, {"a": 1})
    assert rows[2] == (3, {"a": 3})
    assert rows[1][:2] == (2, field)
    assert rows[1][2] == reason or (reason is None and rows[1][2].startswith("unusable JSON: "))


def test_nan_is_a_missing_value(tmp_path):
    assert values(write(tmp_path, "a.jsonl", '{"a": NaN, "b": 1.5}')) == [(1, {"a": None, "b": 1.5})]


@pytest.mark.parametrize(
    "content",
    [
        '[{"a": 1}, {"a": 2}]',
        '[\n  {"a": 1},\n\n  {"a": 2}\n]\n',
        '{"data": [{"a": 1}, {"a": 2}], "version": "1"}',
        '{\n "train": [{"a": 1},\n {"a": 2}]\n}',
        '{"a": 1}\n{"a": 2}\n',
    ],
)
def test_json_may_be_a_list_a_wrapped_list_or_lines(tmp_path, content):
    assert values(write(tmp_path, "a.json", content)) == [(1, {"a": 1}), (2, {"a": 2})]
    assert values(write(tmp_path, "bom.json", b"\xef\xbb\xbf" + content.encode())) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_json_list_may_be_called_jsonl(tmp_path):
    assert values(write(tmp_path, "a.jsonl", '[\n{"a": 1},\n{"a": 2}\n]')) == [(1, {"a": 1}), (2, {"a": 2})]


def test_one_object_is_one_row(tmp_path):
    assert values(write(tmp_path, "a.json", '{"a": 1,\n "b": ["x"]}')) == [(1, {"a": 1, "b": ["x"]})]


def test_json_lines_whose_first_is_broken_are_still_lines(tmp_path):
    rows = values(write(tmp_path, "a.json", '{"a": \n{"a": 2}\n'))
    assert rows[0][0] == 1
    assert rows[0][2].startswith("broken JSON")
    assert rows[1] == (2, {"a": 2})


def test_csv_keeps_quoted_newlines_and_counts_lines(tmp_path):
    content = '\ufeffq,answer\nhi,"two\nlines, ""quoted"""\n\nbye,x\nlong,a,b\nend,z\n'
    assert values(write(tmp_path, "a.csv", content)) == [
        (2, {"q": "hi", "answer": 'two\nlines, "quoted"'}),
        (5, {"q": "bye", "answer": "x"}),
        (6, "", "the row has 3 cells, the header 2"),
        (7, {"q": "end", "answer": "z"}),
    ]


def test_csv_bytes_that_are_not_utf8_cost_their_row_only(tmp_path):
    rows = values(write(tmp_path, "a.csv", b"q,a\nx,\xb0\xa1\ny,z\n"))
    assert rows == [(2, "a", "byte 0xb0 is not UTF-8; save the file as UTF-8"), (3, {"q": "y", "a": "z"})]


def test_csv_broken_quotes_cost_their_row_only_and_long_cells_are_read(tmp_path):
    long = "x" * 200_000
    rows = values(write(tmp_path, "a.csv", f'q,a\n"a" b,c\ny,{long}\n'))
    assert rows[0][:2] == (2, "")
    assert "double the quotes" in rows[0][2]
    assert rows[1] == (3, {"q": "y", "a": long})


def test_tsv_and_nameless_columns(tmp_path):
    assert values(write(tmp_path, "a.tsv", "\tq\n0\ta, b\n")) == [(2, {"column_1": "0", "q": "a, b"})]


def test_parquet_equals_the_jsonl_of_the_same_rows(tmp_path):
    rows = [{"id": n, "messages": [{"role": "user", "content": f"你 {n}"}], "score": n / 2} for n in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    lines = write(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert values(tmp_path / "a.parquet") == values(lines)
    assert len(values(lines)) == 2500


def test_parquet_values_that_json_lacks(tmp_path):
    import datetime
    import decimal

    table = pa.table(
        {
            "day": [datetime.date(2024, 2, 29), None],
            "price": [decimal.Decimal("1.50"), None],
            "raw": [b"text", b"\xff"],
            "x": [float("nan"), 1.0],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [
        (1, {"day": "2024-02-29", "price": "1.50", "raw": "text", "x": None}),
        (2, "raw", "1 bytes that are not UTF-8 text"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("bom.json", b"\xef\xbb\xbf", "is empty"),
        ("list.json", b"[]", "is empty"),
        ("header.csv", b"a,b\n", "is empty"),
        ("twice.csv", b"a,b,a\n1,2,3\n", "`a` more than once"),
        ("broken.json", b'[{"a": 1},\n {"a": }]', "broken.json, line 2: broken JSON at column 8"),
        ("gbk.json", b'[{"a": 1},\n {"a": "\xb0\xa1"}]', "gbk.json, line 2: byte 0xb0 is not UTF-8"),
        ("inf.json", b'[{"a": -Infinity}]', "-Infinity is not JSON"),
        ("number.json", b"42", "holds a number, not rows"),
        ("several.json", b'{"data": [{}], "train": [{}]}', "several lists (data, train)"),
        ("wide.jsonl", b"\xff\xfe{\x00}\x00", "UTF-16"),
        ("a.xls", b"PK", "unknown suffix `.xls`; graft reads .jsonl"),
        ("a.xlsx", b"PK", "not a whole xlsx file"),
        ("a.arrow", b"ARROW1nonsense", "not a whole arrow file"),
        ("stream.arrow", b"nonsense", "not a whole arrow file"),
        ("a.jsonl.gz", b"nonsense", "not a whole gz file"),
        ("a.jsonl.zst", b"nonsense", "not a whole zst file"),
        ("a.parquet.gz", b"nonsense", "unpack it first"),
        ("blank.txt", b" \n", "is empty"),
        ("none", b"{}", "unknown suffix ``"),
        ("a.parquet", b"PAR1nonsense", "not a whole parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        list(read_rows(path))
    assert said in str(error.value)
    assert str(error.value).startswith(str(path))


def test_missing_files_and_folders_say_what_to_do(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(InputError, match=r"no such file; did you mean .*train\.jsonl\?"):
        read_rows(tmp_path / "trian.jsonl")
    with pytest.raises(InputError, match="no such file; check the path"):
        read_rows(tmp_path / "zzzz.csv")
    with pytest.raises(InputError, match="no folder"):
        read_rows(tmp_path / "nowhere" / "a.jsonl")
    assert [row.value for row in read_rows(tmp_path)] == [{}]
    (tmp_path / "sub.jsonl").mkdir()
    with pytest.raises(InputError, match="folder without data files"):
        read_rows(tmp_path / "sub.jsonl")


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=80), suffix=st.sampled_from(sorted(READERS)))
def test_no_bytes_make_a_traceback(tmp_path_factory, content, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(content)
    try:
        rows = list(read_rows(path))
    except InputError:
        return
    assert rows
    for row in rows:
        if isinstance(row.value, Reject):
            assert (row.value.file, row.value.line) == (row.origin.file, row.origin.line)
        else:
            json.dumps(row.value, ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_text_in_another_encoding_is_named_as_what_it_is(tmp_path, encoding):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "hello"}\n'.encode(encoding))
    with pytest.raises(InputError, match=f"is {encoding.upper()} text; .* iconv -f {encoding.upper()}"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("question;answer", "a, b?;c"),
        ("question\tanswer", "a, b?\tc"),
        ("question,answer", '"a, b?",c'),
        ('"question";"answer"', '"a, b?";"c"'),
    ],
)
def test_a_csv_tells_by_its_header_what_stands_between_cells(tmp_path, header, row):
    path = tmp_path / "a.csv"
    path.write_text(f"\n{header}\n{row}\n", encoding="utf-8-sig")
    (raw,) = read_rows(path)
    assert raw.value == {"question": "a, b?", "answer": "c"}


def test_a_semicolon_in_a_quoted_name_separates_nothing(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"text; long"\n"one; two"\n')
    (raw,) = read_rows(path)
    assert raw.value == {"text; long": "one; two"}
