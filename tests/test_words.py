"""Ids word by word, and templates called directly: both give what the tokenizer and its `apply_chat_template` give."""

import datetime
import random

import pytest
from test_encode import CHATML, QWEN3, byte_tokenizer, renderer, talk
from test_tokenise import mixed_texts, slow_ids
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graft.tokens import words
from graft.tokens.direct import DirectTemplate
from graft.tokens.tokenise import Tokeniser
from graft.tokens.words import Alphabet, NotByWords, words_of
from graft.types import Message

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = (
    "ſKÅßﬆﬁ\u0301\u0345\u1161\u11a8가e\u0344\u0958\u200b\u180e\x85\x1c\xa0\u2028"
    "½²ⅷ𝟘👍🏽\u0378\U000113c5\u1c89\ua7da\x00"
)


def tokenizer_of(pattern, normalizer=None, split=True, **options):
    """Bytes and a few merges behind a pattern; with `split` false the pre-tokenizer is given as it is."""
    tokenizer = byte_tokenizer()
    backend = tokenizer.backend_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    if split:
        cut = pre_tokenizers.Split(Regex(pattern), options.get("behavior", "isolated"))
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=options.get("prefix", False), use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_only])
    return tokenizer


def same_as_slow(tokenizer, texts):
    """Share of the texts that were proven; the ids of all are the tokenizer's."""
    found = Tokeniser(tokenizer).spelled(texts)
    assert [one.ids.tolist() for one in found] == slow_ids(tokenizer, texts)
    for one, text in zip(found, texts, strict=True):
        assert not one.proven or tokenizer.decode(one.ids.tolist(), clean_up_tokenization_spaces=False) == text
    return sum(one.proven for one in found) / len(found)


