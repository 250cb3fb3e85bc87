"""`graft data prompts`: labelled rows become questions and answers, each by a drawn template, none lost."""

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.data import Source
from graft.config.prompts import Prompts
from graft.data.load import load_sources
from graft.data.prompts.draw import Draw
from graft.data.prompts.labels import name_labels, read_names
from graft.data.prompts.prepare import prepare
from graft.data.prompts.score import score
from graft.data.prompts.shots import PER_LABEL
from graft.data.tally import Tally
from graft.errors import ConfigError, DataRefused, InputError
from graft.types import Conversation, Reject


def run(*arguments: object) -> str:
    """Stdout of the command; errors of graft propagate."""
    result = CliRunner().invoke(app, ["prompts", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def made(**given) -> tuple[list[Conversation], list[Reject], Tally]:
    tally = Tally()
    items = list(prepare(Prompts.model_validate(given)).make(tally))
    rejects = [item for item in items if isinstance(item, Reject)]
    return [item.conversation for item in items if not isinstance(item, Reject)], rejects, tally


def load(path: Path) -> list[Conversation]:
    loaded = load_sources([Source.model_validate({"path": str(path)})], require_answer=False)
    assert not loaded.rejects
    return loaded.conversations


def write_csv(path: Path, rows: list[list[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """60 rows, two labels, a column without a role."""
    rows = [[f"The soup number {n} was {'fine' if n % 2 else 'cold'}.", n % 2, f"town {n % 3}"] for n in range(60)]
    return write_csv(tmp_path / "reviews.csv", [["review", "label", "city"], *rows])


GIVEN = {"task": "sentiment", "labels": "0=negative,1=positive"}


# Rows and columns -----------------------------------------------------------------------------------------------


def test_every_row_becomes_a_question_that_remembers_how_it_was_made(reviews):
    conversations, rejects, tally = made(data=str(reviews), **GIVEN)
    assert (len(conversations), rejects, tally.read) == (60, [], 60)
    for number, item in enumerate(conversations):
        user, assistant = item.messages
        text = f"The soup number {number} was {'fine' if number % 2 else 'cold'}."
        assert text in user.content
        assert item.meta["label"] == ("positive" if number % 2 else "negative")
        assert item.meta["target"] == assistant.content
        assert sorted(item.meta["choices"]) == ["negative", "positive"]
        assert item.meta["row"] == item.id == f"reviews:{number + 2}"
        assert item.meta["city"] == f"town {number % 3}"
        assert str(item.meta["template"]).startswith("en/sentiment/")
        assert score(assistant.content, item.meta) is True
        other = next(choice for choice in item.meta["choices"] if choice != item.meta["label"])
        assert score(other, item.meta) is False
    assert len({item.meta["template"] for item in conversations}) == 8
    assert {item.meta["choices"][0] for item in conversations} == {"negative", "positive"}  # their order is drawn


def test_what_is_written_is_read_back_as_it_was(reviews, tmp_path):
    out = tmp_path / "out.jsonl"
    run(reviews, "--task", "sentiment", "--labels", "0=negative,1=positive", "--shots", 2, "--out", out)
    back = load(out)
    expected, _, _ = made(data=str(reviews), shots=2, **GIVEN)
    assert [(item.id, item.messages, item.meta) for item in back] == [
        (item.id, item.messages, item.meta) for item in expected
    ]
    for suffix in (".parquet", ".jsonl.gz"):
        other = tmp_path / f"other{suffix}"
        run(reviews, "--task", "sentiment", "--labels", "0=negative,1=positive", "--shots", 2, "--out", other)
        assert [(item.id, item.meta) for item in load(other)] == [(item.id, item.meta) for item in back]


def test_meta_that_means_something_to_a_format_survives(tmp_path):
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "source": "web", "title": None, "response": "r"} for n in range(4)]
    out = tmp_path / "out.jsonl"
    run(write_jsonl(tmp_path / "rows.jsonl", rows), "--task", "topic", "--out", out)
    assert [item.meta["response"] for item in load(out)] == ["r"] * 4
    assert {item.meta["label"] for item in load(out)} == {"a", "b"}


def test_columns_are_recognised_joined_and_named(tmp_path, capsys):
    row = {"Headline": "H", "body": "B", "Category": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", [row, row | {"Category": "y", "body": "C"}])
    maker = prepare(Prompts.model_validate({"data": str(path), "task": "topic"}))
    assert maker.decisions[0] == f"{path}: text = Headline + body, label = Category"
    assert "2 labels: x, y" in maker.decisions[1]
    conversations, _, _ = made(data=str(path), task="topic", columns="text=body")
    assert all("H\n" not in item.messages[0].content for item in conversations)
    with pytest.raises(
        InputError, match=r"has no column `bdy`; did you mean `body`\?; it has Headline, body, Category"
    ):
        made(data=str(path), task="topic", columns="text=bdy")
    with pytest.raises(ConfigError, match=r"the task has the roles text, label; did you mean `text`"):
        made(data=str(path), task="topic", columns="txt=body")
    with pytest.raises(InputError, match=r"no column for `premise` .* it has Headline, body, Cat.*; say which it is"):
        made(data=str(path), task="nli")


def test_files_without_a_header(tmp_path):
    tsv = tmp_path / "a.tsv"
    tsv.write_text('1\tgood "quoted" film\n0\tbad film\n', encoding="utf-8")
    txt = tmp_path / "b.txt"
    txt.write_text('"unclosed title\t1\nother\t0\nbroken line\n', encoding="utf-8")
    conversations, rejects, _ = made(data=str(tsv), header="label,text", **GIVEN)
    assert ['good "quoted" film' in item.messages[0].content for item in conversations] == [True, False]
    conversations, rejects, tally = made(data=str(txt), header="text,label", **GIVEN)
    assert ['"unclosed title' in item.messages[0].content for item in conversations] == [True, False]
    assert (rejects[0].line, rejects[0].reason) == (3, "the row has 1 cells, --header names 2")
    assert tally.kept + tally.rejected == tally.read == 3
    with pytest.raises(InputError, match="column_1, column_2; --header NAME,NAME,... names them"):
        made(data=str(tsv), **GIVEN)
    with pytest.raises(InputError, match="leave it out here"):
        made(data=str(tmp_path / "c.jsonl"), header="a,b", **GIVEN)


def test_other_kinds_of_files(tmp_path):
    import gzip

    import openpyxl

    rows = [["review", "label"], ["good soup", 1], ["cold soup", 0]]
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"1\tgood soup\n0\tcold soup\n"))
    expected = [item.messages for item in made(data=str(write_csv(tmp_path / "c.csv", rows)), **GIVEN)[0]]
    assert len(expected) == 2
    assert [item.messages for item in made(data=str(tmp_path / "a.xlsx"), **GIVEN)[0]] == expected
    packed = made(data=str(tmp_path / "b.tsv.gz"), header="label,review", **GIVEN)[0]
    assert [item.messages for item in packed] == expected


def test_broken_rows_are_rejected_with_their_place(tmp_path):
    rows = [
        {"text": "fine", "label": "a"},
        {"text": " ", "label": "a"},
        {"text": "no label", "label": None},
        {"text": {"x": 1}, "label": "b"},
        "not a row",
        {"text": "two labels", "label": ["a", "b"]},
        {"text": "also fine", "label": "b"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    conversations, rejects, tally = made(data=str(path), task="classification")
    assert [(item.line, item.field, item.reason) for item in rejects] == [
        (2, "text", "is empty; it is the `text`"),
        (3, "label", "is empty; it is the label"),
        (4, "text", "is an object, not text"),
        (5, "", "the row is text, not an object with columns"),
        (6, "label", "is a list, not one label"),
    ]
    assert (tally.kept, tally.rejected, tally.read, len(conversations)) == (2, 5, 7, 2)
    out = tmp_path / "o.jsonl"
    with pytest.raises(DataRefused, match=r"5 of 7 rows \(71.4%\) were rejected"):
        run(path, "--task", "classification", "--out", out)
    assert not out.exists()
    assert len((tmp_path / "o.rejects.jsonl").read_text().splitlines()) == 5
    run(path, "--task", "classification", "--out", out, "--max-rejected", 1)
    assert len(load(out)) == 2


def test_other_tasks_take_their_own_columns(tmp_path):
    cases = [
        ("nli", {"sentence1": "P", "sentence2": "H", "label": "neutral"}, "neutral"),
        ("paraphrase", {"question1": "P", "question2": "H", "label": "same"}, "same"),
        ("summarisation", {"dialogue": "D", "summary1": "S"}, "S"),
        ("closed-qa", {"context": "C", "question": "Q", "answers": {"text": ["A", "B"], "answer_start": [0, 1]}}, "A"),
        ("open-qa", {"question": "Q", "answer": ["A", "B"]}, "A"),
        ("title", {"content": "D", "headline": "T"}, "T"),
        ("rewriting", {"informal": "x", "formal": "y"}, "y"),
        ("translation", {"translation": {"de": "Hallo", "en": "Hello"}}, "Hello"),
        ("translation", {"en": "Hello", "zh": "你好"}, "你好"),
        ("translation", {"src": "a", "tgt": "b", "source_lang": "Latin", "target_lang": "Greek"}, "b"),
        ("extraction", {"text": "T", "entities": '{"城市": "Oslo"}'}, '{"城市": "Oslo"}'),
        ("extraction", {"text": "T", "entities": [{"a": 1}]}, '[{"a": 1}]'),
    ]
    for number, (task, row, answer) in enumerate(cases):
        rows = [row, row | {"label": "other"}] if "label" in row else [row]
        path = write_jsonl(tmp_path / f"{number}.jsonl", rows)
        conversations, rejects, _ = made(data=str(path), task=task, template="all")
        assert not rejects
        texts = {item.messages[-1].content for item in conversations if item.meta["form"] in ("text", "word")}
        targets = texts or {item.messages[-1].content for item in conversations}
        assert answer in targets
    named, _, _ = made(data=str(tmp_path / "8.jsonl"), task="translation", template="into")
    assert "into Chinese" in named[0].messages[0].content
    with pytest.raises(InputError, match="--languages de-en"):
        made(data=str(write_jsonl(tmp_path / "t.jsonl", [{"source": "a", "target": "b"}])), task="translation")
    columns = {"data": str(write_jsonl(tmp_path / "e.jsonl", [{"text": "T", "city": "Oslo", "year": 3}]))}
    conversations, _, _ = made(**columns, task="extraction", columns="answer=city+year")
    assert conversations[0].messages[-1].content == '{"city": "Oslo", "year": 3}'


# Labels ---------------------------------------------------------------------------------------------------------


def test_numbers_are_named_by_value_by_order_or_not_at_all():
    assert name_labels(("0=no", "1=yes"), {"0", "1"}, (), "f").of == {"0": "no", "1": "yes"}
    assert name_labels(("no", "yes"), {"0", "1"}, (), "f").of == {"0": "no", "1": "yes"}
    assert name_labels(("a", "b", "c"), {"1", "3"}, (), "f").of == {"1": "a", "2": "b", "3": "c"}
    assert name_labels(("a", "b", "c"), {"0", "2"}, (), "f").of == {"0": "a", "1": "b", "2": "c"}
    assert name_labels(("a", "b"), {"b"}, (), "f").of == {"a": "a", "b": "b"}
    assert name_labels((), {"b", "a"}, (), "f").names == ("a", "b")
    with pytest.raises(InputError, match="unclear where they count from"):
        name_labels(("a", "b", "c", "d"), {"1", "2"}, (), "f")
    with pytest.raises(InputError, match="which say nothing in a prompt.*--labels 0=bad,1=good"):
        name_labels((), {"0", "1"}, ("bad", "good"), "f")
    with pytest.raises(InputError, match="of which none is among the names a, b"):
        name_labels(("a", "b"), {"x"}, (), "f")
    with pytest.raises(InputError, match="more than 500 different values"):
        name_labels((), {f"n{n}" for n in range(501)}, (), "f")
    with pytest.raises(ConfigError, match="is not VALUE=NAME"):
        name_labels(("0=a", "b"), set(), (), "f")
    with pytest.raises(ConfigError, match="the value 0 is named twice, a and b"):
        name_labels(("0=a", "0=b"), set(), (), "f")
    with pytest.raises(ConfigError, match="named twice"):
        name_labels(("a", "a"), set(), (), "f")


def test_two_labels_with_one_name_are_refused():
    with pytest.raises(ConfigError, match="the values 0 and 1 are both called `a`: answers could not be told apart"):
        name_labels(("0=a", "1=a"), ["0", "1"], (), "f: label")


TEMPLATES = """
task: sentiment
lang: en
templates:
  - {name: broken, prompt: "{{ text.nothing.at_all }}", target: "{{ label }}"}
  - {name: good, prompt: "How is it? {{ text }} {{ options }}", target: "{{ label }}"}
"""


def test_a_template_that_breaks_on_every_row_is_given_up_by_name(tmp_path, monkeypatch):
    from graft.data.prompts.make import FAILURES_IN_A_ROW
    from graft.data.prompts.template import PromptTemplate

    rows = [[f"row {n}", "ab"[n % 2]] for n in range(3 * FAILURES_IN_A_ROW)]
    data = write_csv(tmp_path / "a.csv", [["text", "label"], *rows])
    (tmp_path / "t.yaml").write_text(TEMPLATES)
    rendered = Counter()
    render = PromptTemplate.render

    def counting(self, *given):
        rendered[self.name.rsplit("/", 1)[-1]] += 1
        return render(self, *given)

    monkeypatch.setattr(PromptTemplate, "render", counting)
    for how, kept in (("all", len(rows)), ("broken", 0)):
        rendered.clear()
        maker = prepare(
            Prompts.model_validate({"data": str(data), "templates": str(tmp_path / "t.yaml"), "template": how})
        )
        tally = Tally()
        items = list(maker.make(tally))
        rejects = [item for item in items if isinstance(item, Reject)]
        assert (tally.kept, tally.rejected, tally.read) == (kept, len(rows) - kept, len(rows))
        assert len(rejects) == len(rows) - kept
        assert rendered["broken"] == FAILURES_IN_A_ROW
        (note,) = [note for note in maker.notes if "tried no more" in note]
        assert "broken broke on 100 rows in a row" in note
        assert "nothing" in note
        assert rendered["good"] == kept
    assert "is tried no more" in rejects[-1].reason


def test_a_template_with_nothing_to_ask_is_not_broken(tmp_path):
    rows = [[f"row {n}" if n == 149 else "x", "ab"[n % 2]] for n in range(150)]
    data = write_csv(tmp_path / "a.csv", [["text", "label"], *rows])
    rare = TEMPLATES.replace("{{ text.nothing.at_all }}", "{% if text != 'x' %}{{ text }} {{ options }}{% endif %}")
    (tmp_path / "t.yaml").write_text(rare)
    conversations, _, _ = made(data=str(data), templates=str(tmp_path / "t.yaml"), template="all")
    assert Counter(item.meta["template"].rsplit("/", 1)[-1] for item in conversations) == {"good": 150, "broken": 1}


def test_a_description_beside_a_labelled_set_is_passed_over(reviews, tmp_path):
    (tmp_path / "set").mkdir()
    reviews.rename(tmp_path / "set" / "reviews.csv")
    (tmp_path / "set" / "SOURCE.json").write_text('{"repo": "x",\n "files": []}')
    maker = prepare(Prompts.model_validate({"data": str(tmp_path / "set"), **GIVEN}))
    assert len(maker.pieces) == 1
    assert any("SOURCE.json: passed over, it holds no rows of data" in said for said in maker.decisions)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "World\nSci/Tech\n\n", ("World", "Sci/Tech")),
        ("a.json", '["x", "y"]', ("x", "y")),
        ("a.json", '{"0": "x", "1": "y"}', ("0=x", "1=y")),
        ("a.json", '{"x": 0, "y": 1}', ("0=x", "1=y")),
        ("a.yaml", "0: 负面\n1: 正面\n", ("0=负面", "1=正面")),
        ("dataset_info.json", '{"features": {"t": {"dtype": "string"}, "l": {"names": ["x", "y"]}}}', ("x", "y")),
    ],
)
def test_names_come_from_files_of_any_usual_form(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_names(tmp_path / name) == expected
    for broken in ("[1, [2]]", "{", '"x"'):
        (tmp_path / "b.json").write_text(broken)
        with pytest.raises(InputError, match=r"b\.json: (holds no label names|no JSON)"):
            read_names(tmp_path / "b.json")


def test_labels_without_names_and_values_without_labels(reviews, tmp_path):
    with pytest.raises(InputError, match=r"the labels are numbers \(0, 1\).*--labels 0=negative,1=positive"):
        made(data=str(reviews), task="sentiment")
    rows = [{"text": f"t{n}", "label": n % 3 - 1} for n in range(30)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    _, rejects, _ = made(data=str(path), **GIVEN)
    assert {(item.field, item.reason) for item in rejects} == {("label", "`-1` is none of the labels (0, 1)")}
    assert len(rejects) == 10
    with pytest.raises(ConfigError, match="has no labels"):
        made(
            data=str(write_jsonl(tmp_path / "q.jsonl", [{"question": "q", "answer": "a"}])),
            task="open-qa",
            labels="a,b",
        )


# Chance ---------------------------------------------------------------------------------------------------------


def test_draws_are_even_and_fixed():
    draw = Draw("a", 1, b"x")
    counts = Counter(draw.below(10) for _ in range(10_000))
    assert all(800 < counts[number] < 1200 for number in range(10))
    orders = Counter(tuple(Draw(seed).shuffled("abc")) for seed in range(6000))
    assert len(orders) == 6
    assert all(850 < count < 1150 for count in orders.values())
    assert [Draw("graft", 0).below(1000) for _ in range(2)] == [Draw("graft", 0).below(1000)] * 2
    fixed = Draw("graft", 0)
    assert [fixed.below(1000) for _ in range(10)] == FIXED


FIXED = [39, 117, 272, 653, 551, 413, 642, 483, 19, 809]
"""Literal values: a change here would give every project other prompts."""


def test_the_same_seed_gives_the_same_bytes_on_any_machine(reviews, tmp_path):
    outs = []
    for number, hashseed in enumerate(("0", "1", "2")):
        out = tmp_path / f"{number}.jsonl"
        command = [sys.executable, "-m", "graft", "data", "prompts", reviews, "--out", out, "--shots", "2"]
        command += ["--task", "sentiment", "--labels", "0=negative,1=positive", "--seed", "7"]
        environment = os.environ | {"PYTHONHASHSEED": hashseed}
        subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
        outs.append(out.read_bytes())
    assert outs[0] == outs[1] == outs[2]
    first, other = (made(data=str(reviews), seed=seed, **GIVEN)[0] for seed in (7, 8))
    assert [item.meta["template"] for item in first] != [item.meta["template"] for item in other]


def test_other_rows_do_not_change_a_rows_prompt(reviews, tmp_path):
    lines = reviews.read_text().splitlines()
    less = tmp_path / "less.csv"
    less.write_text("\n".join([lines[0], *lines[:0:-2]]) + "\n")
    all_of_them = {item.messages for item in made(data=str(reviews), **GIVEN)[0]}
    half = {item.messages for item in made(data=str(less), **GIVEN)[0]}
    assert half < all_of_them
    assert len(half) == 30


def test_which_and_how_many_templates(reviews):
    every, _, tally = made(data=str(reviews), template="all", **GIVEN)
    assert (len(every), tally.kept) == (60 * 8, 60)
    assert len({item.id for item in every}) == 60 * 8
    assert len({item.meta["row"] for item in every}) == 60
    three, _, _ = made(data=str(reviews), per_row=3, **GIVEN)
    assert Counter(item.meta["row"] for item in three).most_common()[0][1] == 3 == len(three) / 60
    assert len({(item.meta["row"], item.meta["template"]) for item in three}) == 180
    two, _, _ = made(data=str(reviews), template="json,en/sentiment/lettered", **GIVEN)
    assert {item.meta["template"] for item in two} == {"en/sentiment/json", "en/sentiment/lettered"}
    with pytest.raises(ConfigError, match="did you mean `lettered`"):
        made(data=str(reviews), template="letterd", **GIVEN)
    fixed, _, _ = made(data=str(reviews), choice_order="fixed", **GIVEN)
    assert {tuple(item.meta["choices"]) for item in fixed} == {("negative", "positive")}


# Examples -------------------------------------------------------------------------------------------------------


def shot_labels(item: Conversation) -> Counter:
    answers = [message for message in item.messages if message.role == "assistant"]
    return Counter(message.content for message in answers[:-1])


def test_examples_are_balanced_solved_and_never_the_row_itself(reviews):
    # nine rows in ten are negative; the pool must not follow them
    rows = [[f"Soup {n}.", 0 if n % 10 else 1, ""] for n in range(100)]
    write_csv(reviews, [["review", "label", "city"], *rows])
    conversations, _, _ = made(data=str(reviews), shots=4, template="question-first", **GIVEN)
    assert len(conversations) == 100
    for item in conversations:
        assert shot_labels(item) == {"negative": 2, "positive": 2}
        assert [message.role for message in item.messages] == ["user", "assistant"] * 5
        assert [message.weight for message in item.messages if message.role == "assistant"] == [0.0] * 4 + [None]
        asked = [message.content.rsplit("\n", 1)[-1] for message in item.messages if message.role == "user"]
        assert len(set(asked)) == 5
        assert item.meta["shots"] == 4
    orders = Counter(tuple(m.content for m in item.messages if m.role == "assistant")[:4] for item in conversations)
    assert len(orders) == 6  # every order of two and two
    odd = made(data=str(reviews), shots=3, template="question-first", **GIVEN)[0]
    assert {tuple(sorted(shot_labels(item).values())) for item in odd} == {(1, 2)}


def test_rows_that_ask_the_same_are_no_examples_of_each_other(tmp_path):
    rows = [{"text": "same", "label": "a"}, {"text": "same", "label": "b"}, {"text": "other", "label": "b"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    conversations, _, _ = made(data=str(path), task="classification", shots=3)
    assert [item.meta["shots"] for item in conversations] == [1, 1, 1]
    assert "other" in conversations[0].messages[0].content
    assert "same" in conversations[2].messages[0].content


def test_examples_in_one_text(reviews):
    turns, _, _ = made(data=str(reviews), shots=2, **GIVEN)
    texts, _, _ = made(data=str(reviews), shots=2, shots_as="text", **GIVEN)
    for turn, text in zip(turns, texts, strict=True):
        first, answer, second, other, asked, target = (message.content for message in turn.messages)
        assert text.messages[0].content == f"{first}\n{answer}\n\n{second}\n{other}\n\n{asked}"
        assert text.messages[1].content == target
        assert len(text.messages) == 2


def test_the_budget_of_characters_leaves_examples_out_and_counts_it(reviews):
    maker = prepare(Prompts.model_validate({"data": str(reviews), "shots": 4, "shot_chars": 250, **GIVEN}))
    tally = Tally()
    for item in maker.make(tally):
        assert not isinstance(item, Reject)
        messages = item.conversation.messages
        assert sum(len(message.content) for message in messages[:-2]) <= 250
    assert set(maker.counts.shots) <= {0, 1, 2, 3}
    assert sum(maker.counts.shots.values()) == 60


def test_a_template_that_takes_too_long_ends_the_work_whatever_the_row(reviews, monkeypatch):
    monkeypatch.setattr("graft.data.prompts.sandbox.MOST_SECONDS", -1.0)
    with pytest.raises(InputError, match=r":\d+: template en/sentiment/json: rendering takes longer"):
        made(data=str(reviews), template="json", **GIVEN)


def test_prompts_with_fewer_examples_than_asked_for_are_said(tmp_path):
    path = write_jsonl(tmp_path / "r.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(3)])
    given = (path, "--task", "open-qa", "--out", tmp_path / "o.jsonl")
    assert json.loads(run(*given, "--shots", 4, "--json"))["notes"][-1].startswith(
        "3 prompts have fewer than 4 examples (the fewest: 2)"
    )
    assert not any("fewer than" in note for note in json.loads(run(*given, "--shots", 2, "--json"))["notes"])


def test_examples_come_from_the_training_part_only(reviews, tmp_path):
    out = tmp_path / "parts"
    result = json.loads(
        run(reviews, "--task", "sentiment", "--labels", "0=negative,1=positive", "--shots", 2, "--val", 0.2,
            "--test", 0.2, "--out", out, "--json", "--template", "question-first")
    )  # fmt: skip
    parts = {name: load(out / f"{name}.jsonl") for name in ("train", "val", "test")}
    assert sum(result["written"].values()) == 60
    assert all(len(part) >= 3 for part in parts.values())
    assert result["notes"] == []
    asked = {name: {item.messages[-2].content.rsplit("\n", 1)[-1] for item in part} for name, part in parts.items()}
    shots = 0
    for name, part in parts.items():
        for item in part:
            assert item.meta["part"] == name
            for message in item.messages[:-2]:
                if message.role == "user":
                    assert message.content.rsplit("\n", 1)[-1] in asked["train"]
                    shots += 1
    assert shots == 120
    assert asked["train"].isdisjoint(asked["val"] | asked["test"])
    assert asked["val"].isdisjoint(asked["test"])


def test_a_column_may_say_the_part(tmp_path):
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "split": ("train", "validation", "test")[n % 3]} for n in range(30)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    maker = prepare(Prompts.model_validate({"data": str(path), "task": "topic", "shots": 2, "template": "json"}))
    assert f"{path}: `split` says which rows are held out" in maker.decisions
    train = {f"t{n}" for n in range(0, 30, 3)}
    for item in maker.make(Tally()):
        assert not isinstance(item, Reject)
        assert item.part == ("train", "val", "test")[int(item.conversation.id.split(":")[1]) % 3 - 1]
        for message in item.conversation.messages[:-2:2]:
            assert message.content.rsplit("\n", 1)[-1] in train


def test_examples_from_another_file(reviews, tmp_path):
    other = write_csv(tmp_path / "other.csv", [["review", "label"], ["Bread was stale.", 0], ["Tea was hot.", 1]])
    conversations, _, _ = made(data=str(reviews), shots=2, shots_from=str(other), template="question-first", **GIVEN)
    for item in conversations:
        asked = {message.content.rsplit("\n", 1)[-1] for message in item.messages[:-2] if message.role == "user"}
        assert asked == {"Bread was stale.", "Tea was hot."}
    warned = prepare(Prompts.model_validate({"data": str(reviews), "shots": 2, **GIVEN})).notes
    assert "divide here with --val and --test" in warned[0]
    empty = write_csv(tmp_path / "empty.csv", [["review", "label"], ["", 0]])
    with pytest.raises(InputError, match="hold no row that can serve as an example"):
        made(data=str(reviews), shots=2, shots_from=str(empty), **GIVEN)


def test_the_pool_is_bounded_and_does_not_depend_on_the_order(tmp_path):
    rows = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(PER_LABEL + 500)]
    one = write_jsonl(tmp_path / "one.jsonl", rows)
    two = write_jsonl(tmp_path / "two.jsonl", rows[::-1])
    first, second = (
        prepare(Prompts.model_validate({"data": str(path), "task": "open-qa", "shots": 2})) for path in (one, two)
    )
    assert len(first.pool) == PER_LABEL
    assert {item.conversation.messages for item in first.make(Tally())} == {  # type: ignore[union-attr]
        item.conversation.messages
        for item in second.make(Tally())  # type: ignore[union-attr]
    }


# Questions alone, other templates -------------------------------------------------------------------------------


def test_questions_alone_for_rows_without_answers(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"review": "Soup."}, {"review": "Tea."}])
    out = tmp_path / "q.jsonl"
    run(path, "--task", "sentiment", "--labels", "negative,positive", "--no-answers", "--out", out)
    for item in load(out):
        assert [message.role for message in item.messages] == ["user"]
        assert "target" not in item.meta
        assert "label" not in item.meta
        assert len(item.meta["choices"]) == 2
    with pytest.raises(InputError, match="the choices are unknown; name them"):
        run(path, "--task", "sentiment", "--no-answers", "--out", out)


def test_templates_of_ones_own_for_a_task_of_ones_own(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "task: urgency\nlang: en\ntemplates:\n"
        "  - {name: ask, form: letter, prompt: \"{{ mail }}\\n{{ options }}\", target: '{{ key }}'}\n"
        "  - {name: word, form: word, prompt: '{{ mail }} ({{ choices | join(\"/\") }})', target: '{{ label }}'}\n"
    )
    rows = [{"mail": "Now!", "label": "high"}, {"mail": "Whenever.", "label": "low"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    conversations, rejects, _ = made(data=str(path), templates=str(own), template="all")
    assert not rejects
    assert [item.messages[1].content for item in conversations if item.meta["form"] == "word"] == ["high", "low"]
    assert all(score(item.messages[1].content, item.meta) for item in conversations)
    assert {item.meta["task"] for item in conversations} == {"urgency"}
    with pytest.raises(ConfigError, match="none of the template files is for it"):
        made(data=str(path), templates=str(own), task="nli")


def test_a_template_that_does_not_fit_is_passed_over_and_said(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "task: t\nlang: en\ntemplates:\n"
        "  - {name: short, prompt: '{% if q | length < 3 %}{{ q }}{% endif %}', target: '{{ a }}'}\n"
        "  - {name: long, prompt: '{% if q | length < 9 %}long {{ q }}{% endif %}', target: '{{ a }}'}\n"
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [{"q": q, "a": "x"} for q in ("ab", "abcdef", "abcdefghijkl")])
    maker = prepare(Prompts.model_validate({"data": str(path), "templates": str(own), "template": "all"}))
    tally = Tally()
    items = list(maker.make(tally))
    assert (tally.kept, tally.rejected) == (2, 1)
    assert isinstance(items[-1], Reject)
    assert items[-1].reason == "template en/t/short: the prompt comes out empty (nor do 1 other templates fit)"
    assert maker.counts.templates == {"en/t/short": 1, "en/t/long": 2}
    assert maker.counts.passed_over["en/t/short: the prompt comes out empty"] == 2


# The command ----------------------------------------------------------------------------------------------------


def test_list_and_show():
    listed = run("--list")
    assert "en/nli/suppose" in listed
    assert "zh/nli/设若为真" in listed
    assert "premise, hypothesis" in listed
    assert len(json.loads(run("--list", "--task", "nli", "--json"))) == 14
    shown = run("--show", "zh/nli/选字母")
    assert shown.rstrip().endswith("--- answer\nC")
    assert json.loads(run("--show", "suppose", "--json"))["target"] == "contradiction"
    with pytest.raises(ConfigError, match="did you mean `suppose`"):
        run("--show", "supose")
    with pytest.raises(ConfigError, match="did you mean `nli`"):
        run("--list", "--task", "nly")


def test_wrong_options(reviews, tmp_path):
    out = tmp_path / "o.jsonl"
    with pytest.raises(ConfigError, match="FILE is needed, for example: graft data prompts"):
        run("--task", "nli")
    with pytest.raises(ConfigError, match="--out FILE is needed"):
        run(reviews, "--task", "nli")
    with pytest.raises(ConfigError, match="no such task; did you mean `sentiment`"):
        run(reviews, "--task", "sentimet", "--out", out)
    with pytest.raises(ConfigError, match="say what the set is for: --task sentiment"):
        run(reviews, "--out", out)
    with pytest.raises(ConfigError, match="name a folder for them"):
        run(reviews, "--task", "sentiment", "--labels", "a,b", "--out", out, "--val", 0.1)
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        run(reviews, "--task", "sentiment", "--labels", "a,b", "--out", out, "--val", 0.5, "--test", 0.5)
    with pytest.raises(ConfigError, match="is not written NAME=COLUMN"):
        run(reviews, "--task", "sentiment", "--out", out, "--columns", "review")
    with pytest.raises(ConfigError, match="both name the labels"):
        run(reviews, "--task", "sentiment", "--out", out, "--labels", "a,b", "--labels-from", "x")
    with pytest.raises(ConfigError, match="shots is 0: give both or neither"):
        run(reviews, "--task", "sentiment", "--labels", "a,b", "--out", out, "--shots-from", reviews)
    with pytest.raises(InputError, match="conversations are written as"):
        run(reviews, "--task", "sentiment", "--labels", "a,b", "--out", tmp_path / "o.txt")
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": "t", "label": "a"}])
    with pytest.raises(InputError, match="would be overwritten"):
        run(path, "--task", "topic", "--out", path)
    with pytest.raises(InputError, match="named twice"):
        run(reviews, reviews, "--task", "sentiment", "--labels", "a,b", "--out", out)
    assert not out.exists()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | st.just("t {{ x }} |||"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.fixed_dictionaries({}, optional={"text": VALUES, "label": VALUES, "id": VALUES}), max_size=6))
def test_whatever_the_rows_hold_none_is_lost(tmp_path, rows):
    good = {"text": "fine {% raw %}", "label": "yes", "id": 1}
    path = write_jsonl(tmp_path / "rows.jsonl", [good, *rows])
    conversations, rejects, tally = made(data=str(path), task="classification", labels="yes,no", shots=1)
    assert len(conversations) + len(rejects) == tally.read == len(rows) + 1
    assert "fine {% raw %}" in conversations[0].messages[-2].content  # what data hold is never Jinja


# Real sets ------------------------------------------------------------------------------------------------------

REAL = [
    ("banking77/train.csv", ["--task", "intent", "--labels-from", "banking77/categories.json"], 10003, 77),
    ("sst2/dev.tsv", ["--task", "sentiment", "--header", "label,text", "--labels", "0=negative,1=positive"], 872, 2),
    (
        "ag_news/test.csv",
        ["--task", "topic", "--header", "class,title,description", "--labels-from", "ag_news/classes.txt"],
        7600,
        4,
    ),
    (
        "chnsenticorp_etc/ChnSentiCorp_htl_all.csv",
        ["--task", "sentiment", "--lang", "zh", "--labels", "0=负面,1=正面"],
        7766,
        2,
    ),
    (
        "thucnews_titles/dev.txt",
        ["--task", "topic", "--lang", "zh", "--header", "text,label", "--labels-from", "thucnews_titles/class.txt"],
        10000,
        10,
    ),
    ("dialogsum/dialogsum.dev.jsonl", ["--task", "summarisation"], 500, 0),
    ("dialogsum/dialogsum.test.jsonl", ["--task", "title"], 500, 0),
    ("imdb_sample/imdb_sample.csv", ["--task", "sentiment", "--labels", "negative,positive", "--no-answers"], 499, 2),
]


@pytest.mark.parametrize(("file", "options", "rows", "labels"), REAL, ids=[case[0] for case in REAL])
def test_a_real_set_becomes_an_instruction_set_by_one_command(material, tmp_path, file, options, rows, labels):
    data = material / "data"
    given = [str(data / word) if "/" in word else word for word in options]
    out = tmp_path / "out.jsonl"
    result = json.loads(run(data / file, *given, "--out", out, "--json"))
    assert result["kept"] + result["rejected"] == result["read"] == rows
    assert result["rejected"] <= 1
    conversations = load(out)
    assert len(conversations) == result["kept"]
    counts = result["templates"]
    assert len(counts) >= 6
    assert max(counts.values()) < 1.5 * min(counts.values())  # templates are drawn evenly
    answered = "--no-answers" not in options
    for item in conversations[:500]:
        assert item.messages[0].content.strip()
        if answered:
            assert item.messages[-1].role == "assistant"
        if labels:
            assert len(item.meta["choices"]) == labels
        if labels and answered:
            assert score(item.messages[-1].content, item.meta) is True
    if labels and answered:
        assert len(result["labels"]) == labels
        assert sum(result["labels"].values()) == result["kept"]


def test_promptsources_own_templates_on_their_real_sets(material, tmp_path):
    data, root = material / "data", material / "prompt_templates" / "promptsource"
    out = tmp_path / "a.jsonl"
    result = json.loads(
        run(data / "ag_news/test.csv", "--header", "label,title,description", "--templates", root / "ag_news",
            "--out", out, "--json")
    )  # fmt: skip
    assert (result["kept"], len(result["templates"])) == (7600, 7)
    assert any("count the templates' answers from 1" in said for said in result["decisions"])
    first = next(item for item in load(out) if "classify" in str(item.meta["template"]))
    assert first.meta["label"] in first.meta["choices"]
    rows = load(out)
    sport = [item for item in rows if item.meta["label"] == "Sports"]
    assert len(sport) > 1000
    out = tmp_path / "b.jsonl"
    result = json.loads(
        run(data / "banking77/test.csv", "--labels-from", data / "banking77/categories.json",
            "--templates", root / "banking77", "--out", out, "--json")
    )  # fmt: skip
    assert (result["kept"], result["rejected"]) == (3080, 0)
    with (data / "banking77/test.csv").open(newline="") as file:
        truth = [row["category"] for row in csv.DictReader(file)]
    right = sum(
        name.replace("_", " ").strip("?").lower() == str(item.meta["target"]).strip("?").lower()
        for name, item in zip(truth, load(out), strict=True)
    )
    assert right > 0.9 * len(truth)


# The whole path -------------------------------------------------------------------------------------------------


def test_prompts_then_split_then_inspect_then_training(reviews, tmp_path):
    from tiny import make_model_folder

    from graft.cli.main import app as everything

    def graft(*arguments: object) -> str:
        result = CliRunner().invoke(everything, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    model = make_model_folder(tmp_path / "model")
    out, parts = tmp_path / "all.jsonl", tmp_path / "parts"
    graft("data", "prompts", reviews, "--task", "sentiment", "--labels", "0=bad,1=good", "--per-row", 2, "--out", out)
    graft("data", "split", out, "--out", parts, "--val", 0.2, "--test", 0, "--group", "row")
    rows = {name: [item.meta["row"] for item in load(parts / f"{name}.jsonl")] for name in ("train", "val")}
    assert sorted(rows["train"] + rows["val"]) == sorted(f"reviews:{n}" for n in range(2, 62) for _ in range(2))
    assert rows["val"]
    assert set(rows["train"]).isdisjoint(rows["val"])  # both prompts of a row go one way
    shown = graft("data", "inspect", "--model", model, "--data", tmp_path / "parts/train.jsonl", "--json", "-")
    first = json.loads(shown.splitlines()[0])
    assert first["rejected"] is None
    assert sum(weight > 0 for weight in first["examples"][0]["weights"]) >= 2
    graft("train", "--model", model, "--data", tmp_path / "parts/train.jsonl", "--out", tmp_path / "run",
          f"val={tmp_path / 'parts/val.jsonl'}", "epochs=1", "batch_size=16", "encode.max_length=512")  # fmt: skip
    assert (tmp_path / "run" / "final").is_dir()


def test_shots_are_not_trained_on(reviews, tmp_path):
    from tiny import make_tokenizer

    out = tmp_path / "shots.jsonl"
    run(reviews, "--task", "sentiment", "--labels", "0=bad,1=good", "--shots", 2, "--out", out)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    result = CliRunner().invoke(
        app, ["inspect", "--model", str(tmp_path / "tokenizer"), "--data", str(out), "--json", "-"]
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 60
    for row in rows:
        trained = [example for example in row["examples"] if any(example["weights"])]
        assert len(trained) == 1
        weights = trained[0]["weights"]
        assert not any(weights[: trained[0]["prompt_len"]])
        assert all(a <= b for a, b in pairwise(weights))


def test_class_names_that_datasets_noted_are_used(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t{n}" for n in range(6)], "label": [0, 1] * 3}
    made_set = datasets.Dataset.from_dict(rows, features=features)
    path = tmp_path / "set.parquet"
    made_set.to_parquet(path)
    conversations, _, _ = made(data=str(path), task="topic", labels_from=str(path))
    assert [item.meta["label"] for item in conversations] == ["no", "yes"] * 3
    made_set.save_to_disk(tmp_path / "saved")
    info = str(tmp_path / "saved" / "dataset_info.json")
    assert [item.meta["label"] for item in made(data=str(tmp_path / "saved"), task="topic", labels_from=info)[0]] == [
        *("no", "yes") * 3
    ]
    plain = tmp_path / "plain.parquet"
    made_set.to_pandas().to_parquet(plain)
    with pytest.raises(InputError, match="holds no label names"):
        read_names(plain)


def test_a_column_of_parts_is_written_as_parts(tmp_path):
    rows = [{"text": f"t{n}", "label": "ab"[n % 2], "split": ("train", "validation")[n % 2]} for n in range(10)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    result = json.loads(run(path, "--task", "topic", "--out", tmp_path / "parts", "--json"))
    assert [Path(file).name for file in result["written"]] == ["train.jsonl", "val.jsonl"]
    assert result["notes"] == ["the test part is empty: no row came to it, so there is no file"]
    assert {item.meta["part"] for item in load(tmp_path / "parts" / "val.jsonl")} == {"val"}
    (tmp_path / "parts" / "test.jsonl").write_text("{}")
    with pytest.raises(InputError, match="is from another run, this one has no test part"):
        run(path, "--task", "topic", "--out", tmp_path / "parts")
    plain = write_jsonl(tmp_path / "plain.jsonl", [{"text": "t", "label": "a"}])
    with pytest.raises(InputError, match="conversations are written as"):
        run(plain, "--task", "topic", "--out", tmp_path / "folder")
