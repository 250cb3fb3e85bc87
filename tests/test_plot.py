"""Curves and pictures: the values are read back from the axes, not from pixels."""

import json

import numpy as np
import pytest

from graft.errors import InputError
from graft.use.curves import Curves, read_curves, smooth
from graft.use.plot import draw, save, svg_data_uri


def _run(folder, count=40, shift=0.0):
    folder.mkdir(parents=True)
    rows = [{"kind": "val", "step": 0, "loss": 4.0 + shift, "token_accuracy": 0.1, "tokens": 9}]
    for step in range(1, count + 1):
        rows.append({"kind": "train", "step": step, "loss": 3.0 / step + shift, "lr": 1e-4 * step})
        if step % 10 == 0:
            rows.append({"kind": "val", "step": step, "loss": 3.5 / step + shift, "token_accuracy": 0.5, "tokens": 9})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _line(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(zip(*line.get_data(), strict=True))


def test_a_runs_values_are_on_the_axes(tmp_path):
    curves = read_curves(_run(tmp_path / "我的 $run"))
    assert curves.train[:2] == [(1.0, 3.0), (2.0, 1.5)]
    assert curves.val == [(0.0, 4.0), (10.0, 0.35), (20.0, 0.175), (30.0, pytest.approx(3.5 / 30)), (40.0, 0.0875)]
    loss, lr = draw([curves]).axes
    assert _line(loss, "_raw") == curves.train
    assert _line(loss, "validation") == curves.val
    assert _line(loss, "training") == smooth(curves.train)
    (rate,) = lr.lines
    assert list(rate.get_ydata()) == [value for _, value in curves.lr]
    assert loss.get_ylim()[0] == 0
    assert loss.get_ylim()[1] > 4.0
    assert loss.get_title(loc="left").endswith(r"\$run")


def test_a_trainer_state_of_transformers_is_read(tmp_path):
    state = {
        "global_step": 20,
        "log_history": [
            {"step": 10, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0},
            {"step": 10, "epoch": 0.5, "eval_loss": 2.5, "eval_runtime": 1.0},
            {"step": 20, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.0},
            {"step": 20, "epoch": 1.0, "eval_loss": 1.5},
            {"step": 20, "epoch": 1.0, "train_runtime": 9.0, "train_loss": 1.5},
        ],
    }
    old = {"global_step": 10, "log_history": state["log_history"][:2]}
    for step, content in ((10, old), (20, state)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(content))
    wanted = Curves(tmp_path.name, [(10, 2.0), (20, 1.0)], [(10, 2.5), (20, 1.5)], [(10, 1e-4), (20, 0.0)])
    assert read_curves(tmp_path) == wanted
    by_file = read_curves(tmp_path / "checkpoint-10" / "trainer_state.json")
    assert by_file.train == [(10, 2.0)]
    loss, _ = draw([wanted]).axes
    assert _line(loss, "training") == [(10, 2.0), (20, 1.0)]


def test_several_runs_lie_over_each_other_with_their_names(tmp_path):
    curves = [read_curves(_run(tmp_path / name, shift=shift)) for name, shift in (("a", 0.0), ("b", 1.0))]
    loss, lr = draw(curves).axes
    names = [text.get_text() for text in loss.get_legend().get_texts()]
    assert names == ["a: training", "a: validation", "b: training", "b: validation"]
    assert _line(loss, "b: validation") == curves[1].val
    assert len(lr.lines) == 2
    assert len({line.get_color() for line in lr.lines}) == 2


def test_a_spike_does_not_flatten_the_rest_but_validation_is_always_inside():
    train = [(float(step), 2.0) for step in range(100)]
    train[50] = (50.0, 500.0)
    loss = draw([Curves("r", train, [(0.0, 60.0)])]).axes[0]
    assert 60 < loss.get_ylim()[1] < 100
    assert (50.0, 500.0) in _line(loss, "_raw")


def test_smoothing_keeps_straight_lines_and_quiets_noise():
    straight = [(float(step), 5.0 - 0.01 * step) for step in range(200)]
    assert np.allclose([value for _, value in smooth(straight)], [value for _, value in straight])
    noise = np.random.default_rng(0).normal(0, 1, 400)
    calm = [value for _, value in smooth([(float(i), float(v)) for i, v in enumerate(noise)])]
    assert np.std(calm) < 0.3
    few = [(0.0, 1.0), (1.0, 9.0)]
    assert smooth(few) == few


def test_pictures_are_written_and_unknown_kinds_refused(tmp_path):
    figure = draw([read_curves(_run(tmp_path / "run"))], log=True, dark=True)
    save(figure, tmp_path / "deep" / "loss.png")
    assert (tmp_path / "deep" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert svg_data_uri(figure).startswith("data:image/svg+xml;base64,")
    with pytest.raises(InputError, match=r"should end in .png"):
        save(figure, tmp_path / "loss.docx")


def test_a_logarithmic_axis_leaves_out_what_it_has_no_place_for(recwarn):
    loss = draw([Curves("r", [(1.0, 2.0), (2.0, 0.0), (3.0, 1.0)], [(1.0, -1.0), (3.0, 0.5)])], log=True).axes[0]
    assert loss.get_yscale() == "log"
    assert _line(loss, "training") == [(1.0, 2.0), (3.0, 1.0)]
    assert _line(loss, "validation") == [(3.0, 0.5)]
    with pytest.raises(InputError, match="r: no loss above 0"):
        draw([Curves("r", [(1.0, 0.0)])], log=True)
    assert not recwarn.list


def test_what_cannot_be_drawn_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_curves(tmp_path / "gone")
    with pytest.raises(InputError, match=r"neither metrics.jsonl"):
        read_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN}\n')
    with pytest.raises(InputError, match="no loss was logged"):
        read_curves(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="no log_history"):
        read_curves(tmp_path / "x.json")
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_curves(tmp_path / "y.json")


def test_a_step_logged_twice_by_a_resumed_run_counts_once(tmp_path):
    rows = [{"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 2.0), (2, 2.5), (3, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "tr')
    assert read_curves(tmp_path).train == [(1, 3.0), (2, 2.5), (3, 1.0)]
