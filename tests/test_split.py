"""The split is a function of each row's first prompt alone; and the two commands that write data."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.data import Source
from graft.data.load import load_sources
from graft.data.splitting.split import bucket, normalise, part_of, split, split_text
from graft.errors import ConfigError, DataRefused, InputError
from graft.types import Conversation, Message, Origin


def talk(prompt: str, answer: str = "a", system: str | None = None, greeting: str | None = None) -> Conversation:
    messages = [
        *([Message("system", system)] if system is not None else []),
        *([Message("assistant", greeting)] if greeting is not None else []),
        Message("user", prompt),
        Message("assistant", answer),
    ]
    return Conversation(f"{prompt}:{answer}", Origin("f", 1), tuple(messages))


MANY = [talk(f"What is {n} plus {n * 7 % 13}?") for n in range(2000)]


def test_every_row_is_in_one_part_in_order_and_the_shares_are_about_met():
    parts = split(MANY, val=0.1, test=0.2)
    assert sorted(map(id, parts.train + parts.val + parts.test)) == sorted(map(id, MANY))
    for part in (parts.train, parts.val, parts.test):
        places = [MANY.index(item) for item in part]
        assert places == sorted(places)
    # four standard deviations of a binomial around the share
    assert abs(len(parts.val) - 200) < 4 * (2000 * 0.1 * 0.9) ** 0.5
    assert abs(len(parts.test) - 400) < 4 * (2000 * 0.2 * 0.8) ** 0.5
    assert parts.notes == ()


def test_appending_and_shuffling_moves_no_row():
    def places(rows):
        parts = split(rows, 0.1, 0.1)
        by_name = {"train": parts.train, "val": parts.val, "test": parts.test}
        return {item.id: name for name, part in by_name.items() for item in part}

    shuffled = MANY[:]
    random.Random(3).shuffle(shuffled)
    before, after = places(MANY[:500]), places(shuffled)
    assert {name: after[name] for name in before} == before
    assert len(set(before.values())) == 3


def test_another_val_share_leaves_the_test_part_as_it_is_and_only_adds_to_val():
    small, large = split(MANY, 0.05, 0.1), split(MANY, 0.2, 0.1)
    assert small.test == large.test
    assert {item.id for item in small.val} < {item.id for item in large.val}


def test_equal_prompts_stay_together():
    spellings = [
        "How old is Ann?",
        "how old is  ann",
        " How old is Ann!\n",
        "ＨＯＷ old is Ann？",
    ]
    places = {bucket(talk(text, answer=str(n), system=str(n))) for n, text in enumerate(spellings)}
    places.add(bucket(talk("How old is Ann?", greeting="Welcome")))
    assert len(places) == 1
    assert bucket(talk("How old is Bob?")) not in places


def test_fixed_buckets():
    """Literal values: a change here would move the rows of every project."""
    assert [round(bucket(talk(text)), 6) for text in ("Hi", "你好，世界")] == [0.045715, 0.449337]


def test_normalise():
    assert normalise(" Ｈello,  WORLD!\t") == "helloworld"
    assert normalise("你好，世界。") == "你好世界"
    assert normalise("1 + 1 = ?") == "1+1="
    assert normalise("Straße") == "strasse"
    assert normalise("?! ...") == "?!..."
    assert normalise(" \n") == ""


def test_what_decides():
    assert split_text(Conversation("i", Origin("f", 1), text="Some Text.")) == "sometext"
    assert split_text(talk("Prompt", system="S")) == "prompt"
    assert split_text(talk("", answer="Only an answer", system="S")) == "onlyananswer"


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(max_size=20), answer=st.text(max_size=5))
def test_buckets_lie_in_the_unit_interval_and_blanks_do_not_matter(prompt, answer):
    place = bucket(talk(prompt, answer))
    assert 0 <= place < 1
    assert bucket(talk(f" {prompt}\n", answer)) == place


def test_an_empty_part_that_was_wanted_is_said():
    parts = split([talk("Hi")], val=0.001, test=0.0)
    assert (len(parts.train), parts.val, parts.test) == (1, [], [])
    assert len(parts.notes) == 1
    assert parts.notes[0].startswith("the val part is empty: 0.1% of 1 rows")


# The commands ---------------------------------------------------------------------------------------------------


def run(*arguments: object) -> str:
    """Stdout of a command; errors of graft propagate to the main entry, which prints them."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(200)) + "empty,\n")
    return path


