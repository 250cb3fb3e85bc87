"""`graft data split` over files: what stays together, what the parts promise, and that evaluation rows do not leak."""

import errno
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import LANGUAGES
from typer.testing import CliRunner

from graft.cli.data.app import app
from graft.config.data import Source
from graft.data.load import load_sources
from graft.data.splitting.divide import PARTS, TEST, TRAIN, VAL, divide
from graft.data.splitting.split import part_of, split_text
from graft.errors import ConfigError, DataRefused, InputError

ENGLISH, CHINESE = LANGUAGES["english"], LANGUAGES["chinese"]


def run(*arguments: object) -> dict:
    """The JSON object that the command prints."""
    result = CliRunner().invoke(app, ["split", *map(str, arguments), "--json"])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_of(out: Path) -> dict[str, list[dict]]:
    return {name: lines(out / f"{name}.jsonl") for name in PARTS if (out / f"{name}.jsonl").exists()}


def family(made, rng, number: int, copies: int) -> list[dict]:
    """One question and its near-duplicates, with other answers."""
    question = made.text(rng, 130)
    asked = [question, made.respell(rng, question)] + [made.change(rng, question, 1) for _ in range(copies)]
    return [
        {"id": f"{number}.{copy}", "question": text, "answer": made.text(rng, 20), "label": f"L{number % 3}"}
        for copy, text in enumerate(asked)
    ]


@pytest.fixture(scope="module")
def heap() -> list[dict]:
    """200 families in two languages, shuffled."""
    rng = random.Random(7)
    rows = [row for n in range(200) for row in family((ENGLISH, CHINESE)[n % 2], rng, n, rng.randrange(4))]
    rng.shuffle(rows)
    return rows


def prompts(part: list[dict]) -> set[str]:
    from graft.data.alike.text import normalise

    return {normalise(row["messages"][0]["content"]) for row in part}


# What stays together ----------------------------------------------------------------------------------------------


def test_near_duplicates_stay_together_and_nothing_overlaps(tmp_path, heap):
    result = run(
        write(tmp_path / "rows.jsonl", heap), "--out", tmp_path / "out", "--val", 0.2, "--test", 0.2, "--check"
    )
    parts = parts_of(tmp_path / "out")
    assert sum(map(len, parts.values())) == len(heap) == result["kept"] == result["read"]
    assert result["rejected"] == 0
    assert {row["id"] for part in parts.values() for row in part} == {row["id"] for row in heap}
    families = {name: {row["id"].split(".")[0] for row in part} for name, part in parts.items()}
    assert min(map(len, families.values())) > 15
    assert (
        not families["train"] & families["val"]
        | families["train"] & families["test"]
        | families["val"] & families["test"]
    )
    assert not prompts(parts["train"]) & (prompts(parts["val"]) | prompts(parts["test"]))
    assert result["same_prompt_in_two_parts"] == 0
    assert result["parts_overlap"] == {}
    assert result["groups"] == {name: len(found) for name, found in families.items()}
    assert lines(tmp_path / "out" / "overlaps.jsonl") == []


def test_the_check_sees_what_a_careless_split_tears_apart(tmp_path, heap):
    out = tmp_path / "out"
    result = run(
        write(tmp_path / "rows.jsonl", heap), "--out", out, "--group", "none", "--val", 0.2, "--test", 0.2, "--check"
    )
    assert result["same_prompt_in_two_parts"] > 20
    assert any("first prompt that another part has too" in note for note in result["notes"])
    assert result["parts_overlap"]["exact"] > 20
    assert result["parts_overlap"]["near"] > 20
    assert len(lines(out / "overlaps.jsonl")) == sum(result["parts_overlap"].values())
    listed = lines(out / "overlaps.jsonl")[0]
    train = lines(out / "train.jsonl")[listed["line"] - 1]
    file, line = listed["against"].rsplit(":", 1)
    other = lines(Path(file))[int(line) - 1]
    assert (listed["file"], Path(file).name in ("val.jsonl", "test.jsonl")) == (str(out / "train.jsonl"), True)
    assert train["id"].split(".")[0] == other["id"].split(".")[0]


def test_overlaps_of_an_earlier_split_do_not_lie_beside_the_parts_of_this_one(tmp_path, heap):
    data = write(tmp_path / "heap.jsonl", heap)
    run(data, "--out", tmp_path / "out", "--group", "none", "--check")
    assert lines(tmp_path / "out" / "overlaps.jsonl")
    run(data, "--out", tmp_path / "out", "--group", "none", "--overwrite")
    assert not (tmp_path / "out" / "overlaps.jsonl").exists()


