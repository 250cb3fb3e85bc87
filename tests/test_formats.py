"""Each format's rows become exactly the expected turns; rows that do not fit say which field and why."""

import json
from typing import get_args

import pytest

from graft.config.data import Format as FormatName
from graft.data.layout.formats import FORMATS, check_asked, detect, to_conversation
from graft.data.layout.turns import split_think
from graft.errors import InputError
from graft.types import Conversation, Message, Origin, Reject

PLACE = Origin("some/file.jsonl", 7)


def read(form: str, **row) -> Conversation | Reject:
    return to_conversation(FORMATS[form], row, PLACE, "some/file.jsonl")


def turns(form: str, **row) -> list[Message]:
    result = read(form, **row)
    assert isinstance(result, Conversation), result
    return list(result.messages)


def rejected(form: str, **row) -> tuple[str, str]:
    result = read(form, **row)
    assert isinstance(result, Reject), result
    assert (result.file, result.line) == ("some/file.jsonl", 7)
    return result.field, result.reason


def chat(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello")


def test_the_settings_know_every_format():
    assert {"auto", *FORMATS} == set(get_args(FormatName))


def test_alpaca():
    assert turns("alpaca", instruction="Hi", input="", output="Hello") == [USER, ANSWER]
    assert turns("alpaca", instruction="Hi", input=None, output="Hello", history=None, system="") == [USER, ANSWER]
    assert turns(
        "alpaca",
        instruction="Add",
        input="1, 2",
        output="3",
        history=[["Hi", "Hello"]],
        system="Be brief.",
    ) == [SYSTEM, USER, ANSWER, Message("user", "Add\n1, 2"), Message("assistant", "3")]
    assert turns("alpaca", instruction="Q", context="C", response="A")[0] == Message("user", "Q\nC")
    assert turns("alpaca", instruction="Hi", output="Hello", history='[["Hi", "Hello"]]') == [USER, ANSWER] * 2


def test_sharegpt():
    row = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    assert turns("sharegpt", conversations=row) == [SYSTEM, USER, ANSWER]
    assert turns("sharegpt", conversations=json.dumps(row)) == [SYSTEM, USER, ANSWER]
    assert turns("sharegpt", conversation=row[1:], system="Be brief.") == [SYSTEM, USER, ANSWER]
    assert turns("sharegpt", conversations=chat(("User", "Hi"), ("chatgpt", "Hello"))) == [USER, ANSWER]
    assert turns("sharegpt", conversation=[{"human": "Hi", "assistant": "Hello"}] * 2) == [USER, ANSWER] * 2


def test_sharegpt_tool_calls():
    tools = '[{"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}]'
    result = read(
        "sharegpt",
        conversations=[
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": '<think>\nuse it\n</think>\n\n{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
        tools=tools,
    )
    assert isinstance(result, Conversation)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert result.messages == (
        Message("user", "1+2?"),
        Message("assistant", "", reasoning="use it", tool_calls=(call,)),
        Message("tool", "3"),
        Message("assistant", "It is 3."),
    )
    assert result.tools == ({"type": "function", "function": json.loads(tools)[0]},)
    assert result.meta == {}


def test_messages_with_everything():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2]}'}}
    result = read(
        "messages",
        id="row-9",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": "ann"},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Three", "reasoning": None, "thinking": "so", "train": True},
            {"role": "user", "content": ""},
            {"role": "assistant", "content": "Hello", "loss": False},
        ],
        tools=[{"type": "function", "function": {"name": "add"}}],
        topic="sums",
        system=None,
    )
    parsed = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, 2]}}, "id": "c1"}
    assert result == Conversation(
        id="row-9",
        origin=PLACE,
        messages=(
            Message("system", "Be brief."),
            Message("user", "Hi", name="ann"),
            Message("assistant", "", reasoning="hm", tool_calls=(parsed,), weight=0.0),
            Message("tool", "3", name="add", tool_call_id="c1"),
            Message("assistant", "Three", reasoning="so", weight=1.0),
            Message("user", ""),
            Message("assistant", "Hello", weight=0.0),
        ),
        tools=({"type": "function", "function": {"name": "add"}},),
        source="some/file.jsonl",
        meta={"topic": "sums"},
    )


