"""Duplicates: the fast way over hashes equals the obvious way over sets of words, and planted ones are found."""

import random
import unicodedata
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import LANGUAGES, reference_jaccard, reference_shingles, reference_tokens, talk

from graft.data.alike.dedup import conversation_text, exact_key, near_groups
from graft.data.alike.sketch import KEPT, PERMUTATIONS, bands_for, collect, jaccard, pairs_in_buckets, similar, sketch
from graft.data.alike.text import normalise, shingle_sets, shingles, tokenise, windows
from graft.types import Conversation, Message, Origin

SPOKEN = st.text(alphabet="aAbﬁ éΣßＡ1٣+€,.-'_\n\u3000\u0301\ufe0f你好世界。😀", max_size=40)
ANYTHING = st.text(max_size=30)


# Text -----------------------------------------------------------------------------------------------------------


def slow_normalise(text: str) -> str:
    folded = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    return "".join(char for char in folded if not unicodedata.category(char).startswith("P")) or folded


@settings(max_examples=300, deadline=None)
@given(st.one_of(SPOKEN, ANYTHING))
def test_normalise_drops_case_width_blanks_and_punctuation(text):
    assert normalise(text) == slow_normalise(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(SPOKEN.map(lambda text: text.replace("\ufe0f", "")), max_size=6))
def test_tokens_of_a_batch_are_those_of_each_text(texts):
    tokens = tokenise(texts)
    assert tokens.offsets[0] == 0
    assert tokens.offsets[-1] == len(tokens.hashes) == len(tokens.kinds)
    names: dict[int, str] = {}
    for index, text in enumerate(texts):
        expected = reference_tokens(text)
        found = tokens.hashes[tokens.offsets[index] : tokens.offsets[index + 1]].tolist()
        assert len(found) == len(expected)
        for number, token in zip(found, expected, strict=True):
            assert names.setdefault(number, token) == token  # one hash, one token
    assert len(names) == len(set(names.values()))


@settings(max_examples=300, deadline=None)
@given(SPOKEN.map(lambda text: text.replace("\ufe0f", "")), SPOKEN.map(lambda text: text.replace("\ufe0f", "")))
def test_shingles_are_the_sets_that_the_docs_describe(left, right):
    a, b = set(shingles(left).tolist()), set(shingles(right).tolist())
    slow_a, slow_b = reference_shingles(left), reference_shingles(right)
    assert (len(a), len(b), len(a & b)) == (len(slow_a), len(slow_b), len(slow_a & slow_b))


@settings(max_examples=100, deadline=None)
@given(st.lists(ANYTHING, max_size=8))
def test_a_batch_is_what_its_texts_are_alone(texts):
    values, offsets = shingle_sets(texts)
    for index, text in enumerate(texts):
        mine = values[offsets[index] : offsets[index + 1]]
        assert mine.tolist() == shingles(text).tolist()
        assert len(mine) > 0
        assert (np.diff(mine.astype(np.int64)) > 0).all()


def test_windows_stay_in_their_text_and_count_by_script():
    tokens = tokenise(["a b c d", "e f", "", "你好世界啊 x"])
    _, offsets = windows(tokens, 3, 5)
    assert np.diff(offsets).tolist() == [2, 0, 0, 2]  # 你好世界啊, 好世界啊x; the others reach over the end
    both, _ = windows(tokenise(["a b c d", "b c d"]), 3, 5)
    assert both[1] == both[2] != both[0]


def test_words():
    assert len(tokenise(["Don't stop, ＷＯＲＬＤ!"]).hashes) == 4
    same = tokenise(["world", "ＷＯＲＬＤ", "World."]).hashes
    assert len(set(same.tolist())) == 1
    assert len(tokenise(["3+4"]).hashes) == 3
    bare = tokenise(["3+4=7", "a = b"]).without_symbols()
    assert np.diff(bare.offsets).tolist() == [3, 2]
    assert bare.hashes.tolist() == tokenise(["3 4 7 a b"]).hashes.tolist()
    assert len(tokenise(["สวัสดี"]).hashes) == 6  # Thai has no blanks between words
    assert len(tokenise(["안녕하세요 세계"]).hashes) == 2  # Korean has
    assert len(tokenise(["\ud800 lone"]).hashes) == 1


