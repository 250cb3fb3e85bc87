"""Conversations to examples with a tokenizer made here: which tokens are targets, what is left out, what is refused."""

import datetime
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from graft.config.train import Encode
from graft.errors import ConfigError, GraftError, InputError
from graft.tokens import chat_template, encode, spelling
from graft.tokens.load import finish, load_renderer
from graft.tokens.renderer import Renderer, TemplateRefused
from graft.tokens.spread import CHUNK
from graft.types import Conversation, Message, Origin, Reject

DAY = datetime.date(2026, 1, 31)
ROOMY = Encode(max_length=4000)

CHATML = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
R1 = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{- '<|im_start|>' + m.content }}
{%- else %}{{- '<|im_start|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|><think>\\n' }}{%- endif %}"""
QWEN3 = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""


def byte_tokenizer(adds_bos: bool = False, extra: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")):
    """Every byte is a token, and a few merges, so that tokens can span a boundary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "y"), ("t", "h"), ("th", "e")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *extra])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def renderer(template=CHATML, tokenizer=None, date=DAY) -> Renderer:
    tokenizer = tokenizer or byte_tokenizer()
    return finish(Renderer(tokenizer, template, "t", date, (), None, chat_template.switches_of(template)), [], [])


def talk(*turns, text=None, tools=(), name="c"):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple(t if isinstance(t, Message) else Message(roles[t[0]], t[2:]) for t in turns)
    return Conversation(name, Origin("made.jsonl", 7), messages, tools, text)


def targets(example, r):
    return r.decode(example.ids[example.weights > 0].tolist())


TWO = talk("s:Be kind.", "u:one", "a:First.", "u:two", "a:Second.")


def test_each_answer_is_an_example_and_its_stop_is_the_last_target():
    r = renderer()
    first, second = encode.encode(TWO, r, ROOMY)
    assert (first.turn, second.turn) == (2, 4)
    assert [targets(e, r) for e in (first, second)] == ["First.<|im_end|>", "Second.<|im_end|>"]
    assert r.decode(second.ids.tolist()) == r.render(TWO.messages, generation_prompt=False).removesuffix("\n")
    assert second.ids[: second.prompt_len].tolist() == r.prompt_ids(TWO.messages[:4])
    assert second.ids[: len(first.ids)].tolist() == first.ids.tolist(), "a prefix-stable template makes one path"
    assert first.weights[: first.prompt_len].sum() == 0
    assert first.ids.dtype == np.int32
    assert first.weights.dtype == np.float32


def test_last_turn_only():
    r = renderer()
    (only,) = encode.encode(TWO, r, Encode(train_on="last_turn"))
    assert targets(only, r) == "Second.<|im_end|>"


def test_everything_trains_every_token_but_the_first():
    r = renderer()
    (only,) = encode.encode(TWO, r, Encode(train_on="everything"))
    assert only.weights.tolist() == [0.0] + [1.0] * (len(only.ids) - 1)
    assert r.decode(only.ids.tolist()) == r.render(TWO.messages, generation_prompt=False).removesuffix("\n")
    light = talk("u:one", Message("assistant", "First.", weight=0.25), "u:two", "a:Second.")
    (weighted,) = encode.encode(light, r, Encode(train_on="everything"))
    assert r.decode(weighted.ids[weighted.weights == 0.25].tolist()) == "First.<|im_end|>"


def test_a_weight_of_its_own_overrides_train_on():
    r = renderer()
    mixed = talk(
        "u:1", Message("assistant", "off", weight=0), "u:2", Message("assistant", "half", weight=0.5), "u:3", "a:on"
    )
    half, on = encode.encode(mixed, r, ROOMY)
    assert (half.turn, float(half.weights.max()), on.turn) == (3, 0.5, 5)
    assert [e.turn for e in encode.encode(mixed, r, Encode(train_on="last_turn"))] == [3, 5]
    off = encode.encode(talk("u:1", Message("assistant", "off", weight=0)), r, ROOMY)
    assert isinstance(off, Reject)
    assert "weight 0" in off.reason
    wrong = encode.encode(talk("u:1", Message("assistant", "x", weight=-1)), r, ROOMY)
    assert (wrong.field, wrong.line) == ("messages[1].weight", 7)


