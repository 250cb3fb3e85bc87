"""Settings that look at the whole model, at a whole step or at the memory: the same run on several processes as on one.

tests/test_ranks.py has those that do not.
"""

import math
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_ranks import assert_same_course, numbers, run_on, settings_for
from tiny import ON_TREES, make_model, make_model_folder
from together import together
from torch import nn
from transformers import MixtralConfig

from graft.config.train import Lora, Train
from graft.model.device import Precision
from graft.model.fused.compile import compile_layers
from graft.model.memory.machine import Rates
from graft.model.memory.remember import Mode, note_recipes, remember
from graft.model.processes.ranks import ranks_from_environment
from graft.model.processes.shard import mesh_of, shard
from graft.model.trees import TreeLM, fuse_modules
from graft.model.tuned.adapters import add_lora
from graft.runs import RunFolder, read_jsonl
from graft.train import computing, load, loop, step
from graft.train.costs import checkpointing, forecast, foresee_together
from graft.train.costs.checkpointing import activation_bytes_per_token
from graft.train.loop import train
from graft.train.step import Stepper
from graft.train.updates import in_backward

FP32 = Precision(torch.float32, torch.float32, torch.float32)
CPU = torch.device("cpu")
MODES: tuple[Mode, ...] = ("none", "selective", "full")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def test_selective_checkpointing_of_all_weights_is_that_of_one_process(base, tmp_path):
    settings = ("method=full", "checkpointing=selective")
    alone = train(settings_for(base, tmp_path, "alone", *settings))
    assert_same_course(alone, run_on(2, settings_for(base, tmp_path, "two", *settings)))


def kept_by_mode(method: str, spread: bool) -> list[float]:
    model = make_model(ON_TREES["qwen3"])
    if method == "lora":
        model = add_lora(model, Lora(r=4), seed=0)
    fuse_modules(model)
    if spread:
        ranks = ranks_from_environment()
        ranks.join(CPU)
        note_recipes(model)
        lm = TreeLM(model, fuse=False, enter=shard(model, mesh_of(ranks, CPU, ranks.size)))
    else:
        lm = TreeLM(model, fuse=False)
    found = []
    for mode in MODES:
        remember(model, mode, written=spread)
        found.append(activation_bytes_per_token(lm, FP32))
    return found