def test_parts_of_reasoning_and_tool_calls():
    content = [
        {"type": "reasoning", "value": "hm"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
        {"type": "tool_call", "value": '{"name": "g", "arguments": "{\\"x\\": 1}"}'},
    ]
    message = turns("messages", messages=[*chat(("user", "Hi")), {"role": "assistant", "content": content}])[1]
    assert (message.content, message.reasoning) == ("", "hm")
    assert [call["function"] for call in message.tool_calls] == [
        {"name": "f", "arguments": {}},
        {"name": "g", "arguments": {"x": 1}},
    ]


def test_weights():
    row = [
        {"role": "user", "content": "Hi", "loss_weight": 0.0},
        {"role": "assistant", "content": "Hello", "loss_weight": 2},
    ]
    assert [message.weight for message in turns("messages", messages=row)] == [0.0, 2.0]
    for key, value, reason in (
        ("weight", -1, "is -1, not a number from 0 to 1e9"),
        ("weight", True, "is true, not a number"),
        ("weight", 10**400, "is 10000000000000000000, not a number from 0 to 1e9"),
        ("train", 0.5, "is a number, not true or false; a number goes into `weight`"),
    ):
        bad = [row[0], {"role": "assistant", "content": "Hello", key: value}]
        assert rejected("messages", messages=bad) == (f"messages[1].{key}", reason)


def test_prompt_completion_and_question_answer():
    assert turns("prompt-completion", prompt="Hi", completion="Hello") == [USER, ANSWER]
    assert turns("prompt-completion", prompt="Hi", response="Hello", system="Be brief.") == [SYSTEM, USER, ANSWER]
    assert turns(
        "prompt-completion",
        prompt=chat(("system", "Be brief."), ("user", "Hi")),
        completion=chat(("assistant", "Hello")),
    ) == [SYSTEM, USER, ANSWER]
    assert turns("question-answer", question="Hi", answer="Hello") == [USER, ANSWER]
    assert turns("question-answer", query="Hi", response="Hello", history=[["Hi", "Hello"]]) == [USER, ANSWER] * 2


def test_raw_text():
    for column in ("text", "content"):
        result = read("text", **{column: " as it is\n", "label": 3})
        assert isinstance(result, Conversation)
        assert (result.text, result.messages, result.meta) == (" as it is\n", (), {"label": 3})
    assert rejected("text", text=" \n") == ("text", "empty text")
    mixed = read("messages", messages=[], text="raw")
    assert isinstance(mixed, Conversation)
    assert (mixed.text, mixed.meta) == ("raw", {})
    beside = read("messages", messages=chat(("user", "Hi"), ("assistant", "Hello")), text="rendered")
    assert isinstance(beside, Conversation)
    assert (beside.text, beside.meta) == (None, {"text": "rendered"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\na\n\nb\n</think>\n\nanswer\n", ("a\n\nb", "answer\n")),
        (" \n<think> a </think>answer", (" a ", "answer")),
        ("<think>\n\n</think>\n\nanswer", (None, "answer")),
        ("<think></think><think>a</think>b", ("a", "b")),
        ("<think>a</think><think>b</think>c", ("a", "<think>b</think>c")),
        ("<think>never closed", (None, "<think>never closed")),
        ("say <think>a</think>", (None, "say <think>a</think>")),
    ],
)
def test_a_leading_think_block_is_reasoning(content, expected):
    assert split_think(content) == expected
    message = turns("question-answer", question="Hi", answer=content)[1]
    assert (message.reasoning, message.content) == expected


def test_a_think_block_stays_where_the_reasoning_has_its_own_field():
    for given, expected in (("r", "r"), ("", None)):
        message = {"role": "assistant", "content": "<think>x</think>y", "reasoning_content": given}
        assert turns("messages", messages=[*chat(("user", "Hi")), message])[1] == Message(
            "assistant", "<think>x</think>y", reasoning=expected
        )
    user = "<think>x</think>y"
    assert turns("question-answer", question=user, answer="a")[0] == Message("user", user)


def test_ids():
    def name(**row) -> str:
        result = read("question-answer", question="q", answer="a", **row)
        assert isinstance(result, Conversation)
        return result.id

    assert [name(id="x"), name(id=0), name(), name(id=None), name(id=""), name(id=[1])] == [
        *("x", "0", "file:7", "file:7", "file:7", "file:7"),
    ]
    odd = read("question-answer", question="q", answer="a", id=[1])
    assert isinstance(odd, Conversation)
    assert odd.meta == {"id": [1]}


U, A, T, S = ("user", "Hi"), ("assistant", "Hello"), ("tool", "3"), ("system", "Be brief.")


@pytest.mark.parametrize(
    ("pairs", "field", "reason"),
    [
        ([], "messages", "has no messages"),
        ([U], "messages", "no assistant turn"),
        ([S, U], "messages", "no assistant turn"),
        (
            [U, U, A],
            "messages[1]",
            "roles out of order: user right after user (messages[0]); merge the two into one turn",
        ),
        (
            [U, A, A],
            "messages[2]",
            "roles out of order: assistant right after assistant (messages[1]); merge the two into one turn",
        ),
        (
            [U, S, A],
            "messages[1]",
            "roles out of order: system right after user (messages[0]); a system turn can only be the first",
        ),
        (
            [S, S, U, A],
            "messages[1]",
            "roles out of order: system right after system (messages[0]); a system turn can only be the first",
        ),
        (
            [U, A, T, A],
            "messages[2]",
            "roles out of order: tool right after assistant (messages[1]); a tool turn must follow an assistant's "
            "tool calls",
        ),
        (
            [T, A],
            "messages[0]",
            "roles out of order: tool at the start; a tool turn must follow an assistant's tool calls",
        ),
        ([U, ("assistant", " \n")], "messages[1]", "empty answer"),
        ([U, ("assistant", "<think>only</think>")], "messages[1]", "empty answer"),
        ([U, ("critic", "x")], "messages[1].role", None),
    ],
)
def test_conversations_out_of_order_are_rejected(pairs, field, reason):
    got = rejected("messages", messages=chat(*pairs))
    assert got[0] == field
    assert got[1] == reason or (reason is None and got[1].startswith("unknown role `critic`; roles are system"))


def test_order_of_tool_turns():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}] * 2}
    good = [*chat(U), call, *chat(T, T, A, U)]
    roles = [message.role for message in turns("messages", messages=good)]
    assert roles == ["user", "assistant", "tool", "tool", "assistant", "user"]
    field, reason = rejected("messages", messages=[*chat(U), call, *chat(T, U, A)])
    assert field == "messages[3]"
    assert reason.endswith("user right after tool (messages[2]); the assistant must answer the tool first")