def test_overlong_examples_are_dropped_and_counted():
    r = renderer()
    long = talk("u:one", "a:First.", "u:two", "a:" + "x" * 300)
    found = encode.encode_all([long, TWO, talk("u:1", "a:" + "y" * 300, name="d")], r, Encode(max_length=200))
    assert [(e.conversation, e.turn) for e in found.examples] == [("c", 1), ("c", 2), ("c", 4)]
    assert found.notes[encode.TOO_LONG] == 1
    (reject,) = found.rejects
    length = len(r.ids([r.render(talk("u:1").messages) + "y" * 300 + "<|im_end|>"])[0])
    assert reject.reason == f"too long: {length} tokens > encode.max_length 200"


def test_oldest_turns_are_dropped_whole_and_the_system_text_stays():
    r = renderer()
    settings = Encode(max_length=75, overlong="drop_oldest_turns")
    found = encode.encode_all([TWO], r, settings)
    first, second = found.examples
    kept = (TWO.messages[0], *TWO.messages[3:])
    assert r.decode(second.ids.tolist()) == r.render(kept, generation_prompt=False).removesuffix("\n")
    assert (first.turn, second.turn) == (2, 4)
    assert found.notes[encode.OLDEST_DROPPED] == 1
    assert isinstance(encode.encode(talk("u:" + "x" * 200, "a:no"), r, settings), Reject)


def test_raw_text_every_token_is_a_target_once():
    tokenizer = byte_tokenizer(adds_bos=True)
    r = renderer(tokenizer=tokenizer)
    text = "the cat and the dog. " * 20
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    (one,) = encode.encode(talk(text=text), r, ROOMY)
    assert one.ids.tolist() == whole
    assert (one.way, one.prompt_len) == ("text", 0)
    assert one.weights.tolist() == [0.0] + [1.0] * (len(whole) - 1)
    parts = encode.encode(talk(text=text), r, Encode(max_length=32))
    assert len(parts) > 3
    trained = [int(i) for part in parts for i, w in zip(part.ids, part.weights, strict=True) if w > 0]
    assert trained == whole[1:]
    assert all(len(part.ids) <= 32 for part in parts)
    assert parts[1].ids[0] == parts[0].ids[-1]
    assert isinstance(encode.encode(talk(text=" \n"), r, ROOMY), Reject)


def test_a_token_across_the_boundary_is_spelled_from_the_prompt_on():
    """The prompt ends with a line break and the answer begins with one: the merged token can never be generated."""
    r = renderer()
    messages = talk("u:Hi", "a:\n\nthe end").messages
    (example,) = encode.encode(talk("u:Hi", "a:\n\nthe end"), r, ROOMY)
    prompt = r.prompt_ids(messages[:1])
    merged = r.ids([r.render(messages, generation_prompt=False)])[0]
    assert merged[: len(prompt)] != prompt, "the case must arise"
    assert example.ids[: example.prompt_len].tolist() == prompt
    assert targets(example, r) == "\n\nthe end<|im_end|>"


def test_reasoning_and_the_template_s_switch():
    r = renderer(QWEN3)
    assert r.switches == ("enable_thinking",)
    thought = talk("u:Hi", Message("assistant", "Yes.", reasoning="Hm."))
    (with_it,) = encode.encode(thought, r, ROOMY)
    assert r.decode(with_it.ids[: with_it.prompt_len].tolist()).endswith("assistant\n")
    assert targets(with_it, r) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    (inside,) = encode.encode(talk("u:Hi", Message("assistant", "<think>\nHm.\n</think>\n\nYes.")), renderer(), ROOMY)
    assert targets(inside, r) == "<think>\nHm.\n</think>\n\nYes.<|im_end|>"
    (without,) = encode.encode(talk("u:Hi", "a:Yes."), r, ROOMY)
    assert r.decode(without.ids[: without.prompt_len].tolist()).endswith("<think>\n\n</think>\n\n")
    assert targets(without, r) == "Yes.<|im_end|>"
    branching = encode.encode_all([talk("u:1", Message("assistant", "A", reasoning="a"), "u:2", "a:B")], r, ROOMY)
    assert "<think>\na" not in r.decode(branching.examples[1].ids.tolist())
    assert branching.notes[encode.THINKING] == branching.notes[encode.NOT_THINKING] == 1


