"""One rendering tells what the template writes of a conversation's beginnings: what it tells is what it writes.

The slow reference is a rendering of each beginning by itself, and a tokenizer that is given every text whole.
"""

import datetime
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from template_pairs import MATERIAL, renderer_of, template_names
from test_encode import CHATML, QWEN3, R1, renderer, talk
from test_templates import CALL, TOOL

from graft.config.train import Encode
from graft.tokens import beginnings, direct, quick_jinja
from graft.tokens.beginnings import Beginnings
from graft.tokens.direct import DirectTemplate
from graft.tokens.encode import encode_chunk
from graft.tokens.tokenise import Tokeniser
from graft.types import Conversation, Message, Origin, Reject

LOOP = "{%- for m in messages %}{{- '[' ~ m.role[0] ~ m.content ~ ']' }}{%- endfor %}"
ASK = "{%- if add_generation_prompt %}{{- '[a' }}{%- endif %}"
LONG = talk("s:Be kind.", "u:one", "a:1", "u:two", "a:2", "u:three", "a:3").messages
ALL = set(range(1, 8))


def said(expression):
    """The loop, which also says something in each round."""
    return LOOP.replace("['", f"[' ~ ({expression})")


def first(statement):
    """The loop, which does something at the beginning of each round."""
    return LOOP.replace("{{-", statement + "{{-")


TOLD = {
    "plain": (LOOP + ASK, ALL),
    "ChatML": (CHATML, ALL),
    "a first one apart": ("{%- set loop_messages = messages[1:] %}" + LOOP.replace("in me", "in loop_me") + ASK, ALL),
    "the name used again": ("{%- set messages = messages[2:] %}" + LOOP + ASK, ALL - {1}),
    "counting": ("{%- set ns = namespace(n=0) %}" + said("loop.index ~ ns.n") + ASK, ALL),
    "a look back": (said("messages[loop.index0 - 1].role if loop.index0 else ''") + ASK, ALL),
    "a look ahead": (said("messages[loop.index0 + 1].role if loop.index0 < 3 else ''") + ASK, {4, 5, 6, 7}),
    "the last one is another": (said("'!' if loop.last else ''") + ASK, {7}),
    "a look ahead at two": ("{%- if messages[1].role == 'user' %}!{%- endif %}" + LOOP + ASK, ALL - {1}),
    "only some look ahead": (said("'!' if m.role == 'system' and loop.last else ''") + ASK, ALL - {1}),
    "the length": ("{{- messages | length }}" + LOOP + ASK, {7}),
    "the length of a loop": (said("loop.length") + ASK, {7}),
    "the end at the end": (LOOP + "{{- messages[-1].role }}" + ASK, None),
    "a state at the end": ("{%- set ns = namespace(n=0) %}" + LOOP + "{{- ns.n }}" + ASK, None),
    "two loops": (LOOP + LOOP + ASK, {7}),
    "an inner loop": (said("messages | map(attribute='role') | join") + ASK, {7}),
    "a loop that ends early": (first("{%- if m.content == '2' %}{% break %}{%- endif %}") + ASK, {1, 2, 3, 4, 7}),
    "rounds left out": (first("{%- if m.role == 'user' %}{% continue %}{%- endif %}") + ASK, {1, 3, 5, 7}),
    "a prompt in the head": ("{%- if add_generation_prompt %}?{%- endif %}" + LOOP + ASK, ALL),
    "a loop with a test": ("{%- for m in messages if m.role != 'user' %}{{- m.content }}{%- endfor %}" + ASK, None),
    "a loop with an else": (LOOP.replace("{%- endfor", "{%- else %}none{%- endfor") + ASK, None),
    "no loop at the top": ("{%- if messages %}" + LOOP + "{%- endif %}" + ASK, None),
    "it raises": (first("{%- if m.content == '2' %}{{- raise_exception('no') }}{%- endif %}") + ASK, {1, 2, 3, 4}),
}  # fmt: skip


def told(template, messages, tools=()):
    """(count, with the prompt or not) -> what one rendering tells of it, and what the template writes of it."""
    r = renderer(CHATML)
    r = replace(r, template=template, memory={})
    rows = r.rows(messages)
    found = {}
    for asked in (True, False):
        known = r.beginnings(rows, tools, None, asked)
        for count in range(1, len(messages) + 1):
            text = known.of(count, asked) if known is not None else None
            if text is not None:
                found[count, asked] = (text, r.render(messages[:count], tools, None, asked))
    return r, found


@pytest.mark.parametrize("case", TOLD)
def test_what_is_told_is_what_is_written(case, monkeypatch):
    template, expected = TOLD[case]
    monkeypatch.setattr(DirectTemplate, "_are_true", lambda *_: True)  # the proof must not need it
    r, found = told(template, LONG)
    assert all(one == other for one, other in found.values())
    assert {count for count, _ in found} == (expected or set())
    assert {count for count, asked in found if asked} == {count for count, asked in found if not asked}
    assert (r._direct._marked is None) == (expected is None)