def test_whole_conversations_group_too(tmp_path):
    rng = random.Random(5)
    story = ENGLISH.text(rng, 300)
    rows = [{"question": f"{ENGLISH.text(rng, 4)}?", "answer": ENGLISH.change(rng, story, 2)} for _ in range(60)]
    rows += [{"question": f"{ENGLISH.text(rng, 4)}?", "answer": ENGLISH.text(rng, 50)} for _ in range(60)]
    result = run(write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "o", "--val", 0.3, "--test", 0)
    assert result["largest_group"] == 60
    assert sum(result["groups"].values()) == 61
    assert any("the largest group has 60 of 120 rows" in note for note in result["notes"])


def test_a_column_groups(tmp_path):
    rows = [{"question": f"q {n}", "answer": "a", "user": n % 40} for n in range(400)] + [
        {"question": "x", "answer": "a"}
    ]
    path = write(tmp_path / "r.jsonl", rows)
    result = run(path, "--out", tmp_path / "o", "--group", "user", "--val", 0.3, "--test", 0.3, "--stratify", "none")
    users = {name: {row.get("user") for row in part} for name, part in parts_of(tmp_path / "o").items()}
    assert sum(map(len, users.values())) == 41
    assert len(set.union(*users.values())) == 41
    assert any("1 rows without one by their prompt" in said for said in result["decisions"])
    with pytest.raises(InputError, match=r"--group usr: no row has a value in such a column; did you mean `user`\?"):
        run(path, "--out", tmp_path / "p", "--group", "usr")
    with pytest.raises(InputError, match=r"--stratify usr: no row has a value in such a column; did you mean `user`\?"):
        run(path, "--out", tmp_path / "p", "--stratify", "usr")


def test_exact_groups_go_by_their_first_prompt_alone(tmp_path, heap):
    path = write(tmp_path / "rows.jsonl", heap)
    run(path, "--out", tmp_path / "o", "--group", "exact", "--stratify", "none", "--val", 0.1, "--test", 0.2)
    conversations = load_sources([Source(path=str(path))]).conversations
    expected = {name: [item.id for item in conversations if part_of(item, 0.1, 0.2) == name] for name in PARTS}
    assert {name: [row["id"] for row in part] for name, part in parts_of(tmp_path / "o").items()} == expected


# What is promised -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["exact", "none", "label", "near"])
def test_appended_rows_move_none(tmp_path, heap, group):
    cut = len(heap) // 2
    fresh = [
        {**row, "question": row["question"] + " " + ENGLISH.text(random.Random(n), 200)}
        for n, row in enumerate(heap[cut:])
    ]
    where = []
    for name, rows in (("before", heap[:cut]), ("after", heap[:cut] + fresh)):
        out = tmp_path / name
        run(
            write(tmp_path / f"{name}.jsonl", rows),
            "--out",
            out,
            "--group",
            group,
            "--stratify",
            "none",
            "--val",
            0.2,
            "--test",
            0.2,
        )
        where.append({row["id"]: part for part, found in parts_of(out).items() for row in found})
    before, after = where
    assert len(after) == len(heap) > len(before) == cut
    assert {key: after[key] for key in before} == before


def test_a_row_that_joins_two_groups_takes_the_later_one_to_the_earlier(tmp_path):
    rng = random.Random(6)
    moved = 0
    for n in range(12):
        words = ENGLISH.text(rng, 110).split()
        one, between, two = (" ".join(words[start : start + 100]) for start in (0, 5, 10))
        rows = [
            {"id": name, "question": text, "answer": name} for name, text in (("1", one), ("2", two), ("3", between))
        ]
        where = []
        for count in (2, 3):
            out = tmp_path / f"{n}.{count}"
            path = write(tmp_path / "r.jsonl", rows[:count])
            result = run(path, "--out", out, "--near", 0.9, "--stratify", "none", "--val", 0.3, "--test", 0.3)
            assert sum(result["groups"].values()) == {2: 2, 3: 1}[count]
            where.append({row["id"]: part for part, found in parts_of(out).items() for row in found})
        before, after = where
        assert set(after.values()) == {before["1"]}
        moved += before["2"] != before["1"]
    assert 2 < moved < 12


def test_the_same_bytes_for_any_number_of_workers(tmp_path, heap):
    path = write(tmp_path / "rows.jsonl", heap)
    for workers in (1, 2):
        run(path, "--out", tmp_path / str(workers), "--workers", workers, "--val", 0.1, "--test", 0.1)
    for name in PARTS:
        one, two = ((tmp_path / folder / f"{name}.jsonl").read_bytes() for folder in "12")
        assert one == two
        assert one