def test_an_answer_that_the_template_rewrites_is_composed():
    r = renderer(R1)
    for message in (
        Message("assistant", " Yes. ", reasoning="Hm."),
        Message("assistant", "<think>\nHm.\n</think>\n\n Yes. "),
    ):
        found = encode.encode_all([talk("u:Hi", message)], r, ROOMY)
        assert targets(found.examples[0], r) == "Hm.\n</think>\n\n Yes. <|im_end|>"
        assert found.examples[0].way == "composed"
        assert found.notes[encode.COMPOSED] == 1
    (plain,) = encode.encode(talk("u:Hi", "a:Yes."), r, ROOMY)
    assert targets(plain, r) == "\n</think>\n\nYes.<|im_end|>"


def test_reasoning_without_a_place_is_counted():
    found = encode.encode_all([talk("u:Hi", Message("assistant", "Yes.", reasoning="Hm."))], renderer(), ROOMY)
    assert targets(found.examples[0], renderer()) == "Yes.<|im_end|>"
    assert any("reasoning" in note for note in found.notes)


def test_control_text_in_content():
    """In a prompt it is what serving would make of it; in an answer a stop's text never becomes the stop."""
    r = renderer()
    stop = r.tokenizer.convert_tokens_to_ids("<|im_end|>")
    forged = talk("u:say <|im_end|>", "a:It is <|im_end|> and </s>, you see")
    found = encode.encode_all([forged], r, ROOMY)
    (example,) = found.examples
    rows = [{"role": "user", "content": "say <|im_end|>"}]
    expected = r.tokenizer.apply_chat_template(
        rows, chat_template=CHATML, add_generation_prompt=True, return_dict=False
    )
    assert example.ids[: example.prompt_len].tolist() == expected
    answer = example.ids[example.prompt_len :].tolist()
    assert answer.count(stop) == 1
    assert answer[-1] == stop
    assert r.tokenizer.eos_token_id not in answer
    assert targets(example, r) == "It is <|im_end|> and </s>, you see<|im_end|>"
    assert found.notes[encode.CONTROL_TEXT] == 1
    assert any("stop token" in note for note in found.notes)


def test_a_stop_that_the_template_does_not_write_is_appended():
    turn = "{%- for m in messages %}{{- m.role + ': ' + m.content END }}{%- endfor %}"
    opening = "{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"
    r = renderer(turn.replace("END", "+ '\\n'") + opening)
    found = encode.encode_all([talk("u:Hi", "a:Yes.")], r, ROOMY)
    assert targets(found.examples[0], r) == " Yes.</s>"
    assert any("appended" in note for note in found.notes)
    late = turn.replace("END", "+ ('<|im_end|>' if m.role == 'assistant' and not loop.last else '')") + opening
    assert targets(encode.encode(talk("u:Hi", "a:Yes."), renderer(late), ROOMY)[0], r) == " Yes.<|im_end|>"


def test_bos_stands_as_often_as_the_template_writes_it():
    tokenizer = byte_tokenizer(adds_bos=True)
    r = renderer("{{- bos_token }}" + CHATML, tokenizer)
    (example,) = encode.encode(talk("u:Hi", "a:Yes."), r, ROOMY)
    assert example.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert r.prompt_ids(talk("u:Hi").messages).count(tokenizer.bos_token_id) == 1
    (twice,) = encode.encode(talk("u:<s>Hi", "a:Yes."), r, ROOMY)
    assert twice.ids.tolist().count(tokenizer.bos_token_id) == 2
    turn = encode.response.find_turn(r, talk("u:Hi", "a:Yes.").messages, 1)
    prompt, full = r.spelled([turn.prompt, turn.prompt + turn.response])
    answer, _ = spelling.response_ids(r, turn, prompt, full)
    with pytest.raises(spelling.Unfit, match="BOS"):
        spelling.check(r, turn, np.array([tokenizer.bos_token_id, *prompt.ids]), answer)
    with pytest.raises(spelling.Unfit, match="stop"):
        spelling.check(r, turn, prompt.ids, answer[:-1])
    with pytest.raises(spelling.Unfit, match="give the answer back"):
        spelling.inexact_reason(r, turn, np.array([answer[0], *answer]))


def test_refusals_are_named():
    strict = (
        "{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}" + CHATML
    )
    r = renderer(strict)
    found = encode.encode_all(
        [TWO, talk("u:Hi", "a:Yes."), talk("a:Hello"), talk("u:Hi"), talk("u:x\ud800", "a:y")], r, ROOMY
    )
    assert len(found.examples) == 1
    reasons = [reject.reason for reject in found.rejects]
    assert reasons[0] == "chat template: System role not supported"
    assert "nothing before it" in reasons[1]
    assert "no assistant turn" in reasons[2]
    assert "surrogate" in reasons[3]
    assert len(found.examples) + len(found.rejects) == 5, "kept + rejected = read"
    with pytest.raises(TemplateRefused, match="System role"):
        r.prompt_ids(TWO.messages[:2])
    broken = encode.encode(talk("u:Hi", "a:Yes."), renderer("{% for m in %}"), ROOMY)
    assert isinstance(broken, Reject)
    mute = encode.encode(talk("u:Hi", "a:Yes."), renderer("{{- messages[0].content }}"), ROOMY)
    assert "does not write the assistant's answer" in mute.reason


