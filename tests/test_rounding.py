"""Weights in bf16 that lose no update in the mean, and fp16 with its scaler."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from test_train import assert_same_run, losses, settings_for
from tiny import make_model_folder
from torch import nn

from graft.config.train import load_train
from graft.errors import ConfigError, Interrupted
from graft.runs import RunFolder
from graft.train import loop
from graft.train.loop import train
from graft.train.saving.checkpoint import load_state, newest_checkpoint
from graft.train.step import Stepper
from graft.train.updates.rounding import RoundingAdamW, draws, round_by_chance

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def splitmix64(seed: int, place: int) -> int:
    """By its definition, in whole numbers of any size."""
    state = (seed + place * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def test_what_is_drawn_is_splitmix64_even_and_the_same_in_parts():
    seed = hash((7, 3, 11))
    whole = draws(seed, 0, 4001, CPU)
    wanted = [splitmix64(seed, n // 4) >> (16 * (n % 4)) & 0xFFFF for n in range(4001)]
    assert whole.tolist() == wanted
    cuts = [0, 1, 6, 6, 803, 4001]
    parts = [draws(seed, first, last - first, CPU) for first, last in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    many = torch.cat(
        [draws(hash((0, place, step)), 0, 50_000, CPU) for place in range(4) for step in range(5)]
    ).double()
    assert float(many.mean()) == pytest.approx(2**15 - 0.5, abs=4 * 2**16 / 12**0.5 / len(many) ** 0.5)
    pairs = torch.corrcoef(many.view(20, -1)).fill_diagonal_(0)
    assert float(pairs.abs().max()) < 5 / 50_000**0.5, "no two weights and no two steps draw alike"
    counts = torch.bincount((many.long() >> 8), minlength=256).double()
    assert float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) < 350, "chi-square of 255 degrees, far out"


def test_rounding_gives_a_neighbour_and_the_value_in_the_mean():
    for value in (1.001, -0.3337, 1e-30, 123456.7):
        drawn = round_by_chance(torch.full((20_000,), value), draws(0, 0, 20_000, CPU)).float()
        below = torch.tensor(value).view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)
        gap = abs(
            float((torch.tensor(value).view(torch.int32).bitwise_and(-(2**16)) + 2**16).view(torch.float32) - below)
        )
        assert set(drawn.unique().tolist()) == {float(below), float(below) + math.copysign(gap, value)}
        assert abs(float(drawn.double().mean()) - value) < 4 * gap / 2 / 20_000**0.5
    exact = torch.tensor([0.0, -0.0, 1.5, -2.0, 3.0e38, math.inf, -math.inf])
    assert torch.equal(round_by_chance(exact.bfloat16().float(), draws(0, 0, 7, CPU)), exact.bfloat16())
    assert bool(round_by_chance(torch.tensor([math.nan]), draws(0, 0, 1, CPU)).isnan())


def test_small_updates_add_up_as_in_fp32_where_nearest_rounding_loses_them_all():
    torch.manual_seed(0)

    def after(dtype: torch.dtype, kind: type[torch.optim.AdamW]) -> torch.Tensor:
        weight = nn.Parameter(torch.full((4096,), 1.0, dtype=dtype))
        optimizer = kind([weight], lr=1e-5, weight_decay=0.0)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return 1 - weight.detach().double()

    wanted = float(after(torch.float32, torch.optim.AdamW).mean())
    assert wanted == pytest.approx(1e-3, rel=1e-2)
    assert not after(torch.bfloat16, torch.optim.AdamW).any(), "each update rounds to nothing"
    assert float(after(torch.bfloat16, RoundingAdamW).mean()) == pytest.approx(wanted, rel=0.1)
    assert float(after(torch.float32, RoundingAdamW).mean()) == pytest.approx(wanted, rel=1e-3)


def test_a_run_with_bf16_weights_learns_as_with_fp32_ones_and_resumes_to_the_same_bits(base, tmp_path, monkeypatch):
    common = ("method=full", "precision=bf16", "lr=3e-3")
    fp32 = train(settings_for(base, tmp_path, *common, out="fp32"))
    whole = train(settings_for(base, tmp_path, *common, "master_weights=stochastic", out="whole"))
    last = [run.read_metrics()[-1]["loss"] for run in (fp32, whole)]
    assert last[1] == pytest.approx(last[0], rel=0.02)
    update = Stepper.update

    def stop_at_third(self, nlls, weight, step):
        if step == 4:
            raise Interrupted("here")
        return update(self, nlls, weight, step)

    monkeypatch.setattr(Stepper, "update", stop_at_third)
    with pytest.raises(Interrupted):
        train(settings_for(base, tmp_path, *common, "master_weights=stochastic", out="part"))
    monkeypatch.undo()
    part = train(settings_for(base, tmp_path, *common, "master_weights=stochastic", "resume=true", out="part"))
    assert_same_run(part, whole)


def test_bf16_weights_need_full_fine_tuning_in_bf16(base, tmp_path):
    with pytest.raises(ConfigError, match="method: full"):
        load_train(None, ["model=m", "data=d.jsonl", "master_weights=stochastic"])
    with pytest.raises(ConfigError, match="precision=bf16"):
        train(settings_for(base, tmp_path, "method=full", "precision=fp32", "master_weights=stochastic"))


def scales(run: RunFolder) -> float:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return float(load_state(checkpoint)[0].scaler["scale"])


def test_an_overflow_in_fp16_is_skipped_halves_the_scale_and_a_resumed_run_has_the_scale(base, tmp_path, monkeypatch):
    """fp16 cards have a scaler; the CPU has one too, so that its way can be walked here."""
    accumulate = Stepper.accumulate
    spoilt = []

    def overflow_once(self, row, number, weight):
        nll = accumulate(self, row, number, weight)
        if number[0] == 1:
            next(iter(self.parameters.values())).grad.fill_(math.inf)
            spoilt.append(number)
        return nll

    monkeypatch.setattr(Stepper, "accumulate", overflow_once)
    settings = settings_for(base, tmp_path, "precision=fp16", "save_every=1", out="whole")
    whole = train(settings)
    assert spoilt
    assert [row for row in whole.read_metrics() if row["kind"] == "train"][-1]["skipped"] == 1
    assert scales(whole) == 2.0**15, "it began at 2^16"
    finite = [loss for _, loss, _, _ in losses(whole)]
    assert finite[-1] < finite[0]
    seen = []
    restore = loop.Fit._restore

    def look(fit, checkpoint):
        restore(fit, checkpoint)
        seen.append(fit.stepper.scaler.get_scale())

    monkeypatch.setattr(loop.Fit, "_restore", look)
    update = Stepper.update

    def stop_at_fourth(self, nlls, weight, step):
        if step == 4 and not seen:
            raise Interrupted("here")
        return update(self, nlls, weight, step)

    monkeypatch.setattr(Stepper, "update", stop_at_fourth)
    other = settings.model_copy(update={"out": str(tmp_path / "part")})
    with pytest.raises(Interrupted):
        train(other)
    part = train(other.model_copy(update={"resume": True}))
    assert seen == [2.0**15]
    assert_same_run(part, whole)


def test_trained_weights_are_fp32_where_gradients_are_unscaled(base, tmp_path):
    """`Attempting to unscale FP16 gradients` comes from 16-bit weights under a scaler."""
    for method in ("lora", "full"):
        run = train(settings_for(base, tmp_path, f"method={method}", "precision=fp16", "max_steps=1", out=method))
        assert all(math.isfinite(loss) for _, loss, _, _ in losses(run))