def kept_by_mode_of_a_spread_one(_rank: int, method: str) -> list[float]:
    return kept_by_mode(method, spread=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_spread_model_keeps_to_the_byte_what_a_whole_one_does(method):
    whole = kept_by_mode(method, spread=False)
    assert whole[0] > whole[1] > whole[2]
    assert together(2, kept_by_mode_of_a_spread_one, method) == [whole, whole]


def run_with_little_memory_in_the_last(rank: int, settings: Train, little: int) -> Mode:
    """What each process chose, where a token keeps 1,000 bytes with nothing computed again and 500 with recipes."""
    bytes_per_token, chosen = iter([1000.0, 500.0]), []
    choose = load.remember_what_fits

    def noted(*args: Any) -> Mode:
        chosen.append(choose(*args))
        return chosen[0]

    checkpointing.activation_bytes_per_token = lambda _lm, _precision: next(bytes_per_token)
    checkpointing.BYTES_PER_TRAINED = 0
    free = little * settings.row_budget / checkpointing.SHARE
    checkpointing.free_bytes = lambda _device: 2 * (free if rank else 1e12)
    load.remember_what_fits = noted
    train(settings)
    return chosen[0]


@pytest.mark.parametrize(("little", "wanted"), [(1001, "none"), (700, "selective"), (400, "full")])
def test_the_process_with_the_least_memory_decides_for_all(base, tmp_path, little, wanted):
    alone = train(settings_for(base, tmp_path, "alone"))
    settings = settings_for(base, tmp_path, "two", "checkpointing=auto")
    assert together(2, run_with_little_memory_in_the_last, settings, little) == [wanted, wanted]
    assert_same_course(alone, RunFolder(Path(str(settings.out))))


@pytest.mark.parametrize(
    ("optimizer", "within"),
    [("adamw_8bit", 1e-6), ("adafactor", 1e-6), ("galore", 1e-6), ("apollo", 1e-6), ("muon", 5e-5)],
)
def test_optimizers_that_look_at_whole_weights(base, tmp_path, optimizer, within):
    """Muon rounds to bf16 on its way, so that one process in rows of another length is as far off as several are."""
    settings = ["method=full", "lr=1e-3", f"optimizer={optimizer}"]
    if optimizer in ("galore", "apollo"):
        settings.append("optimizer_options={rank: 8, update_proj_gap: 2}")
    alone = train(settings_for(base, tmp_path, "alone", *settings))
    found = numbers(run_on(4, settings_for(base, tmp_path, "four", *settings, "shard_ranks=2")))
    np.testing.assert_allclose(found, numbers(alone), rtol=within)


@pytest.mark.parametrize("optimizer", ["muon", "adamw_8bit"])
def test_their_states_go_on_with_another_number_of_processes(base, tmp_path, optimizer):
    settings = ["lr=1e-3", f"optimizer={optimizer}", "save_every=2", "keep_last=99"]
    alone = train(settings_for(base, tmp_path, "alone", *settings))
    begun = RunFolder(tmp_path / "begun")
    for size, until in ((2, 2), (3, 4), (1, 99)):
        settings_of_leg = settings_for(base, tmp_path, "begun", *settings, "resume=auto")
        assert (run_on(size, settings_of_leg) if size > 1 else train(settings_of_leg)).final.is_dir()
        np.testing.assert_allclose(numbers(begun), numbers(alone), rtol=5e-5)
        shutil.rmtree(begun.final)
        for checkpoint in begun.checkpoints.iterdir():
            if int(checkpoint.name.removeprefix("step-")) > until:
                shutil.rmtree(checkpoint)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_balance_of_experts_is_that_of_all_processes(tmp_path, method):
    """Rows of 48 tokens, so that some processes have a row less than others; and a coefficient that is felt."""
    moe = make_model_folder(tmp_path / "moe", MixtralConfig, num_local_experts=4)
    settings = [f"method={method}", "router_aux_loss=0.5", "encode.max_length=48", "row_tokens=48", "batch_size=7"]
    alone = train(settings_for(moe, tmp_path, "alone", *settings))
    three = run_on(3, settings_for(moe, tmp_path, "three", *settings))
    assert_same_course(alone, three)
    counts = [Counter(row["rank"] for row in step["rows"]) for step in read_jsonl(three.trace)]
    assert any(len(set(its.values())) > 1 for its in counts), "no process had to compute a row for nothing"
    names = ("router_aux_loss", "expert_load_max")
    found, wanted = (
        [[row[name] for name in names] for row in run.read_metrics() if row["kind"] == "train"]
        for run in (three, alone)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    plain = train(settings_for(moe, tmp_path, "plain", *settings[:1], *settings[2:]))
    assert not np.allclose(numbers(plain), numbers(alone), rtol=1e-4), "the balance changes nothing here"


def train_compiled(rank: int, settings: Train, backend: str) -> int:
    """How many graphs were made."""
    from torch._dynamo.utils import counters

    computing.compile_layers = partial(compile_layers, backend=backend)
    torch._dynamo.reset()
    counters.clear()
    train(settings)
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("setting", "backend"),
    [
        ("method=full", "aot_eager"),
        ("checkpointing=full", "aot_eager"),
        pytest.param("method=full", "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_of_spread_weights(base, tmp_path, setting, backend):
    """Of two layers the first: the last one is left as it is (model/fused/compile.py)."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("NOT TESTED: no C++ compiler")
    alone, two = (settings_for(base, tmp_path, out, setting, "max_steps=3", "compile=true") for out in ("one", "two"))
    (wanted,) = together(1, train_compiled, alone, backend)
    graphs = together(2, train_compiled, two, backend)
    assert graphs[0] == graphs[1], graphs
    assert 0 < graphs[0] <= wanted, "weights that come and go are no other weights to the compiler"
    assert_same_course(*(RunFolder(Path(str(settings.out))) for settings in (alone, two)))


def train_counting_sums(_rank: int, settings: Train, few: float) -> tuple[list[int], list[int]]:
    """For each step how many rows were computed, and how often gradients were added up between processes."""
    rows, sums = [0], [0]
    step.FEW = few
    backward, update = Stepper._backward, Stepper.update
    scatter, reduce = torch.distributed.reduce_scatter_single, torch.distributed.all_reduce

    def counted_backward(self: Stepper, loss: torch.Tensor) -> None:
        rows[-1] += 1
        backward(self, loss)

    def counted_scatter(*args: Any, **more: Any) -> Any:
        sums[-1] += 1
        return scatter(*args, **more)

    def counted_reduce(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        sums[-1] += "group" in more and tensor.numel() > 100  # gradients, and not the norm's parts
        return reduce(tensor, *args, **more)

    def counted_update(self: Stepper, *args: Any) -> Any:
        made = update(self, *args)
        rows.append(0)
        sums.append(0)
        return made

    Stepper._backward, Stepper.update = counted_backward, counted_update
    torch.distributed.reduce_scatter_single, torch.distributed.all_reduce = counted_scatter, counted_reduce
    train(settings)
    return rows[:-1], sums[:-1]


@pytest.mark.parametrize(
    ("settings", "few", "times"),
    [
        (["method=lora"], 1.0, lambda rows: 2),  # two layers have adapters: each is added up once
        (["method=lora"], 0.0, lambda rows: 2 * rows),
        (["method=lora", "shard_ranks=1"], 1.0, lambda rows: 2),
        (["method=full", "shard_ranks=1"], 0.0, lambda rows: 3),  # two layers; and embedding, norm and head
        (["method=full", "shard_ranks=2"], 0.0, lambda rows: 3 * rows + 3),  # within a copy for each row
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_gradients_are_added_up_once_per_step(base, tmp_path, settings, few, times):
    size = 4 if "shard_ranks=2" in settings else 2
    common = ["encode.max_length=48", "row_tokens=48", f"batch_size={6 * size}", "max_steps=3"]
    alone = train(settings_for(base, tmp_path, "alone", *common, *[s for s in settings if "shard" not in s]))
    several = settings_for(base, tmp_path, "several", *common, *settings)
    found = together(size, train_counting_sums, several, few)
    assert_same_course(alone, RunFolder(Path(str(several.out))))
    assert all(its == found[0] for its in found), "idle rows count too"
    rows, sums = found[0]
    assert max(rows) >= 3
    assert sums == [times(count) for count in rows], (rows, sums)


def run_with_memory(rank: int, settings: Train, free: list[float]) -> int:
    """The row budget that this process trained with."""
    foresee_together.free_share = lambda _device, _ranks: free[rank]
    forecast.measure_rates = lambda *_: Rates(1e11, 1e11, 1e10, 1e-6)  # what does not decide takes time
    budgets = []
    make = loop.Fit.__init__

    def noted(self: Any, settings: Train, *args: Any) -> None:
        budgets.append(settings.row_tokens)
        make(self, settings, *args)

    loop.Fit.__init__ = noted
    train(settings)
    return budgets[0]


@pytest.mark.parametrize(("free", "small"), [([1e12, 1e12], False), ([1e12, 1e6], True)])
def test_the_row_budget_fits_into_the_least_memory(base, tmp_path, free, small):
    common = ["encode.max_length=128", "batch_size=31", "max_steps=2"]
    settings = settings_for(base, tmp_path, "two", *common).model_copy(update={"row_tokens": "auto"})
    first, last = together(2, run_with_memory, settings, free)
    assert first == last
    assert (first == forecast.SMALLEST_BUDGET) == small, first
    alone = train(settings_for(base, tmp_path, "alone", *common, "row_tokens=512"))
    assert_same_course(alone, RunFolder(Path(str(settings.out))))


def test_what_other_processes_hold_is_not_counted_here():
    """Three layers and what is in none are whole while they compute; of all else a process has its share."""
    parts = dict.fromkeys(foresee_together.SPREAD, 1000)
    layers = [nn.Linear(10, 10, bias=False) for _ in range(4)]  # 400 bytes each
    model = nn.ModuleList([*layers, nn.Linear(5, 5, bias=False)])
    hollow: Any = SimpleNamespace(lm=SimpleNamespace(model=model, base=None))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(foresee_together, "decoder_layers", lambda _base: ("", layers))
        for holders, wanted in ((4, 3750 - 1300), (2, 2500 - 1300), (1, 0)):
            assert foresee_together.bytes_elsewhere(parts, hollow, holders) == wanted


IN_BACKWARD = ("method=full", "clip=null", "optimizer_in_backward=true", "row_tokens=4096")


@pytest.mark.parametrize("also", [("optimizer=lion", "batch_size=1", "max_steps=12"), ("shard_ranks=2",)])
def test_updates_in_the_backward_pass(base, tmp_path, also):
    """With a conversation or two to a step, some processes have no row at all."""
    tuned = (*IN_BACKWARD, "lr=1e-3", *also)
    alone = train(settings_for(base, tmp_path, "alone", *[text for text in tuned if "shard" not in text]))
    assert_same_course(alone, run_on(4, settings_for(base, tmp_path, "four", *tuned)))


def train_with_a_bad_part(rank: int, settings: Train) -> str:
    """The gradient of one weight is not a number in the last process alone."""
    local, calls = in_backward.local, []

    def spoilt(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(gradient)
        return local(gradient) * (math.nan if rank == 1 and len(calls) == 5 else 1.0)

    in_backward.local = spoilt
    train(settings)
    return ""


def test_a_bad_gradient_in_one_process_ends_all(base, tmp_path):
    found = together(2, train_with_a_bad_part, settings_for(base, tmp_path, "two", *IN_BACKWARD), seconds=100)
    assert sum("is not finite, and optimizer_in_backward" in text for text in found) == 1, found
    assert sum(text.startswith("Elsewhere") for text in found) == 1, found


@pytest.mark.parametrize("also", [(), ("clip=null", "optimizer_in_backward=true", "row_tokens=4096")])
def test_bf16_weights_rounded_by_chance(base, tmp_path, also):
    """Draws are those of one process; gradients in bf16 are added in another order."""
    settings = ["method=full", "precision=bf16", "master_weights=stochastic", "lr=3e-3", *also]
    alone = train(settings_for(base, tmp_path, "alone", *settings))
    four = run_on(4, settings_for(base, tmp_path, "four", *settings, "shard_ranks=2", "save_every=3", "keep_last=9"))
    np.testing.assert_allclose(numbers(four)[1:-1], numbers(alone)[1:-1], rtol=2e-2)
    before = (four.final / "model.safetensors").read_bytes()
    shutil.rmtree(four.final)
    shutil.rmtree(four.checkpoints / "step-6")
    run_on(
        4,
        settings_for(base, tmp_path, "four", *settings, "shard_ranks=2", "save_every=3", "keep_last=9", "resume=true"),
    )
    assert (four.final / "model.safetensors").read_bytes() == before, "a resumed run rounds as the unbroken one"
