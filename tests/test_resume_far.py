"""Going on late in a large run does no work that grows with the steps before."""

import json
import time

import numpy as np
import pytest

from graft import runs
from graft.runs import append_jsonl, drop_last_rows
from graft.tokens.plan import Plan


def test_a_step_far_away_shuffles_its_own_epoch_and_no_other(monkeypatch):
    shuffled = []
    own = Plan.epoch_order
    monkeypatch.setattr(Plan, "epoch_order", lambda self, epoch: (shuffled.append(epoch), own(self, epoch))[1])
    plan = Plan((1.0,) * 1000, 8, epochs=10_000, seed=3)
    assert plan.total_steps == 1_250_000
    far = plan.step(1_000_000)
    assert shuffled == [8000]
    walked = Plan((1.0,) * 1000, 8, epochs=10_000, seed=3)
    near = [walked.step(number) for number in range(8000 * 125, 8000 * 125 + 2)]
    assert np.array_equal(near[0], far)
    assert not np.array_equal(near[1], far)


def test_it_takes_as_long_as_the_first_step():
    """Processor time, in turns; the plan has a million conversations, so that its one shuffle is most of it."""
    repeats = (1.0,) * 1_000_000

    def seconds(step: int) -> float:
        plan = Plan(repeats, 16, epochs=100, seed=1)
        begun = time.process_time()
        plan.step(step)
        return time.process_time() - begun

    took = [(seconds(0), seconds(1_000_000)) for _ in range(3)]
    first, far = (min(column) for column in zip(*took, strict=True))
    assert far < 3 * first + 0.05
    assert far < 2


@pytest.mark.parametrize("step", [0, 1, 49_990, 50_000, 60_000])
def test_a_log_is_cut_from_its_end(tmp_path, monkeypatch, step):
    path = tmp_path / "metrics.jsonl"
    rows = [{"kind": "train", "step": number, "said": "数" * 9} for number in range(1, 50_001)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with path.open("ab") as file:
        file.write(b'{"kind": "train", "st')  # torn by a crash
    looked_at = []
    own = json.loads
    monkeypatch.setattr(runs.json, "loads", lambda line: (looked_at.append(1), own(line))[1])
    drop_last_rows(path, lambda row: row["step"] <= step)
    monkeypatch.undo()
    assert list(runs.read_jsonl(path)) == rows[:step]
    assert len(looked_at) == 50_000 - min(step, 50_000) + (step > 0), "what is dropped, and the line that stays"
    append_jsonl(path, {"step": step + 1})
    assert list(runs.read_jsonl(path)) == [*rows[:step], {"step": step + 1}]


def test_lines_longer_than_a_piece_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_EDGE_BYTES", 7)
    path = tmp_path / "log"
    rows = [{"step": number, "text": "x" * number} for number in range(40)]
    for keep in (0, 1, 17, 39):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        drop_last_rows(path, lambda row, keep=keep: row["step"] <= keep)
        assert list(runs.read_jsonl(path)) == rows[: keep + 1]
    path.write_text("")
    drop_last_rows(path, lambda _row: True)
    assert path.read_bytes() == b""
