"""`graft demo` keeps its promise: from at most 20 % to at least 90 % on unseen questions, each answer ends itself."""

import json
from pathlib import Path

import pytest

from graft.cli.main import main
from graft.demo import world

DEMO = Path(world.__file__).parent


@pytest.mark.slow
def test_the_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["graft", "demo"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    found = json.loads((tmp_path / "runs" / "demo" / "eval.json").read_text())
    base, tuned = found["columns"]
    assert (base["name"], tuned["name"]) == ("base", "tuned")
    assert found["questions"] >= 200
    assert base["exact_match"]["share"] <= 0.2
    assert tuned["exact_match"]["share"] >= 0.9
    assert tuned["stopped"]["share"] == 1.0
    assert (tmp_path / "runs" / "demo" / "report.html").stat().st_size > 20_000
    said = capsys.readouterr().out
    assert "graft chat runs/demo" in said


def first_questions(part: str) -> set[str]:
    """What each conversation begins with; a follow-up ("And what pet does he have?") names no one by itself."""
    rows = map(json.loads, (DEMO / "data" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines())
    return {next(m["content"] for m in row["messages"] if m["role"] == "user") for row in rows}


def test_no_test_question_is_trained_on():
    train, test = first_questions("train"), first_questions("test")
    assert len(train) > 900
    assert len(test) > 200
    assert not train & test


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 10 * 2**20