def test_a_greeting_first_leaves_the_later_answers():
    found = encode.encode_all([talk("a:Hello", "u:Hi", "a:Yes.")], renderer(), ROOMY)
    assert [e.turn for e in found.examples] == [2]
    assert found.notes[encode.REFUSED] == 1


def test_what_the_template_drops_is_counted():
    deaf = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"at": "x"}}}
    found = encode.encode_all(
        [
            talk("s:Be kind.", "u:Hi", "a:Yes.", tools=(tool,)),
            talk("u:Hi", Message("assistant", "Let me see.", tool_calls=(call,)), name="d"),
            talk("u:Hi", Message("assistant", "", tool_calls=(call,)), name="e"),
        ],
        renderer(deaf),
        ROOMY,
    )
    assert found.notes[encode.SYSTEM_DROPPED] == found.notes[encode.TOOLS_DROPPED] == 1
    assert found.notes[encode.response.CALL_DROPPED] == 1
    assert "does not write this tool call" in found.rejects[0].reason


def test_tool_calls_are_targets():
    calls = "{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}"
    r = renderer(CHATML.replace("m.content + '<", "m.content }}" + calls + "{{- '<"))
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"at": "Zürich</s>", "n": 3}}}
    (example,) = encode.encode(talk("u:Hi", Message("assistant", "See:", tool_calls=(call,))), r, ROOMY)
    assert targets(example, r).startswith('See:[{"type": "function"')
    assert targets(example, r).endswith('"arguments": {"at": "Zürich</s>", "n": 3}}}]<|im_end|>')


def test_the_date_is_fixed_and_only_counts_where_it_is_written():
    dated = "{{- strftime_now('%d %b %Y|%-d|%%') + '\\n' }}" + CHATML
    r, later = renderer(dated), renderer(dated, date=datetime.date(2027, 2, 1))
    assert r.render(talk("u:Hi").messages).startswith("31 Jan 2026|31|%\n")
    assert r.fingerprint() != later.fingerprint()
    assert renderer().fingerprint() == renderer(date=datetime.date(2027, 2, 1)).fingerprint()
    assert renderer().fingerprint() != renderer("{{- bos_token }}" + CHATML).fingerprint()
    assert (
        renderer().fingerprint()
        != renderer(tokenizer=byte_tokenizer(extra=("<|im_start|>", "<|im_end|>", "<x>"))).fingerprint()
    )
    assert chat_template.with_fixed_date(CHATML, DAY) == CHATML
    for text in (
        "\n {{ strftime_now('%Y') }}\n  {% if true %}\nx\n{% endif %}",
        "  {% if true %}{{ strftime_now('%Y') }}{% endif %}",
    ):
        plain = text.replace("strftime_now('%Y')", "'2026'")
        assert renderer(text).render(talk("u:Hi").messages) == renderer(plain).render(talk("u:Hi").messages)


OURS = {
    "chatml": "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "alpaca": "Be.\n\n### Instruction:\nHi\n\n### Response:\n",
    "vicuna": "Be. USER: Hi ASSISTANT:",
    "llama2": "[INST] <<SYS>>\nBe.\n<</SYS>>\n\nHi [/INST]",
    "zh-dialogue": "Be.\n\n用户:Hi\n\n助手:",
}


