"""`graft data import` from files, folders and the hub's layouts to the canonical file, and back."""

import gzip
import json
import os
import random
import string
import sys
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from graft.cli.main import main
from graft.config.data import Source
from graft.data.layout.columns import infer_columns, rename
from graft.data.load import load_sources, stream_sources
from graft.data.reading.read import open_address, read_rows
from graft.data.tally import MAX_KINDS, Tally
from graft.data.write import SUFFIXES, encode_line, write_conversations
from graft.errors import ConfigError, GraftError, InputError
from graft.types import Conversation, Message, Origin, Reject

QA = [{"question": f"q{n} 你", "answer": f"a{n}"} for n in range(3)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def load(path: Path | str, **settings: Any) -> list[Conversation]:
    loaded = load_sources([Source.model_validate({"path": str(path), **settings})])
    assert not loaded.rejects, loaded.rejects[0]
    return loaded.conversations


def pairs(conversations: list[Conversation]) -> list[tuple[str, ...]]:
    return [tuple(message.content for message in item.messages) for item in conversations]


EXPECTED = [(row["question"], row["answer"]) for row in QA]


def sheet(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        page = book.create_sheet(name)
        for row in rows:
            page.append(row)
    book.save(path)
    return path


@pytest.fixture
def graft(monkeypatch, capsys):
    """Run a command line; returns (exit code, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["graft", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        said = capsys.readouterr()
        return int(code), said.out, said.err

    return run


# Files --------------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    text = lines(tmp_path / "a.jsonl", QA).read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text[:60]) + gzip.compress(text[60:]))
    packer = zstandard.ZstdCompressor()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(text[:60]) + packer.compress(text[60:]))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(QA).encode()))
    cells = "question,answer\n" + "".join(f"{q},{a}\n" for q, a in EXPECTED)
    (tmp_path / "a.csv.zst").write_bytes(packer.compress(cells.encode()))
    sheet(tmp_path / "a.xlsx", First=[["question", "answer"], *map(list, EXPECTED)])
    table = pa.Table.from_pylist(QA)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    read = {path.name: pairs(load(path)) for path in tmp_path.iterdir()}
    assert len(read) == 9
    assert read == dict.fromkeys(read, EXPECTED)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_that_was_cut_short_is_never_taken_for_whole(tmp_path, packing):
    chance = random.Random(0)
    rows = [{"question": "".join(chance.choices(string.ascii_letters, k=500)), "answer": "a"} for _ in range(2000)]
    write_conversations(tmp_path / f"whole.jsonl{packing}", load(lines(tmp_path / "a.jsonl", rows)))
    whole = (tmp_path / f"whole.jsonl{packing}").read_bytes()
    for cut in (len(whole) // 2, len(whole) - 3):
        path = tmp_path / f"cut{cut}.jsonl{packing}"
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=f"not a whole {packing[1:]} file"):
            load(path)


def test_sheets_are_named_and_numbers_are_text(tmp_path):
    path = sheet(
        tmp_path / "book.xlsx",
        First=[["问题", "答案", None], ["二加二?", 4], [None, None], ["Half?", 0.5, "x"]],
        Second=[["question", "answer"], ["q", True], ["when?", 2024.0]],
    )
    assert [row.value for row in read_rows(path) if not isinstance(row.value, Reject)] == [
        {"问题": "二加二?", "答案": "4"}
    ]
    rejected = [row.value for row in read_rows(path) if isinstance(row.value, Reject)]
    assert [(item.line, item.reason) for item in rejected] == [(4, "the row has 3 cells, the header 2")]
    second = [row.value for row in read_rows(f"{path}#Second")]
    assert second == [{"question": "q", "answer": True}, {"question": "when?", "answer": "2024"}]
    with pytest.raises(InputError, match="no sheet `Third`; its sheets are First, Second"):
        load(f"{path}#Third")
    (tmp_path / "odd#1.csv").write_text("question,answer\nq,a\n")
    assert pairs(load(tmp_path / "odd#1.csv")) == [("q", "a")]


def test_text_files_are_one_conversation_each(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("# Three")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.txt").write_bytes(b"ok\nb\xffd")
    (tmp_path / ".hidden.txt").write_text("no")
    loaded = load_sources([Source(path=str(tmp_path))])
    assert [(item.id, item.text) for item in loaded.conversations] == [("b:1", "one\ntwo"), ("a:1", "# Three")]
    assert [(Path(item.file).name, item.reason) for item in loaded.rejects] == [
        ("bad.txt", "byte 0xff in line 2 is not UTF-8; save the file as UTF-8")
    ]
    assert loaded.decisions[0] == f"{tmp_path}: text: 2 of 3 rows have text"


def test_a_text_file_that_is_a_table_is_not_learnt_by_heart(tmp_path):
    path = tmp_path / "news.txt"
    path.write_text("".join(f"title {n}\t{n % 3}\n" for n in range(50)))
    with pytest.raises(
        InputError, match=r"50 lines of 2 cells.*rename it to news\.tsv.*graft data prompts.*format: text"
    ):
        load(path)
    assert load(path, format="text")[0].text == path.read_text()


# Folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_sorted_order_and_what_is_left_out_is_said(tmp_path):
    lines(tmp_path / "b.jsonl", QA[1:2])
    lines(tmp_path / "a" / "z.jsonl", QA[:1])
    lines(tmp_path / "c.jsonl", QA[2:])
    (tmp_path / "README.md").write_text("# Not data")
    (tmp_path / "dataset_info.json").write_text("{}")
    loaded = load_sources([Source(path=str(tmp_path))])
    assert pairs(loaded.conversations) == EXPECTED
    assert loaded.decisions[0] == f"{tmp_path}: 3 files read, 1 left out"
    with pytest.raises(InputError, match=r"b\.jsonl: named twice"):
        load_sources([Source(path=str(tmp_path)), Source(path=str(tmp_path / "b.jsonl"))])


def test_train_and_test_are_never_read_as_one(tmp_path):
    lines(tmp_path / "data" / "train-00000-of-00001.jsonl", QA[:2])
    lines(tmp_path / "data" / "test-00000-of-00001.jsonl", QA[2:])
    with pytest.raises(InputError, match=r"splits test \(1 file\), train \(1 file\); name one"):
        load(tmp_path)
    assert pairs(load(f"{tmp_path}#train")) == EXPECTED[:2]
    assert pairs(load(f"{tmp_path}#test")) == EXPECTED[2:]
    with pytest.raises(InputError, match="no files of the split `val`; it has test"):
        load(f"{tmp_path}#val")


def test_folders_that_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(QA)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    both = datasets.DatasetDict({"train": one, "test": one.select([2])})
    both.save_to_disk(tmp_path / "both")
    assert pairs(load(tmp_path / "one")) == EXPECTED
    assert pairs(load(f"{tmp_path / 'both'}#test")) == EXPECTED[2:]
    with pytest.raises(InputError, match="has the splits train, test; name one"):
        load(tmp_path / "both")
    with pytest.raises(InputError, match="no split `dev`"):
        load(f"{tmp_path / 'both'}#dev")


# The hub ------------------------------------------------------------------------------------------------------------


def test_a_clone_of_a_hub_set_is_read_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines(tmp_path / "set" / "big" / "train.jsonl", QA)
    lines(tmp_path / "set" / "big" / "test.jsonl", QA[2:])
    lines(tmp_path / "set" / "small" / "train.jsonl", QA[:1])
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: big\n  data_files:\n  - {split: train, path: big/train.jsonl}\n"
        "  - {split: test, path: big/test.jsonl}\n- config_name: small\n  data_files: small/train.jsonl\n---\n"
    )
    address = f"hf:{tmp_path / 'set'}"
    found = load(f"{address}:big#train")
    assert pairs(found) == EXPECTED
    assert found[1].origin == Origin(f"{address}:big#train", 2)
    assert pairs(load(f"{address}:small")) == EXPECTED[:1]
    with pytest.raises(InputError, match=r"has the splits train, test; name one, for example hf:.*#train"):
        load(f"{address}:big")
    with pytest.raises(InputError, match="no split `tset`; did you mean `test`"):
        load(f"{address}:big#tset")
    with pytest.raises(InputError, match=r"cannot be loaded .*big.*small"):
        load(address)
    for part, numbers in (("[:2]", [1, 2]), ("[1:2]", [2]), ("[2:]", [3]), ("[:100]", [1, 2, 3])):
        found = load(f"{address}:big#train{part}")
        assert [item.origin.line for item in found] == numbers
        assert pairs(found) == [EXPECTED[number - 1] for number in numbers]
    with pytest.raises(InputError, match=r"a part of a split is named by row numbers, such as #train\[:1000\]"):
        load(f"{address}:big#train[:10%]")


def test_a_description_beside_data_is_passed_over_by_name(tmp_path, graft):
    lines(tmp_path / "set" / "a.jsonl", QA)
    (tmp_path / "set" / "SOURCE.json").write_text('{"repo": "x",\n "files": [{"file": "a.jsonl"}]}')
    (tmp_path / "set" / "names.json").write_text('["one", "two"]')
    loaded = load_sources([Source(path=str(tmp_path / "set"))])
    assert pairs(loaded.conversations) == EXPECTED
    assert loaded.read == 3
    for name, why in (("SOURCE.json", "one object with repo, files"), ("names.json", "the row is text, not an object")):
        (note,) = [note for note in loaded.decisions if name in note]
        assert f"passed over, it holds no rows of data ({why}" in note
    with pytest.raises(InputError, match="no format fits the columns repo, files"):
        load(tmp_path / "set" / "SOURCE.json")  # named by itself it is no bystander
    (tmp_path / "set" / "one.json").write_text(
        '{"question": "q",\n "answer": "a"}'
    )  # one object that is a row is a row
    assert len(load(tmp_path / "set")) == 4
    (tmp_path / "set" / "a.jsonl").write_text('{"x": 1}\n{"x": 2}\n')  # rows that fit nothing are never passed over
    with pytest.raises(InputError, match="a.jsonl: no format fits the columns x"):
        load(tmp_path / "set")
    for path in ("a.jsonl", "one.json"):
        (tmp_path / "set" / path).unlink()
    with pytest.raises(InputError):
        load(tmp_path / "set")


def test_what_the_hub_client_says_of_its_retries_is_not_for_the_user(graft, tmp_path, monkeypatch):
    import logging

    from graft.data.reading import hub

    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    code, _, err = graft("data", "import", "hf:nobody/nothing#train", "--out", tmp_path / "o.jsonl")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert logging.getLogger("huggingface_hub").level == logging.ERROR
    assert hub.parse_address("hf:a/b:c@d#e[:3]").split == "e[:3]"


def test_a_hub_set_offline_or_without_the_library_says_what_to_do(monkeypatch):
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set: name a local clone"):
        load("hf:nobody/nothing#train")
    with pytest.raises(InputError, match="is written hf:owner/name"):
        load("hf:@main")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'graft-llm\[hub\]'"):
        load("hf:owner/name")


# Columns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["problem", "solution", "level"], {"question": "problem", "answer": "solution"}),
        (["prompt", "text"], {"question": "prompt", "answer": "text"}),
        (["input", "target", "content"], {"question": "input", "answer": "target"}),
        (["Question", " ANSWER "], {"question": "Question", "answer": " ANSWER "}),
        (["问题", "回答", "系统"], {"question": "问题", "answer": "回答", "system": "系统"}),
        (["指令", "输入", "输出"], {"instruction": "指令", "input": "输入", "output": "输出"}),
        (["instruction", "input", "targets"], {"instruction": "instruction", "input": "input", "output": "targets"}),
        (["Messages", "Topic"], {"messages": "Messages"}),
        (["text", "label"], {}),
        (["sentence", "label"], {}),
    ],
)
def test_columns_by_other_names(names, found):
    assert infer_columns(names, "f") == found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["problem", "solution", "answers"], "answers and solution could each be the answer"),
        (["prompt", "problem", "target"], "prompt and problem could each be the question"),
        (["Text", "text", "prompt"], "Text and text could each be the text"),
    ],
)
def test_two_columns_for_one_thing_are_asked_about(names, said):
    with pytest.raises(InputError, match=f"f: its columns {said}; say which: --columns"):
        infer_columns(names, "f", Source(path="f").by_options())
    with pytest.raises(InputError, match=f"{said}; say which: `data: .{{path: f, columns:"):
        infer_columns(names, "f", Source(path="f"))


def test_columns_that_the_user_names(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"frage": "q", "antwort": "a", "answer": "no"}] * 2)
    loaded = load_sources([Source(path=str(path), columns={"question": "frage", "answer": "antwort"})])
    assert pairs(loaded.conversations) == [("q", "a")] * 2
    assert loaded.conversations[0].meta == {"other_answer": "no"}
    assert loaded.decisions == [
        f"{path}: columns read (as asked) as question=frage, answer=antwort",
        f"{path}: question-answer: 2 of 2 rows have frage, antwort",
        f"{path}: columns that go along as meta: other_answer",
    ]
    with pytest.raises(InputError, match="no such column; did you mean `antwort`"):
        load(path, columns={"answer": "antwrt"})
    bad = lines(tmp_path / "b.jsonl", [{"frage": "q", "antwort": 3}, {"frage": "q", "antwort": "a"}])
    loaded = load_sources([Source(path=str(bad), columns={"question": "frage", "answer": "antwort"})])
    assert [(item.field, item.reason) for item in loaded.rejects] == [("antwort", "is a number, not text")]
    with pytest.raises(ValueError, match="did you mean `question`"):
        Source(path="x", columns={"qestion": "frage"})
    with pytest.raises(ValueError, match="read from one"):
        Source(path="x", columns={"question": "a", "answer": "a"})
    assert rename({"a": 1, "b": 2, "other_b": 3}, {"b": "a"}) == {"b": 1, "other_b_": 2, "other_b": 3}


def test_a_system_prompt_beside_is_read_and_survives_as_meta(tmp_path):
    row = {"system_prompt": "Be brief.", "question": "q", "response": "a"}
    path = lines(tmp_path / "a.jsonl", [row, row | {"system_prompt": ""}])
    assert pairs(load(path)) == [("Be brief.", "q", "a"), ("q", "a")]
    kept = load(lines(tmp_path / "b.jsonl", [row | {"system": "S"}]))
    assert kept[0].meta == {"system_prompt": "Be brief."}
    write_conversations(tmp_path / "c.jsonl", kept)
    again = load(tmp_path / "c.jsonl")
    assert (again[0].messages, again[0].meta) == (kept[0].messages, kept[0].meta)


def test_the_advice_for_rows_that_fit_nothing(tmp_path):
    for rows, said in (
        ([{"review": "x", "stars": 1}], "looks like a labelled set: `graft data prompts`"),
        ([{"id": 1, "question": "q"}], "questions without answers: `graft data import --questions` keeps them"),
        ([{"review": "x"}], "--columns text=review"),
    ):
        with pytest.raises(InputError, match=said):
            load(lines(tmp_path / "a.jsonl", rows))
    (tmp_path / "a.csv").write_text('"3","T N pension","Unions"\n"4","The race","SPACE"\n')
    with pytest.raises(InputError, match="columns column_1, column_2, column_3; its first line names no columns"):
        load(tmp_path / "a.csv")
    assert pairs(load(tmp_path / "a.csv", columns={"question": "column_2", "answer": "column_3"})) == [
        ("T N pension", "Unions"),
        ("The race", "SPACE"),
    ]


def test_questions_alone_where_no_answer_is_needed(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"id": 1, "question": "q"}, {"id": 2, "question": "r", "answer": None}])
    tally = Tally()
    found = list(stream_sources([Source(path=str(path))], tally, require_answer=False))
    assert [item.messages for item in found] == [(Message("user", "q"),), (Message("user", "r"),)]
    assert tally.decisions == [f"{path}: question-answer: 2 of 2 rows have question"]


def test_without_a_check_turns_come_in_any_order(tmp_path):
    row = {"conversations": [{"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]}
    path = lines(tmp_path / "a.jsonl", [row])
    assert [type(item) for item in stream_sources([Source(path=str(path))], Tally())] == [Reject]
    (found,) = stream_sources([Source(path=str(path))], Tally(), check=False)
    assert [message.content for message in found.messages] == ["a", "b"]


# The canonical file ---------------------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, None, "ü"]}}, "id": "c"}
ODD = [
    Conversation("a", Origin("", 0), (Message("user", "q\u202e\u2028\x85\x1b[1m"), Message("assistant", "a"))),
    Conversation("b", Origin("", 0), text="raw\ufefftext", meta={"text": "x", "meta": {"y": None}}),
    Conversation(
        "c",
        Origin("", 0),
        (
            Message("system", "s"),
            Message("user", "q", name="ann"),
            Message("assistant", "", "hm", (CALL,), weight=0.5),
            Message("tool", "<tool_response>3</tool_response>", tool_call_id="c"),
            Message("assistant", '<think>t</think>x\n<tool_call>{"name": "f"}</tool_call>'),
        ),
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        meta={"label": False, "topic": "t", "n": 1, "deep": [{"a": []}], "system_prompt": "p", "rejected": "r"},
    ),
]


def bare(item: Conversation) -> tuple[Any, ...]:
    return item.id, item.messages, item.tools, item.text, item.meta


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_everything_written_loads_back_equal_and_the_same_rows_give_the_same_bytes(tmp_path, suffix):
    assert write_conversations(tmp_path / f"a{suffix}", iter(ODD)) == 3
    assert list(map(bare, load(tmp_path / f"a{suffix}"))) == list(map(bare, ODD))
    write_conversations(tmp_path / f"b{suffix}", ODD)
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_lines_can_be_read_by_a_person():
    line = encode_line({"a": "你好 \U0001f469\u200d\U0001f4bb", "b": "q\u202e\u2028\x85\x1b\x7f"})
    assert line.decode() == '{"a": "你好 \U0001f469\u200d\U0001f4bb", "b": "q\\u202e\\u2028\\u0085\\u001b\\u007f"}\n'
    assert json.loads(line)["b"] == "q\u202e\u2028\x85\x1b\x7f"


def test_a_name_that_says_no_layout_is_refused_before_anything_is_read(tmp_path):
    for name in ("a.json", "a", "a.csv", "a.parquet.gz"):
        with pytest.raises(InputError, match=r"written as \.jsonl"):
            write_conversations(tmp_path / name, ODD)
    assert list(tmp_path.iterdir()) == []


def test_a_stream_that_fails_leaves_no_file(tmp_path):
    def failing():
        yield ODD[0]
        raise InputError("stop")

    for suffix in SUFFIXES:
        with pytest.raises(InputError, match="stop"):
            write_conversations(tmp_path / f"a{suffix}", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_tally_stays_small_and_counts_all():
    tally = Tally()
    for number in range(3 * MAX_KINDS):
        tally.reject(Reject("f", number, "", f"unlike {string.ascii_letters[number % 50]} {chr(200 + number)}"))
        tally.reject(Reject("f", number, "", f"like {number}"))
    assert tally.read == tally.rejected == sum(tally.reasons.values()) == 6 * MAX_KINDS
    assert len(tally.first) <= MAX_KINDS + 1
    assert tally.commonest(1)[0][0] == 3 * MAX_KINDS


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_import_writes_what_the_name_says(graft, tmp_path, suffix):
    path = lines(tmp_path / "a.jsonl", [*QA, {"question": "q", "answer": " "}])
    out = tmp_path / f"all{suffix}"
    code, said, _ = graft("data", "import", path, "--out", out, "--max-rejected", "0.3", "--json")
    assert code == 0
    assert json.loads(said) | {"decisions": [], "notes": []} == {
        **{"read": 4, "kept": 3, "rejected": 1, "decisions": [], "notes": []},
        **{"written": {str(out): 3}, "rejects": str(tmp_path / "all.rejects.jsonl")},
    }
    assert pairs(load(out)) == EXPECTED
    assert out.read_bytes()[:4] == {".gz": b"\x1f\x8b\x08\x00", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}.get(
        out.suffix, b'{"id'
    )
    assert json.loads((tmp_path / "all.rejects.jsonl").read_text())["reason"] == "empty answer"


def test_import_refused_lists_the_rejects_and_writes_nothing(graft, tmp_path):
    path = lines(tmp_path / "a.jsonl", [*QA, {"question": "q", "answer": " "}])
    code, _, err = graft("data", "import", path, "--out", tmp_path / "o.jsonl")
    assert code == 3
    assert "1 of 4 rows (25.0%)" in err
    assert not (tmp_path / "o.jsonl").exists()
    assert len((tmp_path / "o.rejects.jsonl").read_text().splitlines()) == 1


def test_import_with_columns_and_questions(graft, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"frage": "q"}, {"frage": "r"}])
    code, said, err = graft(
        "data", "import", path, "--out", tmp_path / "o.jsonl", "--questions", "--columns", "question=frage"
    )
    assert (code, "2 rows read, 2 kept, 0 rejected" in said) == (0, True), err
    assert "question=frage" in err
    for columns in ("frage", "question=", "quest=frage"):
        code, _, err = graft("data", "import", path, "--out", tmp_path / "p.jsonl", "--columns", columns)
        assert code == 2
        assert "columns" in err


def test_import_never_writes_into_what_it_reads(graft, tmp_path):
    path = lines(tmp_path / "in" / "a.jsonl", QA)
    for out in (path, tmp_path / "in" / "b.jsonl"):
        code, _, err = graft("data", "import", tmp_path / "in", path.with_name("none"), "--out", out)
        assert code == 2
        assert "choose another --out" in err


def test_import_never_writes_two_files_into_one(graft, tmp_path):
    source = lines(tmp_path / "a.jsonl", QA)
    code, _, said = graft("data", "import", source, "--out", tmp_path / "b.jsonl", "--rejects", tmp_path / "b.jsonl")
    assert code == 2
    assert "two files would be written there" in said
    assert not (tmp_path / "b.jsonl").exists()


@pytest.mark.parametrize("command", ["import", "clean", "split"])
def test_what_is_no_file_is_refused_and_never_waited_for(graft, tmp_path, command):
    loop, dangling, pipe = (tmp_path / f"{name}.jsonl" for name in ("loop", "dangling", "pipe"))
    loop.symlink_to(loop)
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    for path, words in ((loop, "is a link to"), (dangling, "is a link to"), (pipe, "is a pipe or a device")):
        code, _, said = graft("data", command, path, "--out", tmp_path / "new" / "b.jsonl")
        assert code == 2, said
        assert words in said.replace("\n", " ")
    code, _, said = graft("data", command, lines(tmp_path / "a.jsonl", QA), "--out", loop)
    assert code == (2 if command == "split" else 0), said  # a file takes the link's place


def test_a_long_setting_is_no_file_name(graft, tmp_path):
    source = lines(tmp_path / "a.jsonl", QA)
    rule = f"rules.rules=[{{name: long, pattern: 'q1|{'x' * 300}', action: drop}}]"
    code, said, _ = graft("data", "clean", source, "--out", tmp_path / "b.jsonl", rule, "--json")
    assert code == 0
    assert (json.loads(said)["read"], json.loads(said)["kept"]) == (3, 2)


def test_what_a_file_says_cannot_command_the_terminal(graft, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"\x1b[31mred\u202e": "x", "y": "z"}])
    code, _, err = graft("data", "import", path, "--out", tmp_path / "o.jsonl")
    assert code == 2
    assert "␛[31mred⟨U+202E⟩" in err
    assert "\x1b[31m" not in err
    assert "\u202e" not in err


# Fuzzing ------------------------------------------------------------------------------------------------------------

ROWS: dict[str, list[dict[str, Any]]] = {
    "preference": [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"input": {"messages": [{"role": "user", "content": "q"}]}, "preferred_output": [], "non_preferred_output": []},
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "rejected_response": "b",
        },
    ],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "3"}]},
                {"role": "assistant", "content": "<think>t</think>x<tool_call>{'name': 'f'}</tool_call>", "weight": 1},
            ],
            "tools": [{"name": "f", "input_schema": {}}],
            "label": True,
        }
    ],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": "{}"}'},
                {"from": "observation", "value": "<tool_response>1</tool_response><tool_response>2</tool_response>"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f"}]',
            "system": "s",
        }
    ],
    "alpaca": [
        {"instruction": "i", "input": "n", "output": "o", "history": [["q", "a"]]},
        {"instruction": "i", "instances": [{"input": "n", "output": "o"}]},
    ],
    "prompt-completion": [{"prompt": [{"role": "user", "content": "q"}], "completion": "a", "images": []}],
    "question-answer": [{"query": "q", "response": "a", "history": '[["q", "a"]]', "system_prompt": "s"}],
    "text": [{"text": "t", "id": 3, "meta": {}}],
}
ATOMS = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e300,
        "",
        " ",
        "x",
        "你",
        "\u202e",
        "<think>",
        "</think>",
        "<tool_call>",
        "{}",
        "[]",
    ),
    *("\n\nHuman: x", "<tool_call>{</tool_call>", '[{"role": "user", "content": "q"}]', [], {}, [None], [[]], {"": []}),
    *("role", "user", "assistant", "tool", "system", "gpt", "tool_result", "tool_use", "\ud800"),
]


def mutate(value: Any, chance: random.Random) -> Any:
    """The value with something in it replaced, left out, doubled or moved under another key."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        what = chance.random()
        if what < 0.7:
            changed[key] = mutate(value[key], chance)
        elif what < 0.85:
            del changed[key]
        else:
            changed[chance.choice([*value, "content", "messages", "tools", "x"])] = changed.pop(key)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        what = chance.random()
        middle = [mutate(value[at], chance)] if what < 0.7 else [] if what < 0.85 else [value[at]] * 2
        return [*value[:at], *middle, *value[at + 1 :]]
    if isinstance(value, str) and value and chance.random() < 0.3:
        at = chance.randrange(len(value))
        return value[:at] + chance.choice(["", "\x00", '"', "}", "é", value]) + value[at + 1 :]
    return chance.choice(ATOMS)


@pytest.mark.parametrize("form", list(ROWS))
def test_ten_thousand_mutated_rows_are_each_kept_or_rejected(tmp_path, form):
    chance = random.Random(form)  # a text seeds by its own bytes: the same rows everywhere
    rows: list[bytes] = []
    for number in range(10_000):
        row = ROWS[form][number % len(ROWS[form])]
        for _ in range(chance.randrange(1, 4)):
            row = mutate(row, chance)
        line = json.dumps(row, ensure_ascii=chance.random() < 0.5).encode(errors="replace")
        if chance.random() < 0.1 and len(line) > 2:
            at = chance.randrange(len(line))
            line = line[:at] + bytes([chance.choice([0, 34, 92, 123, 128, 255])]) + line[at + 1 :]
        rows.append(line.replace(b"\n", b" ") or b"x")
    rows[:20] = [json.dumps(ROWS[form][0]).encode()] * 20
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    filled = sum(bool(row.strip()) for row in rows)
    tally = Tally()
    given: list[Conversation | Reject] = list(
        stream_sources([Source.model_validate({"path": str(path), "format": form})], tally)
    )
    kept = [item for item in given if isinstance(item, Conversation)]
    assert tally.kept + tally.rejected == tally.read == len(given) == filled
    assert tally.kept == len(kept) > 500
    assert tally.rejected > 1000
    assert all(item.reason for item in given if isinstance(item, Reject))
    write_conversations(tmp_path / "again.jsonl", kept)
    assert list(map(bare, load(tmp_path / "again.jsonl"))) == list(map(bare, kept))


@pytest.mark.parametrize(
    "suffix", [".csv", ".tsv", ".json", ".txt", ".xlsx", ".parquet", ".arrow", ".jsonl.gz", ".jsonl.zst"]
)
def test_damaged_files_are_read_or_refused_never_a_traceback(tmp_path, suffix):
    whole = tmp_path / f"whole{suffix}"
    cells = [[row["question"], row["answer"]] for row in QA] * 20
    table = pa.Table.from_pylist(QA * 20)
    if suffix in (".csv", ".tsv"):
        sign = "," if suffix == ".csv" else "\t"
        whole.write_text("".join(sign.join(row) + "\n" for row in [["question", "answer"], *cells]))
    elif suffix == ".xlsx":
        sheet(whole, First=[["question", "answer"], *cells])
    elif suffix == ".parquet":
        pq.write_table(table, whole)
    elif suffix == ".arrow":
        with pa.OSFile(str(whole), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif suffix.startswith(".jsonl"):
        write_conversations(whole, load(lines(tmp_path / "a.jsonl", QA * 20)))
    else:
        whole.write_text(json.dumps(QA * 20, ensure_ascii=False))
    data, chance, refused, read = whole.read_bytes(), random.Random(suffix), 0, 0
    path = tmp_path / f"damaged{suffix}"
    for _ in range(60 if suffix == ".xlsx" else 200):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged if chance.random() < 0.7 else damaged[: chance.randrange(len(damaged))])
        tally = Tally()
        try:
            given = list(stream_sources([Source(path=str(path))], tally))
        except GraftError:
            refused += 1
        else:
            read += 1
            assert tally.kept + tally.rejected == tally.read == len(given) > 0
    assert refused + read
    assert refused, "nothing was damaged"


def test_an_address_names_its_parts(tmp_path):
    lines(tmp_path / "a.jsonl", QA)
    opened = open_address(str(tmp_path))
    assert [part.name for part in opened.parts] == [str(tmp_path / "a.jsonl")]
    with pytest.raises(InputError, match="only an .xlsx file has sheets"):
        open_address(f"{tmp_path / 'a.jsonl'}#x")
    assert issubclass(ConfigError, GraftError)