def test_allowed_beginnings_and_ends():
    assert turns("messages", messages=chat(A, U, A)) == [ANSWER, USER, ANSWER]  # a greeting
    assert turns("messages", messages=chat(S, A)) == [SYSTEM, ANSWER]
    assert turns("messages", messages=chat(U, A, U)) == [USER, ANSWER, USER]  # a trailing question is context


@pytest.mark.parametrize(
    ("form", "row", "field", "reason"),
    [
        ("alpaca", {"instruction": "Hi"}, "output", "is missing"),
        ("alpaca", {"instruction": "Hi", "output": 42}, "output", "is a number, not text"),
        ("alpaca", {"instruction": "Hi", "output": " "}, "output", "empty answer"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["q"]]},
            "history[0]",
            "is not a pair [question, answer]",
        ),
        ("alpaca", {"instruction": "a", "output": "b", "history": 3}, "history", "is a number, not a list"),
        ("alpaca", {"instruction": "a", "output": "b", "history": [["q", ""]]}, "history[0][1]", "empty answer"),
        ("alpaca", {"instruction": "a", "output": "b", "system": 1}, "system", None),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "conversations[0].role", "is missing"),
        ("sharegpt", {"conversations": ["x"]}, "conversations[0]", "is text, not an object with role and content"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0].content", "is missing"),
        ("messages", {"messages": {"role": "user"}}, "messages", "is an object, not a list"),
        ("messages", {"messages": [{"role": "user", "content": 1}]}, "messages[0].content", None),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
            "is `image_url`; only text, reasoning and tool_call parts can be read",
        ),
        (
            "messages",
            {"messages": chat(S, U, A), "system": "Another."},
            "system",
            "is a second system text beside messages[0]; keep one",
        ),
        ("messages", {"messages": chat(U, A), "tools": [{"x": 1}]}, "tools[0]", None),
        ("messages", {"messages": chat(U, A), "tools": "{"}, "tools", None),
        ("question-answer", {"question": "q", "answer": "a", "images": ["x.png"]}, "images", None),
        ("sharegpt", {"conversations": chat(U), "chosen": {}, "rejected": {}}, "chosen", None),
    ],
)
def test_rows_that_do_not_fit_name_the_field(form, row, field, reason):
    got = rejected(form, **row)
    assert got[0] == field
    assert got[1] == reason or (reason is None and got[1])