LOOKS = (
    "messages[-1].content", "messages | length", "messages | last", "messages[:2] | length", "messages[::-1][0].role",
    "([1] + messages) | length", "(messages + [1]) | length", "messages | list | length", "messages == [1]",
    "messages != [1]", "messages | tojson", "messages | string", "1 in messages", "messages | reverse | first",
    "messages * 2", "2 * messages", "messages.copy()", "messages.count(1)", "messages.index(messages[0])",
    "messages | selectattr('role', 'equalto', 'user') | list | length", "messages | join(',', attribute='role')",
    "'%s' % messages", "'{}'.format(messages)", "messages | sort(attribute='content') | first", "dict(a=messages)",
    "messages | batch(2) | list | length", "messages | slice(2) | list | length", "messages | sum(attribute='role')",
    "[1, messages] | string", "messages[1:][2:] | length", "messages[9].role", "messages is sequence",
    "messages and 1", "not messages", "messages < [1]", "messages ~ ''", "messages | unique(attribute='role') | list",
    "messages | groupby('role') | list | length", "messages | map(attribute='content') | list", "messages | pprint",
)  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_at_the_whole_is_noted(look, monkeypatch):
    """With a look at all of the messages before the loop nothing is told but of the whole; and it sees a list."""
    monkeypatch.setattr(DirectTemplate, "_are_true", lambda *_: True)
    _, found = told("{{- " + look + " }}" + LOOP + ASK, LONG)
    assert all(one == other for one, other in found.values())
    assert {count for count, _ in found} <= {7}


def test_a_list_has_no_method_that_goes_unnoticed():
    own = {name for name in dir(list) if getattr(list, name) is getattr(beginnings._Watched, name)}
    assert own <= set(dir(object)) | {"__class_getitem__"}
    assert {"__iter__", "__len__", "__reversed__", "__add__", "pop", "index", "__eq__", "__repr__"}.isdisjoint(own)


def test_what_would_be_told_wrongly_is_compared_first(monkeypatch):
    honest = Beginnings.of
    for wrong in (lambda text: text + "!", lambda text: text[1:]):
        monkeypatch.setattr(Beginnings, "of", lambda *given, wrong=wrong: wrong(honest(*given)))
        _, found = told(CHATML, LONG)
        assert found == {}
    monkeypatch.setattr(Beginnings, "of", honest)
    assert len(told(CHATML, LONG)[1]) == 14


def test_a_full_memory_of_kinds_tells_nothing(monkeypatch):
    monkeypatch.setattr(direct, "MOST_KINDS", 0)
    assert told(CHATML, LONG)[1] == {}


def test_turns_of_one_conversation_are_rendered_together(monkeypatch):
    rendered = []
    honest = DirectTemplate._called
    monkeypatch.setattr(
        DirectTemplate, "_called", lambda self, rows, *rest: (rendered.append(rows), honest(self, rows, *rest))[1]
    )
    many = [Conversation("c", Origin("f", 1), LONG[:-1] + (Message("assistant", str(n)),)) for n in range(10)]
    r = renderer()
    encode_chunk(many[:1], r, Encode())
    rendered.clear()
    results, _ = encode_chunk(many, r, Encode())
    assert [len(result) for result in results] == [3] * 10
    assert rendered == []


# Against the slow encoder


def slow(monkeypatch):
    """Every beginning by itself, every text whole."""
    monkeypatch.setattr(DirectTemplate, "beginnings", lambda *_: None)
    monkeypatch.setattr(Tokeniser, "spelled", Tokeniser._unproven)


def as_plain(found):
    results, notes = found
    return [
        result
        if isinstance(result, Reject)
        else [(e.conversation, e.turn, e.ids.tolist(), e.weights.tolist(), e.prompt_len, e.way) for e in result]
        for result in results
    ], notes


def conversations():
    """Some real ones, and shapes that templates treat in their own ways."""
    lines = (MATERIAL / "data" / "conversations60" / "conversations.jsonl").read_text("utf-8").splitlines()
    talks = [tuple(Message(m["role"], m["content"]) for m in json.loads(line)["messages"]) for line in lines]
    talks = sorted(talks, key=len)[::6]
    other = {**CALL, "id": "abcdefghj", "function": {"name": "look_up", "arguments": {"word": "Bern", "n": 1}}}
    calls, answer = Message("assistant", "", tool_calls=(CALL,)), "In Zürich."
    asked = talk("u:Where?", calls, Message("tool", "A city.", name="look_up", tool_call_id="abcdefghi"), "a:" + answer)
    both = Message("assistant", "Both:", tool_calls=(CALL, other))
    more = talk("u:And?", both, "t:one", "t:two", "a:Two.", "u:Thanks.", "a:Yes.").messages
    reasoned = Message("assistant", "51.", reasoning="Sixty less nine.")
    talks += [
        (*talk("u:17*3?").messages, reasoned, *talk("u:4*4?", "a:16.").messages, Message("user", "17*3?"), reasoned),
        talk("s:Be kind.", "u:a", "a:b", "s:Be terse.", "u:c", "u:d", "a:e", "a:f", "u:g").messages,
        talk("u:  a ", "a:\n\n b \n", "u:<|im_end|>", "a:</s>x<|im_end|>y", "u:", "a:<think>\nq\n</think>\nw").messages,
        (Message("user", "a"), Message("assistant", "b", weight=0.5), *talk("u:c", "a:d").messages),
    ]  # fmt: skip
    made = [(messages, ()) for messages in talks]
    made += [(messages, (TOOL,)) for messages in (asked.messages, asked.messages + more, more)]
    return [Conversation(f"c{n}", Origin("f", n + 1), messages, tools) for n, (messages, tools) in enumerate(made)]


