"""An answer is right when it names the right one of its choices, and only then."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.prompts.score import chosen, score

TWO = ("negative", "positive")
NLI = ("entailment", "not entailment")
ZH = ("负面", "正面")
BANK = ("card_arrival", "card_linking", "top_up")


@pytest.mark.parametrize(
    ("said", "choices", "form", "expected"),
    [
        ("positive", TWO, "word", "positive"),
        (" Positive.\n", TWO, "word", "positive"),
        ("**Negative**", TWO, "word", "negative"),
        ("ｐｏｓｉｔｉｖｅ", TWO, "word", "positive"),
        ("The sentiment is positive.", TWO, "word", "positive"),
        ("positive\n\nThe writer likes it and is not negative.", TWO, "word", "positive"),
        ("positive or negative", TWO, "word", None),
        ("not positive", TWO, "word", None),
        ("It isn't positive", TWO, "word", None),
        ("positively charged", TWO, "word", None),
        ("I do not know", TWO, "word", None),
        ("", TWO, "word", None),
        ("not entailment", NLI, "word", "not entailment"),
        ("It is not entailment.", NLI, "word", "not entailment"),
        ("entailment", NLI, "word", "entailment"),
        ("正面。", ZH, "word", "正面"),
        ("这段话表达了正面情感", ZH, "word", "正面"),
        ("这段话不是正面的", ZH, "word", None),
        ("正面还是负面", ZH, "word", None),
        ("card_arrival", BANK, "word", "card_arrival"),
        ("the route is card_linking", BANK, "word", "card_linking"),
        ("card_arrival_late", BANK, "word", None),
        ("A", TWO, "letter", "negative"),
        ("b", TWO, "letter", "positive"),
        ("(B)", TWO, "letter", "positive"),
        ("B. positive", TWO, "letter", "positive"),
        ("B: it is positive", TWO, "letter", "positive"),
        ("B. negative", TWO, "letter", None),
        ("positive", TWO, "letter", "positive"),
        ("C", TWO, "letter", None),
        ("A good film", TWO, "letter", None),
        ("B、正面", ZH, "letter", "正面"),
        ("B", TWO, "word", None),
        ("2", BANK, "number", "card_linking"),
        ("3. top_up", BANK, "number", "top_up"),
        ("12", BANK, "number", None),
        ('{"sentiment": "positive"}', TWO, "json", "positive"),
        ('```json\n{"sentiment": "Positive"}\n```', TWO, "json", "positive"),
        ('{"sentiment": "mixed"}', TWO, "json", None),
        ('{"情感": "负面"}', ZH, "json", "负面"),
        ("positive", TWO, "json", "positive"),
        ("{" * 5000, TWO, "json", None),
    ],
)
def test_what_an_answer_chooses(said, choices, form, expected):
    assert chosen(said, choices, form) == expected


def test_the_right_choice_scores_and_a_wrong_or_unclear_one_does_not():
    meta = {"choices": list(TWO), "label": "positive", "form": "letter"}
    assert [score(said, meta) for said in ("B", "positive", "A", "neither", "")] == [True, True, False, False, False]
    assert score("positive", {"choices": list(TWO), "label": "positive"}) is True


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"choices": list(TWO)},
        {"label": "positive"},
        {"choices": "positive", "label": "positive"},
        {"choices": ["positive"], "label": "positive"},
        {"choices": list(TWO), "label": "mixed"},
        {"choices": None, "label": None},
    ],
)
def test_what_is_not_chosen_is_not_scored(meta):
    assert score("positive", meta) is None


@settings(max_examples=300, deadline=None)
@given(said=st.text(max_size=60), form=st.sampled_from(["word", "letter", "number", "json"]))
def test_any_text_is_scored_without_an_error(said, form):
    meta = {"choices": ["yes", "no", "a\\b (c"], "label": "a\\b (c", "form": form}
    assert score(said, meta) in (True, False)
    assert score("a\\b (c", meta) is True