def test_strata_have_their_shares_to_the_row(tmp_path):
    rows = [{"question": f"question {n}?", "answer": "a", "label": "common" if n % 10 else "rare"} for n in range(500)]
    result = run(write(tmp_path / "r.jsonl", rows), "--out", tmp_path / "o", "--val", 0.1, "--test", 0.2)
    assert result["stratified_by"] == "label"
    assert result["strata"] == {
        "common": {"train": 315, "val": 45, "test": 90},
        "rare": {"train": 35, "val": 5, "test": 10},
    }
    counted = {name: dict(Counter(row["label"] for row in part)) for name, part in parts_of(tmp_path / "o").items()}
    assert counted["test"] == {"common": 90, "rare": 10}
    assert any(said.startswith("stratified by label: 2 values") for said in result["decisions"])


def test_a_column_by_any_name_and_value(tmp_path):
    values = ["[/red]", 3, True, ["a", {"b": 1}], None]
    rows = [{"question": f"q {n}", "answer": "a", "[/x]": values[n % 5]} for n in range(50)]
    path = write(tmp_path / "r.jsonl", rows)
    asked = (path, "--out", tmp_path / "o", "--val", 0.1, "--test", 0.1, "--stratify", "[/x]")
    assert run(*asked)["strata"] == {
        name: {"train": 8, "val": 1, "test": 1} for name in ("", "3", "[/red]", '["a", {"b": 1}]', "true")
    }
    shown = CliRunner().invoke(app, ["split", *map(str, asked), "--overwrite"])
    assert shown.exception is None
    for text in (
        "Rows by [/x]",
        "[/red]",
        "(none)",
        "0 of 10 held-out rows have a first prompt that is in another part",
    ):
        assert text in shown.stdout


def test_auto_takes_the_file_where_there_is_no_label(tmp_path):
    one = write(tmp_path / "a.jsonl", [{"question": f"a {n}", "answer": "a"} for n in range(100)])
    two = write(tmp_path / "b.jsonl", [{"question": f"b {n}", "answer": "a"} for n in range(300)])
    result = run(one, two, "--out", tmp_path / "o", "--val", 0.1, "--test", 0)
    assert result["stratified_by"] == "file"
    assert [counts["val"] for counts in result["strata"].values()] == [10, 30]
    assert run(one, "--out", tmp_path / "p", "--val", 0.1, "--test", 0)["stratified_by"] is None


def test_counts_of_rows(tmp_path, heap):
    path = write(tmp_path / "rows.jsonl", heap)
    result = run(path, "--out", tmp_path / "o", "--val", 30, "--test", 50, "--stratify", "none", "--group", "exact")
    assert (result["rows"]["val"], result["rows"]["test"]) == (30, 50)
    more = run(path, "--out", tmp_path / "p", "--val", 100, "--test", 50, "--stratify", "none", "--group", "exact")
    assert more["rows"]["val"] == 100
    assert (tmp_path / "o" / "test.jsonl").read_bytes() == (tmp_path / "p" / "test.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=rf"--val 0.5 \+ --test {len(heap)} of {len(heap)} rows leave nothing"):
        run(path, "--out", tmp_path / "q", "--val", 0.5, "--test", len(heap))
    with pytest.raises(ConfigError, match="--val 1.5: a share is below 1"):
        run(path, "--out", tmp_path / "q", "--val", 1.5)
    assert list((tmp_path / "q").glob("*.jsonl")) in ([], [tmp_path / "q" / "rejects.jsonl"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_divided_rows(data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=30))
    first = np.cumsum([0, *sizes[:-1]])
    groups = np.repeat(first, sizes)
    total = len(groups)
    places = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=total, max_size=total)))
    strata = data.draw(st.none() | st.lists(st.integers(0, 2), min_size=total, max_size=total))
    val, test = data.draw(st.tuples(st.floats(0, 0.5), st.floats(0, 0.4)))
    parts = divide(places, groups, strata, val, test)
    assert len(parts) == total
    for group in first:
        assert len(set(parts[groups == group].tolist())) == 1
    if strata is not None:
        for part, share in ((VAL, val), (TEST, test)):
            assert np.count_nonzero(parts == part) <= round(total * share)
    assert np.array_equal(divide(places, groups, strata, 0, test) == TEST, parts == TEST)
    assert set(divide(places, groups, strata, 0, 0).tolist()) == {TRAIN}


# Decontamination --------------------------------------------------------------------------------------------------


