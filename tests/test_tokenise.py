"""Tokenising what texts share only once, and proving answers by their bytes: both give what the tokenizer gives."""

import random

import pytest
from jinja2 import TemplateError
from test_encode import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from graft.tokens import direct, tokenise
from graft.tokens.proof import bytes_of
from graft.tokens.tokenise import Tokeniser

WORDS = [
    "the",
    "Zürich ",
    " 你好",
    "👍🏽",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "e\u0301",
    "\u0301",
    "ﬁ",
    "'s",
    "123",
    "<",
    "|",
    ">",
    "",
]


def slow_ids(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def mixed_texts(specials, count=120, seed=0):
    """Texts of words, blanks and control tokens, whole and torn, in any order, sharing much."""
    chance = random.Random(seed)
    parts = [*WORDS, *specials, *(token[: len(token) // 2] for token in specials)]
    texts = ["".join(chance.choices(parts, k=chance.randrange(1, 12))) for _ in range(count)]
    return [*texts, *(a + b for a, b in zip(texts[:40], texts[40:80], strict=True)), *texts[:20], ""]


def count_pieces(monkeypatch):
    """The pieces that are tokenised."""
    seen = []
    honest = Tokeniser._known
    monkeypatch.setattr(Tokeniser, "_known", lambda self, pieces: (seen.extend(pieces), honest(self, pieces))[1])
    return seen


def test_shared_text_is_tokenised_once(monkeypatch):
    tokenizer = byte_tokenizer()
    header = "<|im_start|>user\n" + "the rules are long " * 50 + "<|im_end|>\n"
    texts = [header + f"<|im_start|>user\nquestion {n}<|im_end|>\n<|im_start|>assistant\n" for n in range(20)]
    seen = count_pieces(monkeypatch)
    assert Tokeniser(tokenizer).ids(texts) == slow_ids(tokenizer, texts)
    assert len(seen) == len(set(seen)) == 20 + 3
    assert sum(piece.count("the rules") for piece in seen) == 50


def made(*added, normalizer=None, metaspace=False):
    """A tokenizer of single characters with some added tokens."""
    alphabet = sorted({*"▁<|>abcxyz\n -", *(char for word in WORDS for char in word)})
    backend = Tokenizer(models.BPE({char: n for n, char in enumerate(alphabet)}, [], unk_token="<"))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def token(text, **options):
    return AddedToken(text, **{"normalized": False, "special": True, **options})


ODD = {
    "one token holds another": made(token("<a>"), token("<a><b>"), token("<b>"), token("<b>x")),
    "eats blanks on the left": made(token("<a>", lstrip=True), token("<b>")),
    "eats blanks on the right": made(token("<a>", rstrip=True), token("<b>")),
    "only as a word": made(token("<a>"), token("x", single_word=True)),
    "searched after normalising": made(token("<a>"), token("<b>", normalized=True), normalizer=normalizers.NFC()),
    "a blank": made(token("\n"), token("  "), token("<a>")),
    "first text gets a blank": made(token("<a>"), token("<b>"), metaspace=True),
    "each text gets a blank": made(token("<a>"), token("<b>"), normalizer=normalizers.Prepend("▁")),
    "no token at all": made(),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_tokens(case):
    tokenizer = ODD[case]
    texts = mixed_texts(["<a>", "<b>", "<a><b>", " <a> ", "x", " x ", "\n"])
    assert Tokeniser(tokenizer).ids(texts) == slow_ids(tokenizer, texts)


def test_the_check_can_fail():
    """Cut where a condition does not hold, the ids differ: the comparison of the first text then saves them."""
    tokenizer = ODD["eats blanks on the left"]
    tokeniser = Tokeniser(tokenizer)
    tokeniser._cuts = frozenset({"<a>", "<b>"})
    texts = ["b  <a>"] * 10
    cut = tokeniser._cut(texts)
    assert cut[0] == ["b  ", "<a>"]
    assert sum(tokeniser._fast(cut[0]), []) != slow_ids(tokenizer, texts)[0], "the case must arise"
    assert tokeniser.ids(texts) == slow_ids(tokenizer, texts)


def test_settings_left_by_others_do_not_matter():
    tokenizer = byte_tokenizer()
    texts = mixed_texts(["<|im_start|>", "<|im_end|>"])
    wanted = slow_ids(tokenizer, texts)
    tokeniser = Tokeniser(tokenizer)
    tokenizer.encode("the <|im_end|>", split_special_tokens=True)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert tokeniser.ids(texts) == wanted


@pytest.mark.parametrize("chars", [1, 7, 1 << 15])
def test_the_size_of_a_call_changes_nothing(monkeypatch, chars):
    tokenizer = byte_tokenizer(adds_bos=True)
    texts = mixed_texts(["<|im_start|>", "<s>"])
    monkeypatch.setattr(tokenise, "CHARS", chars)
    assert Tokeniser(tokenizer).ids(texts) == slow_ids(tokenizer, texts)
    assert Tokeniser(tokenizer).raw_ids(texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_real_tokenizers(material, monkeypatch):
    folders = sorted(path.parent for path in (material / "tokenizers").glob("*/tokenizer.json"))
    assert len(folders) >= 10
    shared = 0
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        specials = sorted(tokenizer.get_added_vocab(), key=len)[-12:]
        texts = mixed_texts(specials, seed=len(folder.name))
        with monkeypatch.context() as patch:
            seen = count_pieces(patch)
            assert Tokeniser(tokenizer).ids(texts) == slow_ids(tokenizer, texts), folder.name
        shared += bool(seen)
    assert shared >= 8, "nearly all real tokenizers must take the short way"


def test_bytes_prove_what_decoding_says(material):
    chance = random.Random(0)
    proven = 0
    for name in ("qwen2.5", "llama-3.1-instruct", "gpt-2", "pythia", "deepseek-llm"):
        tokenizer = AutoTokenizer.from_pretrained(material / "tokenizers" / name)
        spoken = bytes_of(tokenizer)
        assert spoken is not None
        for text in mixed_texts(sorted(tokenizer.get_added_vocab(), key=len)[-5:]):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert spoken.say(ids, said) or "\ufffd" in said  # DeepSeek has a token "ü" that it decodes to a torn byte
            assert not spoken.say(ids, said + "x")
            proven += spoken.say(ids, said)
        for _ in range(200):  # any ids at all, halves of characters among them: what is proven is true
            ids = [chance.randrange(len(tokenizer)) for _ in range(3)]
            said = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            assert spoken.say(ids, said) or "\ufffd" in said
    assert proven > 500
    for name in ("llama-2", "mistral-v3", "phi-3"):
        assert bytes_of(AutoTokenizer.from_pretrained(material / "tokenizers" / name)) is None


def test_other_decoders_are_asked():
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    assert bytes_of(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_a_quickened_template_writes_the_same():
    """With everything that a template may take from its globals, and names of its own over them."""
    source = (
        "{%- set ns = namespace(n=range(3) | list | length) %}{%- set joiner = dict(a=1) %}{{- joiner.a }}"
        "{%- for m in messages %}{%- set ns.n = ns.n + 1 %}{{- m.role ~ ns.n ~ cycler is defined ~ m.content }}"
        "{%- endfor %}"
        "{%- if messages | length > 1 %}{{- raise_exception('too many') }}{%- endif %}{{- strftime_now('%Y')[:2] }}"
    )
    tokenizer = byte_tokenizer()
    one, two = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hi"}] * 2

    def said(messages):
        try:
            return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
        except Exception as error:
            return repr(error)

    assert [said(one), said(two)] == ["1user4TrueHi20", "TemplateError('too many')"]
    quick, _ = direct._compiled(source)
    assert type(quick.globals) is dict
    names = {"tools": None, "documents": None, "add_generation_prompt": False, **tokenizer.special_tokens_map}
    assert quick.render(names, messages=one) == said(one)
    with pytest.raises(TemplateError, match="too many"):
        quick.render(names, messages=two)
    assert [said(one), said(two)] == ["1user4TrueHi20", "TemplateError('too many')"], "transformers' own is left alone"
