"""Each sentinel stops a run that has gone wrong, and none says a word about one that goes well."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model_folder
from tiny_runs import settings_for

from graft.errors import Diverged
from graft.train.loop import train
from graft.train.sentinels import SPIKES_IN_A_ROW, Sentinels, Step
from graft.train.step import RowSums, Stepper

SAID = ("times the median", "have changed in", "have had no gradient", "exactly 0")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def watch(monkeypatch, change) -> list[int]:
    """Let `change` (step from 0, sums) stand in for what a row gives; the rows that were computed."""
    accumulate, rows = Stepper.accumulate, []

    def changed(stepper, row, number, weight):
        rows.append(number[0])
        return change(number[0], accumulate(stepper, row, number, weight))

    monkeypatch.setattr(Stepper, "accumulate", changed)
    return rows


@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
def test_a_run_that_goes_well_is_let_alone(base, tmp_path, capsys, monkeypatch, method):
    seen = []
    judge = Sentinels.judge
    monkeypatch.setattr(Sentinels, "judge", lambda self, *args: (seen.append(self), judge(self, *args)))
    train(settings_for(base, tmp_path, f"method={method}", "epochs=14", "batch_size=8", "eval_every=100"))
    assert len(seen) == 56
    watcher = seen[-1]
    assert watcher.updates == 56
    assert not watcher.unseen
    assert watcher._sample is None, "it was asked which weights have changed"
    err = capsys.readouterr().err
    assert not any(text in err for text in SAID), err


def test_watching_reads_nothing_more_from_the_device(base, tmp_path, monkeypatch):
    """As many tensors are turned into numbers in a step's update with sentinels as without."""
    reads, inside, per_step = Counter(), [], []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        own = getattr(torch.Tensor, name)

        def counted(tensor, *args, _own=own, _name=name, **kwargs):
            if inside:
                reads[_name] += 1
            return _own(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    update, judge = Stepper.update, Sentinels.judge

    def inner(function):
        def within(*args):
            inside.append(1)
            try:
                return function(*args)
            finally:
                inside.pop()

        return within

    monkeypatch.setattr(Stepper, "update", inner(update))
    monkeypatch.setattr(Sentinels, "judge", inner(judge))
    train(settings_for(base, tmp_path, "epochs=14", "eval_every=100", out="with"))
    with_them = dict(reads)
    reads.clear()
    monkeypatch.setattr(Sentinels, "questions", lambda self: per_step.append(1) or [])
    monkeypatch.setattr(Sentinels, "judge", lambda self, *args: None)
    train(settings_for(base, tmp_path, "epochs=14", "eval_every=100", out="without"))
    assert len(per_step) == 56
    assert with_them == dict(reads)
    assert reads["tolist"] >= 56, "each step was looked at"


def test_a_loss_of_exactly_zero(base, tmp_path, monkeypatch):
    rows = watch(monkeypatch, lambda step, sums: RowSums(sums.loss * 0, sums.nll * 0))
    with pytest.raises(Diverged, match=r"step 3: the loss is exactly 0 for 3 steps in a row, over \d+ target tokens"):
        train(settings_for(base, tmp_path))
    assert rows[-1] == 2


def test_no_gradient_at_all(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Stepper, "_backward", lambda self, loss: None)
    with pytest.raises(Diverged, match="step 3: the gradient is exactly 0 for 3 steps in a row") as caught:
        train(settings_for(base, tmp_path))
    assert caught.value.exit_code == 4


def test_a_loss_of_ln_vocabulary_without_a_gradient(tmp_path):
    """A base whose last norm is all zeros, as of a file that was half written: every token is equally likely."""
    base = make_model_folder(tmp_path / "dead")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] *= 1e-30
    weights["model.norm.weight"] *= 0
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Diverged, match=r"the loss is 5\.\d+, which is ln\(vocabulary\)"):
        train(settings_for(base, tmp_path))


@pytest.mark.parametrize("lasts", [1, SPIKES_IN_A_ROW])
def test_a_spike_is_said_and_one_that_stays_ends_the_run(base, tmp_path, monkeypatch, capsys, lasts):
    spoilt = range(12, 12 + lasts)
    watch(monkeypatch, lambda step, s: RowSums(s.loss, s.nll * 1000) if step in spoilt else s)
    settings = settings_for(base, tmp_path, "epochs=8", "eval_every=100")
    if lasts == 1:
        train(settings)
    else:
        with pytest.raises(Diverged, match=r"step 22: loss .* is over 10 times the median of late.*10th step in a row"):
            train(settings)
    assert len(re.findall("step 13: loss .* is over 10 times the median of late", capsys.readouterr().err)) == 1


def test_a_tensor_that_no_gradient_reaches_is_named(base, tmp_path, monkeypatch):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    backward = Stepper._backward

    def cut(stepper, loss):
        backward(stepper, loss)
        stepper.parameters[name].grad = None

    monkeypatch.setattr(Stepper, "_backward", cut)
    with pytest.raises(Diverged, match=rf"step 3: 1 of 28 trained tensors .* in 3 updates, for example {name}"):
        train(settings_for(base, tmp_path))


def test_so_is_one_whose_updates_are_made_in_the_backward_pass(base, tmp_path, monkeypatch):
    name = "model.layers.1.mlp.up_proj.weight"
    had = Sentinels.had_gradient
    monkeypatch.setattr(Sentinels, "had_gradient", lambda self, its: None if its == name else had(self, its))
    with pytest.raises(Diverged, match=rf"1 of 21 trained tensors .* in 3 updates, for example {name}"):
        train(settings_for(base, tmp_path, "method=full", "optimizer_in_backward=true", "clip=null"))


def test_experts_may_wait_for_their_tokens(capsys):
    weights = {name: torch.nn.Parameter(torch.ones(3)) for name in ("mlp.experts.3.up_proj", "q_proj")}
    watcher = Sentinels(weights, 100)
    watcher.had_gradient("q_proj")
    for number in (1, 2, 3):
        watcher.judge(Step(number, 1.0, 1.0, 8.0, True), [])
    assert "1 trained tensors that only some tokens reach" in capsys.readouterr().err


def test_updates_that_are_lost_to_rounding_are_said(base, tmp_path, capsys):
    train(settings_for(base, tmp_path, "method=full", "lr=1e-12", "epochs=14", "eval_every=100"))
    err = capsys.readouterr().err
    assert re.search(r"0\.\d\d% of the trained weights have changed in 50 updates", err)


def test_what_is_remembered_survives_a_checkpoint():
    weights = {"w": torch.nn.Parameter(torch.ones(3))}
    one = Sentinels(weights, 100)
    one.unseen.clear()
    for number in range(1, 16):
        one.judge(Step(number, 1.0 if number < 12 else 50.0, 1.0, 8.0, True), [])
    other = Sentinels(weights, 100)
    other.load(one.state())
    other.unseen.clear()
    assert other.spikes == 4
    for number in range(16, 21):
        other.judge(Step(number, 50.0, 1.0, 8.0, True), [])
    with pytest.raises(Diverged, match="step 21: .* for the 10th step in a row"):
        other.judge(Step(21, 50.0, 1.0, 8.0, True), [])


def test_a_skipped_step_is_not_judged_and_a_step_without_targets_is_no_zero_loss():
    watcher = Sentinels({"w": torch.nn.Parameter(torch.ones(3))}, 100)
    watcher.unseen.clear()
    for number in range(1, 9):
        watcher.judge(Step(number, float("nan"), float("nan"), 8.0, False), [])
        watcher.judge(Step(number, 0.0, 0.0, 0.0, True), [])
    assert watcher.updates == 8
