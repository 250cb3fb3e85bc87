"""Tool calls, preference sets and the forms of other tools become exactly the expected turns."""

import json

import pytest

from graft.data.layout.calls import has_tagged_calls, tagged_blocks
from graft.data.layout.formats import FORMATS, detect, to_conversation
from graft.types import Conversation, Message, Origin, Reject


def read(**row) -> Conversation | Reject:
    """A row in the format that is detected for it."""
    return to_conversation(detect([row], "f"), row, Origin("f.jsonl", 1), "f.jsonl")


def turns(**row) -> list[Message]:
    result = read(**row)
    assert isinstance(result, Conversation), result
    return list(result.messages)


def rejected(**row) -> tuple[str, str]:
    result = read(**row)
    assert isinstance(result, Reject), result
    return result.field, result.reason


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


Q, A, S = Message("user", "1+2?"), Message("assistant", "3"), Message("system", "Be brief.")
USER, BOT = {"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "3"}
HUMAN, GPT = {"from": "human", "value": "1+2?"}, {"from": "gpt", "value": "3"}
WRONG = {"role": "assistant", "content": "4"}


# Tool calls -----------------------------------------------------------------------------------------------------------


def test_anthropic_messages():
    tool = {"name": "add", "description": "Adds", "input_schema": {"type": "object", "properties": {}}}
    result = read(
        system=[{"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "1+2 and 3+4?"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "add them", "signature": "x"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}},
                    {"type": "tool_use", "id": "t2", "name": "add", "input": {"a": 3}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
                    {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "7"}]},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "3 and 7."}]},
        ],
        tools=[tool],
    )
    assert isinstance(result, Conversation), result
    assert result.messages == (
        S,
        Message("user", "1+2 and 3+4?"),
        Message(
            "assistant",
            "Let me see.",
            "add them",
            (call("add", a=1) | {"id": "t1"}, call("add", a=3) | {"id": "t2"}),
        ),
        Message("tool", "3", tool_call_id="t1"),
        Message("tool", "7", tool_call_id="t2"),
        Message("assistant", "3 and 7."),
    )
    function = {"name": "add", "description": "Adds", "parameters": tool["input_schema"]}
    assert result.tools == ({"type": "function", "function": function},)


def test_an_anthropic_picture_is_refused_and_text_after_a_result_is_out_of_order():
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "3"}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "add", "input": {}}]}
    field, reason = rejected(messages=[USER, use, {"role": "user", "content": [result, {"type": "image"}]}, BOT])
    assert (field, reason.split(";")[0]) == ("messages[2].content[1].type", "is `image`")
    text = {"type": "text", "text": "and?"}
    field, reason = rejected(messages=[USER, use, {"role": "user", "content": [result, text]}, BOT])
    assert field == "messages[2]"
    assert "the assistant must answer the tool first" in reason


def test_openai_fine_tuning_files():
    function = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    calling = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    result = read(
        messages=[
            USER,
            {"role": "assistant", "content": None, "tool_calls": [calling], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "3"},
            BOT | {"weight": 1, "refusal": None},
        ],
        tools=[{"type": "function", "function": function}],
        parallel_tool_calls=False,
    )
    assert isinstance(result, Conversation), result
    assert result.messages[1:] == (
        Message("assistant", "", tool_calls=(call("add", a=1) | {"id": "c1"},), weight=0.0),
        Message("tool", "3", tool_call_id="c1"),
        Message("assistant", "3", weight=1.0),
    )
    assert result.meta == {"parallel_tool_calls": False}
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    assert turns(messages=[USER, old, {"role": "function", "name": "add", "content": "3"}, BOT]) == [
        Q,
        Message("assistant", "", tool_calls=(call("add"),)),
        Message("tool", "3", name="add"),
        A,
    ]