# Sketches -------------------------------------------------------------------------------------------------------


def test_bands_find_pairs_at_the_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        bands = bands_for(threshold)
        rows = PERMUTATIONS // bands
        assert bands * rows <= PERMUTATIONS
        assert 1 - (1 - threshold**rows) ** bands >= 0.99
        if threshold < 1:  # one more value in a band would miss more than that
            assert 1 - (1 - threshold ** (rows + 1)) ** (PERMUTATIONS // (rows + 1)) < 0.99


@pytest.mark.parametrize("language", LANGUAGES)
def test_similarity_is_exact_for_texts_that_are_kept_whole_and_near_it_for_longer_ones(language):
    rng, made = random.Random(5), LANGUAGES[language]
    texts, expected = [], []
    for length in (1, 4, 30, 200, 500, 3000):
        for changes in (0, 1, length // 60, length // 20):
            text = made.text(rng, length)
            texts += [text, made.change(rng, text, min(changes, length))]
            expected.append(reference_jaccard(*texts[-2:]))
    sketches = sketch(texts, bands_for(0.8))
    a = np.arange(0, len(texts), 2)
    found = jaccard(sketches, a, sketches, a + 1)
    short = np.array([len(reference_shingles(text)) < KEPT for text in texts[::2]])
    assert 4 <= short.sum() < len(short)
    assert found[short] == pytest.approx(np.array(expected)[short], abs=1e-12)
    assert abs(found - expected).max() < 4 * 0.022
    kept = similar(sketches, a, sketches, a + 1, 0.8)
    surely = np.array(expected) >= 0.8
    assert kept[surely].tolist() == found[surely].tolist()


def test_pairs_of_a_bucket_each_once():
    keys = np.array([7, 3, 7, 7, 5, 3], np.uint64)
    pairs = [pair for a, b in pairs_in_buckets(keys) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    assert sorted(pairs) == [(0, 2), (0, 3), (1, 5), (2, 3)]


# Groups ---------------------------------------------------------------------------------------------------------


def planted(made, rng: random.Random, count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Texts of many lengths, some the like of an earlier one; and the pairs (earlier, later)."""
    texts = [made.text(rng, rng.choice((8, 30, 80, 200, 700))) for _ in range(count)]
    pairs = []
    for source in range(0, count, 2):
        kind = rng.randrange(4)
        length = len(texts[source].split(made.join)) if made.join else len(texts[source])
        text = texts[source]
        if kind == 1:
            text = made.respell(rng, text)
        elif kind == 2:
            text = made.change(rng, text, max(1, length // 60))
        elif kind == 3:
            text = made.change(rng, text, max(1, length // 15))  # about the threshold, or below it
        pairs.append((source, len(texts)))
        texts.append(text)
    return texts, pairs


@pytest.mark.parametrize("language", LANGUAGES)
def test_planted_near_duplicates_are_found_and_nothing_else(language):
    texts, pairs = planted(LANGUAGES[language], random.Random(11), 600)
    groups = near_groups(texts)
    similarity = [reference_jaccard(texts[a], texts[b]) for a, b in pairs]
    wanted = [pair for pair, value in zip(pairs, similarity, strict=True) if value >= 0.85]
    found = [pair for pair in wanted if groups[pair[0]] == groups[pair[1]]]
    assert len(wanted) > 150
    assert len(found) >= 0.95 * len(wanted)
    # the others are told apart: texts have nothing in common with any but their own pair
    joined = [pair for pair in pairs if groups[pair[0]] == groups[pair[1]]]
    right = [pair for pair in joined if reference_jaccard(texts[pair[0]], texts[pair[1]]) >= 0.8]
    assert len(joined) < len(pairs)
    assert len(right) >= 0.95 * len(joined)
    members = np.unique(groups, return_counts=True)[1]
    assert len(members) == len(texts) - len(joined)


def test_groups_depend_on_nothing_but_the_texts():
    texts, _ = planted(LANGUAGES["english"], random.Random(12), 900)
    groups = near_groups(iter(texts))
    assert groups.tolist() == near_groups(texts, workers=2).tolist()
    assert (groups <= np.arange(len(texts))).all()
    assert (groups[groups] == groups).all()
    assert len(set(groups.tolist())) < len(texts)
    order = list(range(len(texts)))
    random.Random(1).shuffle(order)
    shuffled = near_groups([texts[index] for index in order])

    def sets(found, name):
        return {frozenset(map(name, np.flatnonzero(found == first))) for first in set(found.tolist())}

    assert sets(groups, int) == sets(shuffled, lambda place: order[place])


def test_a_thousand_copies_and_a_chain():
    made, rng = LANGUAGES["english"], random.Random(3)
    first = made.text(rng, 100)
    chain = [first]
    for _ in range(8):  # each is near the one before; the last has little of the first
        chain.append(made.change(rng, chain[-1], 3))
    assert reference_jaccard(chain[0], chain[-1]) < 0.6
    texts = [made.text(rng, 100), *chain, *[first] * 1000, "other words altogether here"]
    groups = near_groups(texts).tolist()
    assert groups == [0, *[1] * 1009, 1010]


def test_short_texts_are_like_their_equals_only():
    texts = ["Hi", "hi!", "ho", "", " ", "?", "yes please", "Yes, please.", "yes please do", "你好", "你好！", "你们"]
    assert near_groups(texts).tolist() == [0, 0, 2, 3, 3, 5, 6, 6, 8, 9, 9, 11]
    assert near_groups([]).tolist() == []
    assert near_groups(["one"]).tolist() == [0]


def test_a_higher_threshold_joins_less():
    made, rng = LANGUAGES["english"], random.Random(4)
    text = made.text(rng, 200)
    other = made.change(rng, text, 6)
    assert 0.8 < reference_jaccard(text, other) < 0.9
    assert near_groups([text, other], 0.8).tolist() == [0, 0]
    assert near_groups([text, other], 0.95).tolist() == [0, 1]
    assert near_groups([text, text], 1.0).tolist() == [0, 0]


def test_collected_batches_are_one_batch():
    texts, _ = planted(LANGUAGES["chinese"], random.Random(2), 40)
    bands = bands_for(0.8)
    make = partial(sketch, bands=bands)
    whole, parts = make(texts), collect((make(texts[start : start + 7]) for start in range(0, len(texts), 7)), bands)
    for name in ("bands", "low", "values", "offsets", "identity"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name


# Exact keys -----------------------------------------------------------------------------------------------------


def test_exact_keys_see_through_spelling_and_nothing_else():
    one = talk("What is 2+2?", "It is four.")
    assert exact_key(one) == exact_key(talk(" what IS 2+2", "It is four!", line=9, label="x"))
    assert len(exact_key(one)) == 16
    call = ({"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}},)
    others = [
        talk("What is 2+3?", "It is four."),
        talk("What is 2+2? It", "is four."),
        replace(one, messages=(Message("system", "Be brief."), *one.messages)),
        replace(one, messages=(one.messages[0], replace(one.messages[1], reasoning="2 and 2"))),
        replace(one, messages=(one.messages[0], replace(one.messages[1], tool_calls=call))),
        replace(one, messages=(one.messages[0], replace(one.messages[1], role="user"))),
        Conversation("t", Origin("f", 1), text="What is 2+2?It is four."),
    ]
    assert len({exact_key(item) for item in [one, *others]}) == len(others) + 1


def test_the_compared_text_is_all_but_the_system():
    item = Conversation("t", Origin("f", 1), (Message("system", "S"), Message("user", "U"), Message("assistant", "A")))
    assert conversation_text(item) == "U\nA"
    assert conversation_text(Conversation("t", Origin("f", 1), text="T")) == "T"