@pytest.fixture
def exam(tmp_path) -> tuple[Path, Path, set[str]]:
    """Training rows, some of which give a file of questions away, and the ids of those."""
    rng = random.Random(9)
    questions, rows, leaks = [], [], set()
    for n in range(120):
        made = (ENGLISH, CHINESE)[n % 2]
        question = made.text(rng, 150)
        questions.append({"number": n, "question": question})
        words = question.split() if made is ENGLISH else list(question)
        part = made.join.join(words[n % 100 : n % 100 + 13])
        leak = [
            question,
            made.respell(rng, question),
            made.change(rng, question, 1),
            made.join.join([made.text(rng, 40), part]),
        ][n % 4]
        rows.append({"id": f"leak {n}", "question": leak, "answer": made.text(rng, 30)})
        leaks.add(f"leak {n}")
        rows += [{"id": f"{n}.{k}", "question": made.text(rng, 150), "answer": made.text(rng, 30)} for k in range(3)]
    rng.shuffle(rows)
    return write(tmp_path / "rows.jsonl", rows), write(tmp_path / "exam.jsonl", questions), leaks


def test_leaks_are_dropped_and_each_is_listed_with_what_it_overlaps(tmp_path, exam):
    path, questions, leaks = exam
    result = run(path, "--out", tmp_path / "o", "--against", questions)
    kept = {row["id"] for part in parts_of(tmp_path / "o").values() for row in part}
    rejects = lines(tmp_path / "o" / "rejects.jsonl")
    ids = [row["id"] for row in lines(path)]
    dropped = {ids[reject["line"] - 1] for reject in rejects}
    assert dropped <= leaks
    assert len(dropped) >= 0.95 * len(leaks)
    assert kept == set(ids) - dropped
    assert result["read"] == result["kept"] + result["rejected"] == len(ids)
    assert result["against"] == {"rows": 120, "dropped": True, "overlaps": dict(Counter(r["kind"] for r in rejects))}
    assert set(result["against"]["overlaps"]) == {"exact", "near", "13-gram"}
    for reject in rejects:
        file, line = reject["against"].rsplit(":", 1)
        assert file == str(questions)
        assert ids[reject["line"] - 1] == f"leak {int(line) - 1}"
        assert reject["reason"].startswith(f"overlaps {questions}:{line} ({reject['kind']}, ")
        assert reject["file"] == str(path)
        assert 0 < reject["score"] <= 1


def test_leaks_are_only_reported_where_that_is_asked(tmp_path, exam):
    path, questions, leaks = exam
    result = run(path, "--out", tmp_path / "o", "--against", questions, "--against-action", "report")
    assert result["kept"] == result["read"]
    assert lines(tmp_path / "o" / "rejects.jsonl") == []
    listed = lines(tmp_path / "o" / "overlaps.jsonl")
    assert len(leaks) >= len(listed) >= 0.95 * len(leaks)
    few = run(path, "--out", tmp_path / "p", "--against", questions, "--ngram-share", 0.5)
    assert "13-gram" not in few["against"]["overlaps"]
    assert few["against"]["overlaps"]["near"] == result["against"]["overlaps"]["near"]