def test_calls_in_tags():
    python = "<tool_call>\n{'name': 'add', 'arguments': {'a': 1}}\n</tool_call>"
    two = f'Let me see.\n{python}\n<tool_call>{{"name": "f"}}</tool_call>\n'
    answers = "<tool_response>\n3\n</tool_response>\n<tool_response>4</tool_response>"
    assert turns(
        conversations=[HUMAN, {"from": "gpt", "value": two}, {"from": "tool", "value": answers}, GPT],
    ) == [
        Q,
        Message("assistant", "Let me see.", tool_calls=(call("add", a=1), call("f"))),
        Message("tool", "3"),
        Message("tool", "4"),
        A,
    ]
    thinking = '<think>\nhm\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert turns(messages=[USER, BOT | {"content": thinking}])[1] == Message("assistant", "", "hm", (call("f"),))


@pytest.mark.parametrize(
    "said",
    [
        "The tag <tool_call> begins a call.",
        'Write <tool_call>{"name": "f"}</tool_call> to call f.',
        "<tool_call><function=f></function></tool_call>",
        '<tool_call>{"name": "f"}',
        "</tool_call><tool_call>",
    ],
)
def test_tags_that_are_text_stay_text(said):
    assert turns(messages=[USER, BOT | {"content": said}])[1] == Message("assistant", said)
    assert not has_tagged_calls(said)


def test_a_broken_call_in_tags_is_not_learnt():
    for inside in ('{"name": "f", "arguments": {"a": }}', '{"arguments": {}}', "[1]"):
        field, reason = rejected(messages=[USER, BOT | {"content": f"<tool_call>{inside}</tool_call>"}])
        assert field.startswith("messages[1].content")
        assert reason
    kept = turns(messages=[USER, BOT | {"content": "<tool_call>{</tool_call>", "tool_calls": []}])
    assert kept[1] == Message("assistant", "<tool_call>{</tool_call>")


def test_calls_in_a_row_are_one_turn_and_words_for_roles():
    asks = [{"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"n": n}})} for n in (1, 2)]
    gives = [{"role": "tool_response", "content": str(n)} for n in (1, 2)]
    assert turns(messages=[USER, *asks, *gives, {"role": "bot", "content": "3", "loss_scale": 2}]) == [
        Q,
        Message("assistant", "", tool_calls=(call("f", n=1), call("f", n=2))),
        *(Message("tool", "1"), Message("tool", "2")),
        Message("assistant", "3", weight=2.0),
    ]
    assert "roles out of order" in rejected(messages=[USER, BOT, BOT])[1]


class Metered(str):
    """A text that counts the characters that are looked at or copied."""

    __slots__ = ()
    seen = 0

    def _count(self, characters: int) -> None:
        Metered.seen += characters

    def find(self, what, start=0, *more):
        found = super().find(what, start, *more)
        self._count((len(self) if found < 0 else found) - start)
        return found

    def startswith(self, what, *more):
        self._count(len(what))
        return super().startswith(what, *more)

    def __getitem__(self, key):
        part = Metered(super().__getitem__(key))
        self._count(len(part))
        return part

    def partition(self, what):
        self._count(len(self))
        return tuple(map(Metered, super().partition(what)))


@pytest.mark.parametrize(
    "block", ["<tool_response>", "<tool_response>x</tool_response> ", "<tool_response></tool_response><tool_response>"]
)
def test_looking_for_blocks_takes_as_many_steps_as_there_are_characters(block):
    looked = []
    for count in (500, 1000):
        text = Metered(block * count)
        Metered.seen = 0
        tagged_blocks(text, "tool_response")
        looked.append(Metered.seen)
        assert 0 < Metered.seen <= 4 * len(text)
    assert looked[1] <= 2.1 * looked[0]
    blocks, end = tagged_blocks("<t> a </t>\n<t></t> <t>open", "t")
    assert (blocks, end) == ([" a ", ""], len("<t> a </t>\n<t></t> "))


def test_pairs_and_items_of_sharegpt():
    assert turns(conversation=[{"user": "1+2?", "assistant": "3"}] * 2) == [Q, A, Q, A]
    assert turns(items=[HUMAN, GPT], avatarUrl="x") == [Q, A]


# Preference sets --------------------------------------------------------------------------------------------------

TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nfriend\n\nHuman: 1+2?\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1+2?", "chosen": "3", "rejected": "4"}, [Q, A]),
        ({"system": "Be brief.", "question": "1+2?", "chosen": "3", "rejected": "4"}, [S, Q, A]),
        ({"instruction": "1+2?", "input": "", "chosen": "3", "rejected": "4"}, [Q, A]),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "4"}}, [Q, A]),
        ({"messages": [USER], "chosen": BOT, "rejected": WRONG}, [Q, A]),
        ({"prompt": [USER], "chosen": [BOT], "rejected": [WRONG]}, [Q, A]),
        ({"chosen": [USER, BOT], "rejected": [USER, WRONG]}, [Q, A]),
        ({"prompt": "1+2?", "prompt_id": "x", "chosen": [USER, BOT], "rejected": [USER, WRONG]}, [Q, A]),
        ({"chosen_messages": [USER, BOT], "rejected_messages": [USER, WRONG]}, [Q, A]),
        ({"messages": [USER, BOT], "rejected_response": "4"}, [Q, A]),
        ({"messages": [USER, BOT], "rejected_messages": [USER, WRONG]}, [Q, A]),
        (
            {"input": {"messages": [USER]}, "preferred_output": [BOT], "non_preferred_output": [WRONG]},
            [Q, A],
        ),
        (
            {"chosen": TRANSCRIPT + "3", "rejected": TRANSCRIPT + "4"},
            [Message("user", "Hi"), Message("assistant", "Hello\n\nfriend"), Q, A],
        ),
        (
            {"prompt": TRANSCRIPT, "chosen": "3", "rejected": "4"},
            [Message("user", "Hi"), Message("assistant", "Hello\n\nfriend"), Q, A],
        ),
    ],
)
def test_the_chosen_answer_is_taken_and_the_other_one_kept_as_meta(row, expected):
    assert detect([row], "f").name == "preference"
    result = read(**row)
    assert isinstance(result, Conversation), result
    assert list(result.messages) == expected
    lost = {name: value for name, value in row.items() if "reject" in name or name == "non_preferred_output"}
    assert lost
    assert result.meta == lost | ({"prompt_id": "x"} if "prompt_id" in row else {})