def load(path: Path) -> list[Conversation]:
    return load_sources([Source.model_validate({"path": str(path)})]).conversations


def test_import_writes_canonical_rows_and_rejects(rows, tmp_path):
    out = tmp_path / "deep" / "out.jsonl"
    result = json.loads(run("import", rows, "--out", out, "--json"))
    assert result == {
        "read": 201,
        "kept": 200,
        "rejected": 1,
        "decisions": [f"{rows}: question-answer: 201 of 201 rows have question, answer"],
        "notes": [],
        "written": {str(out): 200},
        "rejects": str(out.with_suffix(".rejects.jsonl")),
    }
    assert len(load(out)) == 200
    assert json.loads(out.with_suffix(".rejects.jsonl").read_text()) == {
        "file": str(rows),
        "line": 202,
        "field": "answer",
        "reason": "empty answer",
    }
    assert "201 rows read, 200 kept, 1 rejected" in run("import", rows, "--out", out)


def test_import_refuses_too_many_rejects_but_lists_them(rows, tmp_path):
    out, rejects = tmp_path / "out.jsonl", tmp_path / "bad.jsonl"
    with pytest.raises(DataRefused, match="1 of 201 rows"):
        run("import", rows, "--out", out, "--rejects", rejects, "--max-rejected", 0)
    assert not out.exists()
    assert len(rejects.read_text().splitlines()) == 1


def test_commands_do_not_overwrite_what_they_read(rows, tmp_path):
    before = rows.read_bytes()
    run("import", rows, "--out", tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="would be overwritten"):
        run("import", tmp_path / "train.jsonl", "--out", tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="would be overwritten"):
        run("split", tmp_path / "train.jsonl", "--out", tmp_path)
    assert rows.read_bytes() == before


def test_split_writes_parts_that_hold_every_row_once(rows, tmp_path):
    out = tmp_path / "parts"
    result = json.loads(run("split", rows, "--out", out, "--val", 0.2, "--test", 0.1, "--json"))
    parts = {name: load(out / f"{name}.jsonl") for name in ("train", "val", "test")}
    assert result["written"] == {str(out / f"{name}.jsonl"): len(part) for name, part in parts.items()}
    assert sum(len(part) for part in parts.values()) == 200 == len({i.id for part in parts.values() for i in part})
    for name, part in parts.items():
        assert {part_of(item, 0.2, 0.1) for item in part} == {name}
    with pytest.raises(InputError, match="is there already; choose another --out, or --overwrite"):
        run("split", rows, "--out", out, "--val", 0.2, "--test", 0)
    with pytest.raises(InputError, match="is from another split"):
        run("split", rows, "--out", out, "--val", 0.2, "--test", 0, "--overwrite")


def test_training_holds_out_of_a_training_part_as_of_any_file(rows, tmp_path):
    """The parts of files lie where their hash is low: by the same hash training would find none of its share there."""
    out = tmp_path / "parts"
    run("split", rows, "--out", out, "--val", 0.1, "--test", 0.2)
    kept = load(out / "train.jsonl")
    held_out = split(kept, val=0.1, test=0.1)
    assert 100 < len(kept) < 180
    for part in (held_out.val, held_out.test):
        assert 0.02 * len(kept) < len(part) < 0.25 * len(kept)


def test_wrong_options(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"no such format; did you mean `alpaca`\?; known are auto, "):
        run("import", rows, "--out", tmp_path / "o.jsonl", "--format", "alpacca")
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        run("split", rows, "--out", tmp_path / "o", "--val", 0.5, "--test", 0.5)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        run("split", rows, "--out", tmp_path / "file")


def test_help_shows_an_example():
    for command in ("import", "split"):
        assert f"graft data {command} " in run(command, "--help")