@pytest.mark.parametrize("name", chat_template.OURS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_our_templates(tmp_path: Path, name: str, adds_bos: bool):
    byte_tokenizer(adds_bos, extra=("<|im_start|>",)).save_pretrained(tmp_path / "model")
    r = load_renderer(str(tmp_path / "model"), name)
    turns = talk("s:Be.", "u:Hi", "a:Yes.", "u:More", "a:No.")
    assert r.render(turns.messages[:2]) == ("<s>" if adds_bos else "") + OURS[name]
    first, second = encode.encode(turns, r, ROOMY)
    assert targets(first, r).strip() == {"llama2": "Yes. </s>"}.get(name, "Yes.</s>")
    assert targets(second, r).strip().startswith("No.")
    r.save(tmp_path / "saved")
    again = load_renderer(str(tmp_path / "saved"))
    assert again.prompt_ids(turns.messages[:2]) == r.prompt_ids(turns.messages[:2])
    assert again.template_name == "model"
    assert again.stop_ids == r.stop_ids


def test_loading_says_what_is_wrong(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no tokenizer in this folder"):
        load_renderer(str(tmp_path / "empty"))
    with pytest.raises(InputError, match="no such folder"):
        load_renderer(str(tmp_path / "absent"))
    byte_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"did you mean `chatml`"):
        load_renderer(str(tmp_path / "model"), "chatlm")
    with pytest.raises(ConfigError, match="YYYY-MM-DD"):
        load_renderer(str(tmp_path / "model"), date="tomorrow")
    (tmp_path / "t.jinja").write_text(CHATML)
    assert load_renderer(str(tmp_path / "model"), str(tmp_path / "t.jinja")).template == CHATML
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(GraftError, match="cannot be loaded"):
        load_renderer(str(tmp_path / "model"))


def test_stops_are_gathered_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')

    def refuse(*given, **named):
        raise AssertionError("a local folder must not open a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    r = load_renderer(str(tmp_path), date="2026-01-31")
    assert r.stop_ids == (5, 6, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert (r.date, r.template_name) == (DAY, "model")


def test_a_tokenizer_without_eos(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    r = load_renderer(str(tmp_path))
    assert not any("no answer could end" in note for note in r.notes), "`<|im_end|>` ends one"
    (example,) = encode.encode(talk("u:Hi", "a:Yes."), r, ROOMY)
    assert r.decode(example.ids.tolist()).rstrip().endswith("<|im_end|>")
    (piece,) = encode.encode(talk(text="the end"), r, ROOMY)
    assert r.decode(piece.ids.tolist()) == "the end"
    with pytest.raises(InputError, match="no EOS token"):
        load_renderer(str(tmp_path), "alpaca")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 262}')
    assert load_renderer(str(tmp_path), "alpaca").tokenizer.eos_token == "</s>"


def test_a_tokenizer_with_nothing_that_ends_an_answer(tmp_path: Path):
    tokenizer = byte_tokenizer(extra=())
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    r = load_renderer(str(tmp_path))
    assert any("no answer could end" in note and "set eos_token" in note for note in r.notes)
    assert any("`<|im_start|>`, which `chatml` writes, is no token" in note for note in r.notes)
    assert isinstance(encode.encode(talk("u:Hi", "a:Yes."), r, ROOMY), Reject)


def test_characters_that_a_tokenizer_lacks():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "</s>": 3, "Hi": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    r = renderer(
        "{%- for m in messages %}{{- m.content + ' ' + (eos_token if m.role == 'assistant' else '') }}{%- endfor %}",
        tokenizer,
    )
    found = encode.encode_all([talk("u:Hi", "a:a b c"), talk("u:Hi", "a:x y")], r, ROOMY)
    assert found.notes == {spelling.UNSPELLED: 1}
    assert "does not give the answer back" in found.rejects[0].reason


def test_a_template_for_tools_is_used_with_tools(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{- tools | length }}" + CHATML}
    tokenizer.save_pretrained(tmp_path)
    r = load_renderer(str(tmp_path))
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    messages = talk("u:Hi").messages
    for tools in ((), (tool,)):
        rows = [{"role": "user", "content": "Hi"}]
        slow = tokenizer.apply_chat_template(
            rows, tools=list(tools) or None, add_generation_prompt=True, return_dict=False
        )
        assert r.prompt_ids(messages, tools) == slow
    assert r.prompt_ids(messages) != r.prompt_ids(messages, (tool,))


def test_the_layer_needs_no_torch_until_a_tokenizer_is_loaded():
    code = (
        "import sys, graft.tokens.encode, graft.tokens.show\nsys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_are_encoded_as_one_by_one():
    r = renderer()
    conversations = [talk("u:" + "the " * n, f"a: a{n}\n", name=str(n)) for n in range(CHUNK + 3)]
    together = encode.encode_all(conversations, r, ROOMY).examples
    apart = [example for c in conversations for example in encode.encode(c, r, ROOMY)]
    assert len(together) == len(apart) == CHUNK + 3
    assert all(a.ids.tolist() == b.ids.tolist() for a, b in zip(together, apart, strict=True))