def test_preference_rows_that_teach_nothing():
    assert rejected(chosen="3", rejected="4") == ("chosen", "is an answer without a prompt; `prompt` is missing")
    assert rejected(prompt="q", chosen=" ", rejected="4") == ("chosen", "empty answer")
    assert rejected(prompt="q", chosen=3, rejected=4) == ("chosen", "is a number, not text")
    row = {"question": "q", "answer": "a", "chosen": "a", "rejected": "b"}
    got = to_conversation(FORMATS["question-answer"], row, Origin("f", 1), "f")
    assert isinstance(got, Reject)
    assert (got.field, "format: preference" in got.reason) == ("chosen", True)


def test_answers_that_are_not_wanted_are_no_examples():
    for row in ({"messages": [USER, BOT]}, {"prompt": "1+2?", "completion": "3"}):
        assert turns(**row, label=True) == [Q, A]
        assert rejected(**row, label=False)[0] == "label"
        assert rejected(**row, kto_tag=False)[0] == "kto_tag"
        assert turns(**row, label="False") == [Q, A]  # a class by that name


@pytest.mark.parametrize("column", ["image", "images", "audio", "audios", "video", "videos"])
def test_rows_with_pictures_and_sound(column):
    assert turns(question="1+2?", answer="3", **{column: []}) == [Q, A]
    assert rejected(question="1+2?", answer="3", **{column: ["x.png"]})[0] == column


def test_self_instruct_instances():
    assert turns(instruction="Add.", instances=[{"input": "1+2?", "output": "3"}]) == [Message("user", "Add.\n1+2?"), A]
    assert rejected(instruction="Add.", instances=[{"input": "", "output": ""}]) == (
        "instances[0].output",
        "empty answer",
    )
    assert "has 2 elements" in rejected(instruction="Add.", instances=[{"output": "3"}] * 2)[1]
