"""Leaks: planted ones of every kind are found, in English and Chinese, and rows that only look alike are not."""

import json
import random
from pathlib import Path

import pytest
from planted import LANGUAGES, reference_jaccard, reference_tokens, talk

from graft.data.alike.overlap import COMMON, GRAM, Evaluation
from graft.data.alike.questions import stream_questions
from graft.data.alike.text import tokenise
from graft.data.tally import Tally
from graft.types import Conversation, Message, Origin, Reject


def exams(made, rng, count: int) -> list[Conversation]:
    rows = []
    for line in range(1, count + 1):
        question, answer = made.text(rng, rng.choice((16, 40, 120))), made.text(rng, rng.choice((3, 20, 60)))
        rows.append(talk(question, answer, line, "exam.jsonl"))
    return rows


def leak(kind: str, exam: Conversation, made, rng) -> Conversation:
    """A training row that gives the exam away."""
    question, answer = (message.content for message in exam.messages)
    if kind == "whole":
        return talk(question, answer)
    if kind == "prompt":
        return talk(question, made.text(rng, 30))
    if kind == "spelling":
        return talk(made.respell(rng, question), made.text(rng, 30))
    if kind == "later turn":
        opening = talk(made.text(rng, 9), made.text(rng, 9)).messages
        return Conversation("t", Origin("f", 1), (*opening, Message("user", made.respell(rng, question))))
    if kind == "near":
        words = len(question.split(made.join)) if made.join else len(question)
        return talk(made.change(rng, question, max(1, words // 130)), made.text(rng, 30))
    words = question.split(made.join) if made.join else list(question)
    start = rng.randrange(len(words) - GRAM + 1)
    part = made.join.join(words[start : start + GRAM])
    around = made.text(rng, 50), made.respell(rng, part), made.text(rng, 50)
    return talk(made.text(rng, 12), made.join.join(around))


KINDS = {
    "whole": "exact",
    "prompt": "exact",
    "spelling": "exact",
    "later turn": "exact",
    "near": "near",
    "gram": "13-gram",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_planted_leaks_are_found_and_said_to_be_what_they_are(language, kind):
    made, rng = LANGUAGES[language], random.Random(21)
    exam = exams(made, rng, 200)
    rows = [leak(kind, row, made, rng) for row in exam]
    if kind == "near":  # what is near by the definition; short questions with a change are not
        both = [
            (a, b)
            for a, b in zip(rows, exam, strict=True)
            if reference_jaccard(a.messages[0].content, b.messages[0].content) >= 0.85
        ]
        rows, exam_of = [a for a, _ in both], [b for _, b in both]
    else:
        exam_of = exam
    assert len(rows) >= 50
    found = Evaluation(exam).overlaps(rows)
    right = [o for o, row in zip(found, exam_of, strict=True) if o is not None and o.against == row.origin]
    assert len(right) >= 0.95 * len(rows)
    assert {overlap.kind for overlap in right} == {KINDS[kind]}
    for overlap in right:
        assert 0 < overlap.score <= 1


@pytest.mark.parametrize("language", LANGUAGES)
def test_innocent_rows_are_let_through(language):
    made, rng = LANGUAGES[language], random.Random(22)
    exam = exams(made, rng, 200)
    innocent = [talk(made.text(rng, 60), made.text(rng, 200)) for _ in range(300)]
    for row in exam:  # twelve words of it are not thirteen
        words = reference_tokens(row.messages[0].content)[: GRAM - 1]
        innocent.append(talk(made.text(rng, 40), made.join.join((made.text(rng, 40), *words, made.text(rng, 40)))))
    assert Evaluation(exam).overlaps(innocent) == [None] * len(innocent)


def test_scores():
    made, rng = LANGUAGES["english"], random.Random(23)
    question = made.text(rng, 100)
    exam = Evaluation([talk(question, line=7, file="exam.csv")])
    changed = made.change(rng, question, 3)
    words = question.split()
    half = " ".join(words[:50])
    near, gram = exam.overlaps([talk(changed, "so"), talk("See:", made.text(rng, 30) + " " + half)])
    assert near is not None
    assert (near.kind, str(near.against)) == ("near", "exam.csv:7")
    assert near.score == pytest.approx(reference_jaccard(changed, question))
    assert gram is not None
    assert gram.kind == "13-gram"
    assert gram.score == pytest.approx((50 - GRAM + 1) / (100 - GRAM + 1))
    least = Evaluation([talk(question)], gram_share=0.5)
    assert least.overlaps([talk("See:", half)]) == [None]
    assert least.overlaps([talk("See:", "So " + " ".join(words[:70]))]) != [None]


def test_the_row_that_overlaps_most_is_named():
    made, rng = LANGUAGES["chinese"], random.Random(24)
    one, two = made.text(rng, 80), made.text(rng, 80)
    exam = Evaluation([talk(one, line=1), talk(two, line=2), talk(two, "again", line=3)])
    (found,) = exam.overlaps([talk("看", one[:20] + two[:60])])
    assert found is not None
    assert found.against.line == 2
    assert found.score == pytest.approx((60 - GRAM + 1) / (80 - GRAM + 1))
    assert exam.rows == 3


def test_the_wording_of_a_task_is_no_leak_but_its_text_is():
    made, rng = LANGUAGES["english"], random.Random(25)
    task = made.text(rng, 25)

    def ask(text):
        return talk(f"{task} {text}", "yes")

    exam = [ask(made.text(rng, 60)) for _ in range(COMMON + 30)]
    other = [ask(made.text(rng, 60)) for _ in range(50)]
    found = Evaluation(exam)
    assert found.overlaps(other) == [None] * len(other)
    assert found.overlaps([talk("Hm", exam[3].messages[0].content)])[0] is not None
    few = Evaluation(exam[:3])  # over half of the rows have it
    assert few.overlaps(other) == [None] * len(other)
    alone = Evaluation(exam[:1])
    assert None not in alone.overlaps(other)


def test_sums_are_not_words():
    """`<<3*4=12>>12` is nine tokens and says little: two different answers may well have it."""
    sums = "So 3 x 4 = <<3*4=12>>12 and 2 + 3 = <<2+3=5>>5"
    exam = Evaluation([talk("How many apples are there in a box of three rows?", sums)])
    assert len(tokenise([sums]).hashes) > 2 * GRAM
    assert exam.overlaps([talk("What do four shops pay?", "Then 3 x 4 = <<3*4=12>>12 is left.")]) == [None]
    assert exam.overlaps([talk("What do four shops pay?", sums + " left")]) != [None]


def test_raw_text_and_empty_sets():
    made, rng = LANGUAGES["english"], random.Random(26)
    question = made.text(rng, 20)
    page = Conversation("t", Origin("f", 1), text=f"{made.text(rng, 300)} {question} {made.text(rng, 300)}")
    (found,) = Evaluation([talk(question)]).overlaps([page])
    assert found is not None
    assert (found.kind, found.score) == ("13-gram", 1)
    (found,) = Evaluation([page]).overlaps([talk("Read on", question)])
    assert found is not None
    assert Evaluation([]).overlaps([page, talk("a")]) == [None, None]
    assert Evaluation([page]).overlaps([]) == []
    assert Evaluation([talk(" ", "")]).overlaps([talk(" ", "x")]) == [None]


# Evaluation files -----------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[Conversation | Reject], Tally]:
    tally = Tally()
    return list(stream_questions(str(path), tally)), tally


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"question": "Q", "answer": "A"}, ["Q", "A"]),
        ({"question": "Q"}, ["Q"]),
        ({"id": 3, "question": "Q", "choices": ["a", "b"]}, ["Q"]),
        ({"question_id": 8, "category": "x", "turns": ["Q", "R"]}, ["Q", "R"]),
        ({"instruction": "Q", "input": "R"}, ["Q\nR"]),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ["Q", "A"]),
        ({"sentence": "Q", "label": 1}, ["Q"]),
        ({"title": "Q", "body": "R", "label": 1}, ["Q\nR"]),
        ({"messages": [{"role": "user", "content": "Q"}]}, ["Q"]),
    ],
)
def test_evaluation_rows_of_any_kind(tmp_path, row, texts):
    (item,), tally = read(write(tmp_path / "exam.jsonl", [row]))
    assert isinstance(item, Conversation)
    assert [message.content for message in item.messages] == texts
    assert item.origin.line == 1
    assert (tally.kept, tally.rejected) == (1, 0)
    assert len(tally.decisions) == 1


def test_evaluation_rows_without_text_are_counted(tmp_path):
    path = write(tmp_path / "exam.jsonl", [{"question": "Q"}, {"label": 1}, 5, {"question": "R", "answer": ""}])
    items, tally = read(path)
    assert [type(item).__name__ for item in items] == ["Conversation", "Reject", "Reject", "Conversation"]
    assert (tally.kept, tally.rejected) == (2, 2)
    assert len(items) == tally.read == 4