def test_parts_appear_all_or_none(tmp_path, heap, monkeypatch):
    """A new test part beside an old train part would share rows with it."""
    rows = write(tmp_path / "a.jsonl", heap)
    out = tmp_path / "out"
    run(rows, "--out", out, "--group", "exact")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"train.jsonl", "val.jsonl", "test.jsonl"} <= set(before)
    real, calls = os.fsync, []

    def full_at_the_last(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 4:  # rejects, then the three parts
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr("graft.runs.fsync_folder", lambda folder: None)
    monkeypatch.setattr(os, "fsync", full_at_the_last)
    with pytest.raises(InputError, match="No space left"):
        run(rows, "--out", out, "--group", "exact", "--val", "0.3", "--test", "0.3", "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_in_the_place_of_a_part_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out" / "val.jsonl").mkdir(parents=True)
    with pytest.raises(InputError, match="val.jsonl: is a folder"):
        run(tmp_path / "not-there.jsonl", "--out", tmp_path / "out")


@pytest.mark.parametrize("wish", ["inf", "1.5"])
def test_a_count_is_a_whole_number(tmp_path, wish):
    with pytest.raises(ConfigError, match="a count of rows is a whole number"):
        run(write(tmp_path / "a.jsonl", [{"text": "a"}]), "--out", tmp_path / "out", "--val", wish)


def test_nothing_is_left(tmp_path, exam):
    path, _, _ = exam
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(DataRefused, match="all 480 rows overlap"):
        run(path, "--out", tmp_path / "o", "--against", copy)
    assert len(lines(tmp_path / "o" / "rejects.jsonl")) == 480
    assert not (tmp_path / "o" / "train.jsonl").exists()


def test_wrong_evaluation_files(tmp_path, exam):
    path, questions, _ = exam
    with pytest.raises(InputError, match="no such file"):
        run(path, "--out", tmp_path / "o", "--against", tmp_path / "exams.jsonl")
    blind = write(tmp_path / "blind.jsonl", [{"label": 1}, {"label": 2}])
    with pytest.raises(InputError, match=r"blind.jsonl: 2 rows cannot be compared, the first in line 1: has no text"):
        run(path, "--out", tmp_path / "o", "--against", blind)
    (tmp_path / "test.jsonl").write_bytes(questions.read_bytes())
    with pytest.raises(InputError, match="would be overwritten"):
        run(path, "--out", tmp_path, "--against", tmp_path / "test.jsonl")


def test_rejected_rows_are_refused_as_ever_and_listed(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"question": f"q {n}", "answer": "a" if n % 4 else ""} for n in range(100)])
    with pytest.raises(DataRefused, match="25 of 100 rows"):
        run(path, "--out", tmp_path / "o")
    assert len(lines(tmp_path / "o" / "rejects.jsonl")) == 25
    assert [item.name for item in (tmp_path / "o").iterdir()] == ["rejects.jsonl"]
    result = run(path, "--out", tmp_path / "o", "--max-rejected", 0.3)
    assert (result["read"], result["kept"], result["rejected"]) == (100, 75, 25)


# Real sets --------------------------------------------------------------------------------------------------------

SETS = [
    "stanford_alpaca/alpaca_5000.json",
    "domain-bloom/domain.train.json",
    "domain-self-instruct/train_data_家庭教育.jsonl",
    "llamafactory_demos/glaive_toolcall_zh_demo.json",
    "llamafactory_demos/identity.json",
    "llama-lora-fine-tuning/dummy_cn.json",
    "conversations60/conversations.jsonl",
    "gsm8k/test.jsonl",
]


@pytest.mark.parametrize("name", SETS)
def test_real_sets_split_without_overlap(tmp_path, material, name):
    result = run(
        material / "data" / name, "--out", tmp_path, "--val", 0.1, "--test", 0.1, "--check", "--max-rejected", 0.2
    )
    assert result["read"] == result["kept"] + result["rejected"]
    assert result["same_prompt_in_two_parts"] == 0
    assert result["parts_overlap"].get("exact", 0) == 0
    assert sum(len(part) for part in parts_of(tmp_path).values()) == result["kept"]
    found = {
        name: load_sources([Source(path=path)]).conversations
        for name, path in ((Path(p).stem, p) for p in result["written"])
    }
    keys = [{split_text(item) for item in part} for part in found.values()]
    assert sum(map(len, keys)) == len(set.union(*keys))


def test_a_real_evaluation_in_several_forms(tmp_path, material):
    """Questions of a benchmark, planted among other real rows as they are."""
    data = material / "data"
    turns = [json.loads(line)["turns"] for line in (data / "fastchat" / "question.jsonl").open()]
    planted = [{"question": turn[0], "answer": "It depends."} for turn in turns]
    path = write(tmp_path / "planted.jsonl", planted)
    result = run(
        data / "gsm8k" / "test.jsonl", path, "--out", tmp_path / "o", "--against", data / "fastchat" / "question.jsonl"
    )
    assert result["against"]["rows"] == len(turns) > 50
    assert result["against"]["overlaps"]["exact"] == len({turn[0] for turn in turns})
    assert result["rejected"] == sum(result["against"]["overlaps"].values()) <= len(turns) + 2


def test_parts_that_are_there_are_not_written_over_unasked(tmp_path):
    rows = [{"question": f"How much is {n} and {n}?", "answer": str(2 * n)} for n in range(40)]
    file = write(tmp_path / "data.jsonl", rows)
    run(file, "--out", tmp_path / "parts")
    before = (tmp_path / "parts" / "train.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"train\.jsonl: is there already; choose another --out, or --overwrite"):
        run(write(file, rows[:30]), "--out", tmp_path / "parts")
    assert (tmp_path / "parts" / "train.jsonl").read_bytes() == before
    run(file, "--out", tmp_path / "parts", "--overwrite")
    assert (tmp_path / "parts" / "train.jsonl").read_bytes() != before