CASES = {
    "GPT-2's": tokenizer_of("", split=False),
    "Qwen's": tokenizer_of(QWEN, normalizers.NFC()),
    "Llama-3's": tokenizer_of(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")),
    "o200k": tokenizer_of(O200K),
}


@pytest.mark.parametrize("case", CASES)
def test_words_give_the_tokenizers_ids(case):
    chance = random.Random(0)
    tokenizer = CASES[case]
    texts = mixed_texts(["<|im_start|>", "<|im_end|>", "</s>"])
    assert same_as_slow(tokenizer, texts) > 0.5
    parts = [*ODD, "a", "'", "'S", "'lL", "1234", " ", "\n", "中文", "É", "e", "S"]
    same_as_slow(tokenizer, ["".join(chance.choices(parts, k=chance.randrange(1, 8))) for _ in range(1500)])


@pytest.mark.parametrize("case", ["Qwen's", "Llama-3's"])
def test_every_kind_of_character(case):
    """Each character beside letters, blanks, digits and itself: spelled right, or left to the tokenizer."""
    chars = [chr(code) for code in [*range(0x2100), *range(0x2100, 0x20000, 61)] if not 0xD800 <= code < 0xE000]
    texts = [f"a{c}b {c} {c}{c}1{c}\n'{c}" for c in chars]
    assert same_as_slow(CASES[case], texts) > 0.6


def test_the_alphabet_is_needed(monkeypatch):
    """Spelled without a look at its characters, a text that NFC changes has other ids."""
    tokenizer = CASES["Qwen's"]
    known = words_of(tokenizer)
    with pytest.raises(NotByWords):
        known.spell("Cafe\u0301")
    monkeypatch.setattr(Alphabet, "__missing__", lambda *_: True)
    wrong = words_of(tokenizer).spell("Cafe\u0301")
    assert list(memoryview(wrong).cast("i")) != slow_ids(tokenizer, ["Cafe\u0301"])[0]


def test_a_word_that_does_not_decode_to_itself_is_not_proven():
    """A vocabulary without the letter q loses it: the tokenizer's ids are given, and nothing is claimed of them."""
    backend = byte_tokenizer().backend_tokenizer
    vocabulary = {token: n for n, token in enumerate(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"q"}))}
    backend.model = models.BPE(vocabulary, [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    with pytest.raises(NotByWords):
        words_of(tokenizer).spell("aqua")
    texts = [f"{n} {word}" for n in range(10) for word in ("aqua", "aua")]
    found = Tokeniser(tokenizer).spelled(texts)
    assert [one.ids.tolist() for one in found] == slow_ids(tokenizer, texts)
    assert [one.proven for one in found] == [False, True] * 10


def test_engines_that_disagree_are_not_trusted(monkeypatch):
    assert Alphabet(QWEN, False)["é"]
    honest = words._engine
    monkeypatch.setattr(words, "_engine", lambda one: lambda char: char != "é" and honest(one)(char))
    assert not Alphabet(QWEN, False)["é"]
    assert Alphabet(QWEN, False)["e"]


def test_a_full_table_begins_anew(monkeypatch):
    monkeypatch.setattr(words, "MOST_WORDS", 5)
    assert same_as_slow(CASES["Qwen's"], mixed_texts(["<|im_start|>"])) > 0.5


def test_other_tokenizers_are_asked():
    by_chance = Tokenizer(models.BPE({"a": 0}, [], dropout=0.5))
    by_chance.pre_tokenizer, by_chance.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    refused = {
        "dropout": PreTrainedTokenizerFast(tokenizer_object=by_chance),
        "a blank in front": tokenizer_of(QWEN, prefix=True),
        "words thrown away": tokenizer_of(QWEN, behavior="removed"),
        "another normaliser": tokenizer_of(QWEN, normalizers.NFKC()),
        "a pattern that engines may read differently": tokenizer_of(r"\p{L}++|\s+$|\w|."),
    }
    assert [said for said, tokenizer in refused.items() if words_of(tokenizer) is not None] == []
    odd = CASES["Qwen's"].__class__(tokenizer_object=tokenizer_of(QWEN).backend_tokenizer)
    assert words_of(odd) is not None


def test_real_tokenizers_by_words(material):
    """Real text through real tokenizers: which ones are spelled by words, and that nearly all of it is proven."""
    lines = (material / "data" / "domain-bloom" / "domain.train.json").read_text("utf-8").splitlines()[:60]
    lines += (material / "data" / "conversations60" / "conversations.jsonl").read_text("utf-8").splitlines()
    by_words = []
    for folder in sorted(path.parent for path in (material / "tokenizers").glob("*/tokenizer.json")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if words_of(tokenizer) is not None:
            by_words.append(folder.name)
            assert same_as_slow(tokenizer, lines) > 0.8 or folder.name == "pythia"  # it has tokens of blanks
    assert by_words == ["gpt-2", "llama-3.1-instruct", "minimind-v3", "pythia", "qwen2.5", "qwen3"]


# Templates called directly

TALKS = {
    "plain": talk("s:Be kind.", "u:Hi", "a:Yes.").messages,
    "reasoning": (Message("user", "Hi"), Message("assistant", "Yes.", reasoning="Hm.")),
    "names": (Message("user", "Hi", name="Ann"), Message("tool", "3", tool_call_id="x")),
    "a call": (Message("user", "Hi"), Message("assistant", "", tool_calls=({"function": {"arguments": {"a": [1]}}},))),
}
TOOLS = ({"type": "function", "function": {"name": "look", "parameters": {"n": None}}},)
SHOWS_ALL = (
    "{{- bos_token ~ eos_token }}{%- for m in messages %}{%- for k, v in m.items() | sort %}{{- k ~ '=' ~ v | tojson }}"
    "{%- endfor %}{{- m.thinking }}{%- endfor %}{{- tools | tojson if tools else tools is none }}"
    "{{- documents is none }}{{- add_generation_prompt }}{{- enable_thinking }}"
)


@pytest.mark.parametrize("template", [CHATML, QWEN3, SHOWS_ALL])
def test_a_template_called_directly_writes_the_same(template, monkeypatch):
    """The second rendering of a kind, which is done directly, is the wrapper's."""
    r = renderer(template)
    wrapped = []
    honest = DirectTemplate._wrapped
    monkeypatch.setattr(DirectTemplate, "_wrapped", lambda *given: (wrapped.append(given), honest(*given))[1])
    for messages in TALKS.values():
        for tools in ((), TOOLS):
            for prompt in (True, False):
                texts = [r.render(messages, tools, True, prompt) for _ in range(3)]
                direct = r._direct
                rows = wrapped[-1][1]
                assert texts == [honest(direct, rows, list(tools) or None, prompt, r.switch_values(True))] * 3
    assert len(wrapped) <= len(TALKS) * 4, "one comparison for each kind, and no more"
    assert all(direct._kinds.values())


def test_a_wrapper_that_does_more_is_kept(monkeypatch):
    r = renderer()
    honest = r.tokenizer.apply_chat_template
    monkeypatch.setattr(r.tokenizer, "apply_chat_template", lambda *a, **k: honest(*a, **k) + "!")
    messages = talk("u:Hi").messages
    assert [r.render(messages)[-1] for _ in range(3)] == ["!"] * 3


def test_what_is_not_plain_goes_to_the_wrapper():
    r = renderer(SHOWS_ALL)
    odd = {"function": {"name": "f", "arguments": {"day": datetime.date(2026, 1, 1), "n": (1, 2)}}}
    messages = (Message("user", "Hi"), Message("assistant", "", tool_calls=(odd,)))
    for _ in range(3):
        assert "<date>" in r.render(messages), "an inert placeholder, as transformers has it"
        assert "<date>" in r.render(messages[:1], (odd,))