SETTINGS = (
    Encode(max_length=100_000),
    Encode(max_length=90, overlong="drop_oldest_turns"),
    Encode(max_length=100_000, train_on="everything"),
)
_TOLD: dict[str, bool] = {}


@pytest.mark.parametrize("name", template_names())
def test_real_templates(name, monkeypatch):
    r = replace(renderer_of(name, datetime.date(2026, 1, 31)), memory={})
    some = conversations()
    used = (SETTINGS[0], SETTINGS[1 + template_names().index(name) % 2])
    quick = [as_plain(encode_chunk(some, r, settings)) for settings in used]
    told = [truth for template in {r._direct, r._direct_tools} for truth in template._told.values()]
    assert all(told), "what is proven must also be so"
    _TOLD[name] = bool(told)
    slow(monkeypatch)
    assert quick == [as_plain(encode_chunk(some, replace(r, memory={}), settings)) for settings in used]


def test_most_real_templates_tell():
    if len(_TOLD) < 100:
        pytest.skip("NOT TESTED: needs the results of every template in this file")
    assert sum(_TOLD.values()) >= 0.7 * len(_TOLD)


@pytest.mark.parametrize("template", [CHATML, QWEN3, R1])
def test_templates_made_here(template, monkeypatch):
    r = renderer(template)
    some = [Conversation(str(n), Origin("f", n), LONG[: 3 + 2 * (n % 3)]) for n in range(12)]
    some += [talk("u:a", Message("assistant", "b", reasoning="c"), "u:d", "a:e", "u:f", "a:g")]
    quick = as_plain(encode_chunk(some, r, Encode()))
    slow(monkeypatch)
    assert quick == as_plain(encode_chunk(some, renderer(template), Encode()))
    assert not all(isinstance(result, Reject) for result in quick[0])


# Look-ups of the sandbox


def test_a_quick_environment_finds_what_the_sandbox_finds():
    slow_one = ImmutableSandboxedEnvironment()
    quick = quick_jinja.quickened(slow_one)
    assert type(quick) is quick_jinja._QuickEnvironment
    assert quick_jinja.quickened(quick) is quick
    loop = LoopContext([1, 2], slow_one.undefined)
    next(loop)

    class Text(str):
        role = "its own"

    class Row(dict):
        role = "its own"

    things = [
        {"role": "user", "items": 1, "__class__": 2},
        {},
        loop,
        "text",
        Text("text"),
        Row(role=1),
        [1],
        None,
        3,
        b"",
    ]
    names = {"role", "absent", "items", "get", "__class__", "__getitem__", "_x", "clear", "mro"}
    names |= set(dir(str)) | {name for name in dir(loop) if not name.startswith("__")}
    different = 0
    for thing, name in itertools.product(things, sorted(names)):
        one, other = (env.getattr(thing, name) for env in (slow_one, quick))
        assert type(one) is type(other), (thing, name)
        if type(one) is slow_one.undefined:
            assert (one._undefined_name, one._undefined_obj, one._undefined_exception) == (
                other._undefined_name, other._undefined_obj, other._undefined_exception)  # fmt: skip
            different += 1
        elif name not in ("format", "format_map"):
            assert one == other, (thing, name)
    assert different > 50


def test_texts_that_go_on_from_each_other_are_cut_alike():
    """Every beginning of texts with whole and torn control tokens, in any order of growth."""
    from test_encode import byte_tokenizer

    tokenizer = byte_tokenizer(extra=("<|im_start|>", "<|im_end|>", "<|im_end|><|", "<|"))
    tokeniser = Tokeniser(tokenizer)
    for text in ("a<|im_start|>b<|im_end|><|im_start|>c<|im<|im_end|>", "<|im_end|><|im_end|><|<|<|im_start|>x<|i"):
        grown = [text[:end] for end in range(len(text) + 1)]
        for texts in (grown, grown[::-1], grown[::2] + grown[::3], [grown[9], text, grown[9], text + text]):
            assert tokeniser._cut(texts) == [tokeniser._cut([one])[0] for one in texts]
            assert tokeniser.ids(texts) == [tokenizer(one, add_special_tokens=False)["input_ids"] for one in texts]
            assert all("".join(pieces) == one for pieces, one in zip(tokeniser._cut(texts), texts, strict=True))
    assert np.array_equal(tokeniser.spelled([text] * 9)[8].ids, tokeniser.spelled([text])[0].ids)
