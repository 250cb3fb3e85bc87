"""Sources to conversations and back: nothing is lost or counted twice, whatever the rows hold."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.config.data import Source
from graft.data.layout.formats import FORMATS, RESERVED, detect, to_conversation
from graft.data.load import load_sources, refuse_if_too_many, write_rejects
from graft.data.write import as_row, write_conversations
from graft.errors import DataRefused, GraftError, InputError
from graft.types import Conversation, Message, Origin, Reject
from graft.words import counted, one_or_many


def source(path: Path, form: str = "auto") -> Source:
    return Source.model_validate({"path": str(path), "format": form})


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def comparable(conversations: list[Conversation]) -> list[Conversation]:
    """Without what names the file that was read last."""
    return [replace(item, origin=Origin("", 0), source="") for item in conversations]


REAL = [
    ("domain-bloom/domain.train.json", "alpaca", 1666, 0),
    ("domain-bloom/domain.test.json", "alpaca", 13, 0),
    ("llamafactory_demos/alpaca_en_demo.json", "alpaca", 999, 0),
    ("llamafactory_demos/alpaca_zh_demo.json", "alpaca", 1000, 0),
    ("llamafactory_demos/identity.json", "alpaca", 91, 0),
    ("llamafactory_demos/c4_demo.jsonl", "text", 300, 0),
    ("llamafactory_demos/glaive_toolcall_en_demo.json", "sharegpt", 300, 0),
    ("llamafactory_demos/glaive_toolcall_zh_demo.json", "sharegpt", 300, 2),  # observations without a call
    ("llamafactory_demos/reason_tool_use_demo_50.jsonl", "messages", 50, 0),
    ("llamafactory_demos/v1_sft_demo.jsonl", "messages", 500, 0),
    ("llamafactory_demos/dpo_en_demo.json", "preference", 300, 0),
    ("llamafactory_demos/dpo_zh_demo.json", "preference", 300, 0),
    ("llamafactory_demos/v1_dpo_demo.jsonl", "preference", 10, 0),
    ("llamafactory_demos/kto_en_demo.json", "messages", 300, 150),  # answers that are not wanted
    ("llamafactory_demos/wiki_demo.txt", "text", 1, 0),
    ("self-instruct/seed_tasks.jsonl", "alpaca", 175, 0),
    ("self-instruct/user_oriented_instructions.jsonl", "alpaca", 252, 0),
    ("self-instruct/text-davinci-003_predictions.jsonl", "alpaca", 252, 0),
    ("stanford_alpaca/alpaca_5000.json", "alpaca", 5000, 2),  # empty answers
    ("fastchat/dummy_conversation.json", "sharegpt", 500, 0),
    ("llama-lora-fine-tuning/dummy_cn.json", "sharegpt", 910, 0),
    ("llama-lora-fine-tuning/dummy_en.json", "sharegpt", 910, 0),
    ("llama-lora-fine-tuning/test.json", "sharegpt", 1, 0),
    ("conversations60/conversations.jsonl", "messages", 60, 1),  # an empty answer
    ("gsm8k/test.jsonl", "question-answer", 1319, 0),
    ("domain-self-instruct/train_data_家庭教育.jsonl", "question-answer", 499, 0),
    ("domain-self-instruct/train_data_自我认知.jsonl", "question-answer", 26, 0),
    ("ms_swift_format_samples/alpaca.csv", "alpaca", 3, 0),
    ("ms_swift_format_samples/alpaca.jsonl", "alpaca", 3, 0),
    ("ms_swift_format_samples/alpaca2.csv", "alpaca", 3, 0),
    ("ms_swift_format_samples/chatml.jsonl", "messages", 3, 0),
    ("ms_swift_format_samples/conversations.jsonl", "sharegpt", 3, 0),
    ("ms_swift_format_samples/multi_modal_1.jsonl", "question-answer", 3, 0),
    ("ms_swift_format_samples/multi_modal_2.jsonl", "question-answer", 3, 3),  # pictures
    ("ms_swift_format_samples/multi_modal_3.jsonl", "question-answer", 3, 3),
    ("ms_swift_format_samples/swift_pre.csv", "text", 3, 0),
    ("ms_swift_format_samples/swift_pre.jsonl", "text", 3, 0),
    ("ms_swift_format_samples/sharegpt.jsonl", "sharegpt", 3, 0),
    ("ms_swift_format_samples/swift_multi.json", "question-answer", 3, 0),
    ("ms_swift_format_samples/swift_multi.jsonl", "question-answer", 3, 0),
    ("ms_swift_format_samples/swift_single.csv", "question-answer", 3, 0),
    ("ms_swift_format_samples/swift_single.jsonl", "question-answer", 3, 0),
]


@pytest.mark.parametrize(("name", "form", "read", "rejected"), REAL)
def test_real_files_are_read_unconfigured_and_survive_a_round_trip(material, tmp_path, name, form, read, rejected):
    path = material / "data" / name
    loaded = load_sources([source(path)])
    assert (loaded.read, len(loaded.rejects)) == (read, rejected)
    assert len(loaded.conversations) == read - rejected
    evidence = {
        f"{path}: {form}: {read} of {counted(read, 'row')} {one_or_many(read, 'has', 'have')} {', '.join(columns)}"
        for columns in FORMATS[form].columns
    }
    assert loaded.decisions[0] in evidence
    assert len({item.id for item in loaded.conversations}) == read - rejected
    if loaded.conversations:
        for name in ("again.jsonl", "again.parquet"):
            write_conversations(tmp_path / name, loaded.conversations)
            again = load_sources([source(tmp_path / name)])
            assert not again.rejects
            assert comparable(again.conversations) == comparable(loaded.conversations)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("banking77/train.csv", "with `category` it looks like a labelled set: `graft data prompts`"),
        (
            "chnsenticorp_etc/ChnSentiCorp_htl_all.csv",
            "with `label` it looks like a labelled set: `graft data prompts`",
        ),
        ("dialogsum/dialogsum.dev.jsonl", "with `summary` it looks like a labelled set: `graft data prompts`"),
        ("ag_news/test.csv", "its first line names no columns, so they are called column_1"),
        ("sst2/dev.tsv", "its first line names no columns, so they are called column_1"),
        ("thucnews_titles/dev.txt", "10000 lines of 2 cells each, it is a table: rename it to dev.tsv"),
        ("imdb_sample/imdb_sample.csv", "--columns text=review --out FILE, to learn it by heart"),
        (
            "domain-self-instruct/seed_question_家庭教育.jsonl",
            "questions without answers: `graft data import --questions`",
        ),
        ("banking77/categories.json", "the row is text, not an object"),
    ],
)
def test_real_files_that_are_no_conversations_say_what_to_do(material, name, said):
    with pytest.raises(InputError) as error:
        load_sources([source(material / "data" / name)])
    assert said in str(error.value)


def test_real_tool_calls_and_reasoning_arrive(material):
    data = material / "data" / "llamafactory_demos"
    loaded = load_sources([source(data / "glaive_toolcall_en_demo.json")])
    calls = [call for item in loaded.conversations for message in item.messages for call in message.tool_calls]
    assert len(calls) == 211
    assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
    assert sum(bool(item.tools) for item in loaded.conversations) == 191
    loaded = load_sources([source(data / "reason_tool_use_demo_50.jsonl")])
    answers = [message for item in loaded.conversations for message in item.messages if message.role == "assistant"]
    assert len(answers) == sum(bool(message.reasoning) for message in answers) == 112
    assert sum(len(message.tool_calls) for message in answers) == 41 + 2 * 9 + 3 * 3


def test_several_sources_have_unique_ids_and_their_own_formats(tmp_path):
    (tmp_path / "sub").mkdir()
    qa, alpaca = {"question": "q", "answer": "a"}, {"instruction": "q", "output": "a", "id": "x"}
    first = write_rows(tmp_path / "data.jsonl", [qa, alpaca | {"question": "q", "answer": "a"}, qa])
    second = write_rows(tmp_path / "sub" / "data.jsonl", [alpaca, alpaca, alpaca | {"id": "x#2"}])
    third = write_rows(tmp_path / "sub" / "data.json", [qa | {"id": ""}, qa | {"id": "x"}])
    loaded = load_sources([source(first), source(second, "alpaca"), source(third)])
    assert [item.id for item in loaded.conversations] == [
        *("data:1", "x", "data:3"),
        *("x#2", "x#3", "x#2#2"),
        *("data:1#2", "x#4"),
    ]
    assert [item.source for item in loaded.conversations] == [str(first)] * 3 + [str(second)] * 3 + [str(third)] * 2
    assert loaded.decisions == [
        f"{first}: question-answer: 3 of 3 rows have question, answer",
        f"{first}: columns that go along as meta: instruction, output",
        f"{second}: alpaca (as asked): 3 of 3 rows have instruction, output",
        f"{third}: question-answer: 2 of 2 rows have question, answer",
    ]
    with pytest.raises(InputError, match="named twice"):
        load_sources([source(first), source(tmp_path / "sub" / ".." / "data.jsonl")])


def test_rejects_name_file_line_field_and_reason(tmp_path):
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "mood": 1}]}
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(good)] * 6 + ['{"messages": [', json.dumps({"messages": []}), json.dumps({"other": 1})]
    path.write_text("\n".join(lines))
    loaded = load_sources([source(path)])
    assert loaded.read == 9
    assert len(loaded.conversations) == 6
    places = [(reject.file, reject.line, reject.field) for reject in loaded.rejects]
    assert places == [(str(path), 7, ""), (str(path), 8, "messages"), (str(path), 9, "messages")]
    assert loaded.decisions == [
        f"{path}: messages: 7 of 9 rows have messages",
        f"{path}: keys of messages that graft has no use for: mood (6 rows)",
    ]
    write_rejects(tmp_path / "rejects.jsonl", loaded.rejects)
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [tuple(row) for row in written] == [("file", "line", "field", "reason")] * 3
    assert [Reject(**row) for row in written] == loaded.rejects


def test_a_file_without_a_readable_row_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n[\nnot json\n")
    with pytest.raises(InputError, match="none of its 3 rows can be read; the first, line 1: broken JSON at column 2"):
        load_sources([source(path)])


def test_the_format_is_decided_by_readable_rows_behind_broken_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("broken\n" * 150 + '{"question": "q", "answer": "a"}\n' * 3)
    loaded = load_sources([source(path)])
    assert (loaded.read, len(loaded.rejects), len(loaded.conversations)) == (153, 150, 3)


def test_too_many_rejects_are_refused_with_numbers_reasons_and_next_step():
    def rejects(count: int, reason: str) -> list[Reject]:
        return [Reject("a.jsonl", 10 + n, "messages[1]", reason.replace("N", str(n))) for n in range(count)]

    some = rejects(4, "empty answer") + rejects(9, "broken at column N") + rejects(1, "x") + rejects(2, "y")
    refuse_if_too_many([], 0, 0.0)
    refuse_if_too_many(some, 1600, 0.01)
    with pytest.raises(DataRefused) as error:
        refuse_if_too_many(some, 1599, 0.01)
    assert str(error.value).splitlines() == [
        "16 of 1599 rows (1.0%) were rejected, max_rejected allows 1.0%",
        "  9 x messages[1]: broken at column 0  (first at a.jsonl:10)",
        "  4 x messages[1]: empty answer  (first at a.jsonl:10)",
        "  2 x messages[1]: y  (first at a.jsonl:10)",
        "correct the rows, or go on without them: max_rejected=0.011 (--max-rejected 0.011 for graft data)",
    ]
    refuse_if_too_many(some, 1599, 0.011)  # the advice works
    with pytest.raises(DataRefused, match="nothing is left"):
        refuse_if_too_many(some, 16, 1.0)


def test_the_canonical_row():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    conversation = Conversation(
        "id-1",
        Origin("a", 1),
        messages=(
            Message("user", "Hi", name="ann"),
            Message("assistant", "", reasoning="hm", tool_calls=(call,), weight=0.5),
            Message("tool", "3", tool_call_id="c"),
            Message("assistant", "<think>a</think>b"),
        ),
        tools=({"type": "function", "function": {"name": "f"}},),
        meta={"topic": "x", "output": "y", "meta": 3},
    )
    assert as_row(conversation) == {
        "id": "id-1",
        "messages": [
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call], "weight": 0.5},
            {"role": "tool", "content": "3", "tool_call_id": "c"},
            {"role": "assistant", "content": "<think>a</think>b", "reasoning_content": ""},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "topic": "x",
        "meta": {"output": "y", "meta": 3},
    }


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_conversations(tmp_path / "file" / "a.jsonl", [])


def test_the_examples_of_the_docs_are_detected_and_kept():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    examples = re.findall(r"^\*\*([\w-]+)\*\* .*?```json\n(.*?)```", page, re.DOTALL | re.MULTILINE)
    assert sorted(name for name, _ in examples) == sorted(FORMATS)
    for name, block in examples:
        decoder, rest, rows = json.JSONDecoder(), block.strip(), []
        while rest:
            row, end = decoder.raw_decode(rest)
            rows.append(row)
            rest = rest[end:].strip()
        for row in rows:
            assert detect([row], "docs").name == name
            assert isinstance(to_conversation(FORMATS[name], row, Origin("docs", 1), ""), Conversation)


def mutations(value: Any, odd: list[Any]) -> Iterator[Any]:
    """The value with each of its parts in turn replaced by each odd one, or left out."""
    yield from odd
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        for other in mutations(item, odd):
            changed = value.copy()
            changed[key] = other
            yield changed
        changed = value.copy()
        del changed[key]
        yield changed


WHOLE: dict[str, dict[str, Any]] = {
    "alpaca": {"id": 1, "instruction": "i", "input": "n", "output": "o", "history": [["q", "a"]], "system": "s"},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    },
    "messages": {
        "id": "x",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "r",
                "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"},
            {"role": "assistant", "content": "<think>t</think>a", "weight": 0.5},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "meta": {"topic": "t"},
    },
    "prompt-completion": {"prompt": [{"role": "user", "content": "q"}], "completion": "a"},
    "question-answer": {"question": "q", "answer": "a", "history": []},
    "text": {"text": "t", "label": 1},
}


@pytest.mark.parametrize("form", list(WHOLE))
def test_mutated_rows_are_kept_or_rejected_with_a_reason_and_survive_a_round_trip(tmp_path, form):
    odd = [
        None,
        True,
        0,
        -1.5,
        "",
        " ",
        "x",
        "[",
        '[{"role": "user", "content": "q"}]',
        [],
        [None],
        [[]],
        {},
        {"a": []},
    ]
    rows = [WHOLE[form], *mutations(WHOLE[form], odd)]
    loaded = load_sources([source(write_rows(tmp_path / "a.jsonl", rows), form)])
    assert len(loaded.conversations) + len(loaded.rejects) == loaded.read == len(rows)
    assert len(loaded.conversations) > 10
    assert len(loaded.rejects) > 20
    assert all(reject.reason and (reject.field or "the row is" in reject.reason) for reject in loaded.rejects)
    write_conversations(tmp_path / "again.jsonl", loaded.conversations)
    again = load_sources([source(tmp_path / "again.jsonl")])
    assert again.rejects == []
    assert comparable(again.conversations) == comparable(loaded.conversations)


# Property tests -------------------------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
short = st.text(max_size=6) | st.sampled_from(["", " ", "<think>a</think>b", "你好", '{"name": "f", "arguments": {}}'])
role = st.sampled_from(
    ["system", "user", "assistant", "tool", "human", "gpt", "function_call", "observation", "critic"]
)
call = st.fixed_dictionaries({}, optional={"function": anything, "name": short, "arguments": anything})
turn = anything | st.fixed_dictionaries(
    {},
    optional={
        "role": role,
        "from": role,
        "content": short | anything | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": short})),
        "value": short,
        "reasoning_content": short | anything,
        "tool_calls": st.lists(call, max_size=2) | anything,
        "weight": anything,
        "train": anything,
        "name": anything,
    },
)
column = st.sampled_from(sorted(RESERVED)) | st.sampled_from(["question", "answer", "topic"])
row = anything | st.dictionaries(column, anything | short | st.lists(turn, max_size=4), max_size=6)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=8), form=st.sampled_from(["auto", *FORMATS]))
def test_any_rows_are_kept_rejected_or_refused_never_lost(tmp_path_factory, rows, form):
    folder = tmp_path_factory.getbasetemp()
    path = write_rows(folder / "fuzz.jsonl", rows)
    try:
        loaded = load_sources([source(path, form)])
    except GraftError:
        return
    # a lone `[...]` line is a json list by another name
    assert loaded.read == len(rows) or (len(rows) == 1 and loaded.read == len(rows[0]))
    assert len(loaded.conversations) + len(loaded.rejects) == loaded.read
    if loaded.conversations:
        write_conversations(folder / "fuzz-again.jsonl", loaded.conversations)
        again = load_sources([source(folder / "fuzz-again.jsonl")])
        assert comparable(again.conversations) == comparable(loaded.conversations)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Any conversation that a format can make."""
    finite = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6)
    objects = st.dictionaries(st.text(max_size=4), finite | st.lists(finite, max_size=2), max_size=3)
    meta = draw(st.dictionaries(column | st.text(max_size=4), finite | objects, max_size=4))
    name = draw(st.text(min_size=1, max_size=8))
    if draw(st.integers(0, 3)) == 0:
        return Conversation(name, Origin("", 0), text=draw(st.text().filter(str.strip)), meta=meta)
    messages = [Message("system", draw(short))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        calls = tuple(
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in draw(st.lists(st.tuples(st.text(max_size=4), objects), max_size=2))
        )
        content = draw(short if calls else short.filter(str.strip))
        if draw(st.booleans()):
            content = "<think>kept as content</think>" + content + "."
        reasoning = draw(st.none() | st.text(max_size=5).filter(str.strip))
        weight = draw(st.none() | st.floats(0, 9))
        messages.append(Message("user", draw(short), name=draw(st.none() | short)))
        messages.append(Message("assistant", content, reasoning, calls, weight=weight))
        if calls and draw(st.booleans()):
            messages.append(Message("tool", draw(short), tool_call_id=draw(st.none() | short)))
            messages.append(Message("assistant", "done"))
    tools = tuple({"type": "function", "function": item} for item in draw(st.lists(objects, max_size=2)))
    return Conversation(name, Origin("", 0), tuple(messages), tools, meta=meta)


@settings(max_examples=100, deadline=None)
@given(items=st.lists(conversations(), min_size=1, max_size=4, unique_by=lambda item: item.id))
def test_every_conversation_survives_a_round_trip(tmp_path_factory, items):
    path = tmp_path_factory.getbasetemp() / "round.jsonl"
    write_conversations(path, items)
    loaded = load_sources([source(path)])
    assert loaded.rejects == []
    assert comparable(loaded.conversations) == comparable(items)