@pytest.mark.parametrize(
    ("call", "field", "reason"),
    [
        ({"function": {"name": "f", "arguments": "{'a': 1}"}}, ".function.arguments", "is text that should be JSON: "),
        ({"function": {"name": "f", "arguments": [1]}}, ".function.arguments", "is a list, not an object"),
        ({"function": {"arguments": {}}}, ".function.name", "is missing"),
        ({"function": "f"}, ".function", "is text, not an object with name and arguments"),
        ("f", "", "is text, not an object with name and arguments"),
        ({"name": "f", "arguments": '{"a": "\\ud800"}'}, ".arguments.a", "half of a surrogate pair"),
    ],
)
def test_tool_calls_that_cannot_be_read(call, field, reason):
    got = rejected("messages", messages=[*chat(U), {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert got[0] == "messages[1].tool_calls[0]" + field
    assert got[1].startswith(reason)


def test_only_the_assistant_reasons_and_calls_tools():
    for extra in ({"tool_calls": [{"name": "f", "arguments": {}}]}, {"reasoning_content": "hm"}):
        field, reason = rejected("messages", messages=[{"role": "user", "content": "Hi", **extra}, *chat(A)])
        assert field == "messages[0]"
        assert "only an assistant turn can have them" in reason


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["messages", "prompt", "prompt_id"], "messages"),
        (["conversations", "id"], "sharegpt"),
        (["conversation", "system"], "sharegpt"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "context", "response", "category"], "alpaca"),
        (["prompt", "completion"], "prompt-completion"),
        (["prompt", "response"], "prompt-completion"),
        (["index", "question", "answer"], "question-answer"),
        (["query", "response"], "question-answer"),
        (["text"], "text"),
        (["text", "url", "timestamp"], "text"),
        (["content"], "text"),
    ],
)
def test_detection_by_columns(columns, expected):
    assert detect([dict.fromkeys(columns, "x")], "f").name == expected


def test_the_majority_decides_and_nulls_do_not_vote():
    alpaca, qa = {"instruction": "x", "output": "y"}, {"question": "x", "answer": "y"}
    assert detect([alpaca, qa, qa], "f").name == "question-answer"
    assert detect([alpaca, alpaca, qa], "f").name == "alpaca"
    assert detect([alpaca | {"messages": None}], "f").name == "alpaca"


def test_wrong_keys_name_those_found_and_the_formats_known():
    with pytest.raises(InputError) as error:
        detect([{"frage": "x", "antwort": "y"}], "a.jsonl")
    for word in ("a.jsonl", "frage, antwort", "alpaca (instruction, output)", "sharegpt (conversations)", "rename"):
        assert word in str(error.value)
    with pytest.raises(InputError, match="to learn its `text` by heart, say .*format: text"):
        detect([{"text": "x", "label": 1}], "a.csv")
    with pytest.raises(InputError, match="rows without columns"):
        detect([{}], "a.jsonl")
    with pytest.raises(
        InputError, match=r"format alpaca needs the columns instruction, output or .* it has the columns q"
    ):
        check_asked(FORMATS["alpaca"], [{"q": 1}], "a.jsonl")
    check_asked(FORMATS["text"], [{"text": "x", "label": 1}], "a.jsonl")
