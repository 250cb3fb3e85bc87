"""A run's cost is foreseen: counts without weights are those with weights, predicted memory is what is measured."""

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import ON_TREES, branching_examples, make_conversations, make_model, make_model_folder, write_rows
from tiny_runs import alone
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config
from typer.testing import CliRunner

from graft.cli.main import app
from graft.cli.plan import _worth_a_line, size_in_bytes
from graft.config.train import load_train
from graft.errors import ConfigError, OutOfMemory
from graft.model.attention.segments import TreeRow
from graft.model.device import pick_precision
from graft.model.files.load import load_base
from graft.model.files.quantize import KINDS
from graft.model.fused.linear import few_pieces
from graft.model.fused.lora_quantized import fuse_quantized_lora
from graft.model.memory.count import Counter
from graft.model.memory.machine import measure_rates
from graft.model.memory.remember import remember
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora, trainable
from graft.runs import RunFolder
from graft.tokens.tree import build_rows
from graft.train.costs import foresee as foresee_module
from graft.train.costs.cost import count_row, count_update
from graft.train.costs.forecast import Forecaster
from graft.train.costs.hollow import NotCountable, hollow
from graft.train.costs.rows import look_at_rows
from graft.train.load import load_for_training
from graft.train.loop import Fit, train
from graft.train.loss import row_loss
from graft.train.open_run import open_run
from graft.train.prepare import prepare
from graft.train.step import Stepper
from graft.train.updates.optim import make_optimizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr("graft.train.costs.forecast.measure_rates", partial(measure_rates, seconds=0.02))


FP32 = pick_precision("fp32", CPU)


def settings_for(model, *overrides: str):
    return load_train(None, [f"model={model}", "data=none.jsonl", *overrides])


def made(settings, new_tokens=()):
    return hollow(settings, FP32, CPU, new_tokens)


def count_with_weights(lm: TreeLM, row) -> int:
    """Most bytes alive in a row's forward and backward pass, by counting the real one."""
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    tree = TreeRow.of(row, CPU)
    counter = Counter().ignore(*lm.model.parameters(), *lm.model.buffers(), *(p.grad for p in parameters))
    with few_pieces(), counter:
        row_loss(lm, tree).loss.backward()
    return counter.counted.peak.total()


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2-window-softcap", "gpt2", "bloom"])
def test_a_model_without_weights_counts_as_one_with_weights(family, method, tmp_path):
    config = ON_TREES[family]
    make_model(config).save_pretrained(tmp_path)
    settings = settings_for(tmp_path, f"method={method}")
    (row,) = build_rows(branching_examples(), 256)
    model = make_model(config)
    lm = TreeLM(add_lora(model, settings.lora, 0) if method == "lora" else model.requires_grad_(True))
    lm.model.train()
    assert lm.on_trees
    real = count_with_weights(lm, row)
    assert real > 100_000
    found = made(settings)
    assert found.lm.on_trees
    counted = count_row(found, row)
    assert sum(counted.peak.values()) == pytest.approx(real, rel=0.02), (
        "two layers of two kinds: nothing to extrapolate"
    )


def test_layers_that_are_left_out_are_added_up(tmp_path):
    config = LlamaConfig(**(ON_TREES["llama"].to_dict() | {"num_hidden_layers": 7}))
    make_model(config).save_pretrained(tmp_path)
    settings = settings_for(tmp_path)
    (row,) = build_rows(branching_examples(), 256)
    lm = TreeLM(add_lora(make_model(config), settings.lora, 0))
    lm.model.train()
    found = made(settings)
    assert found.kinds.total() == 6
    assert sorted(found.kinds.values()) == [1, 5], "the first layer hands no gradient on"
    few = sum(count_row(made(settings_for(two_layers(config, tmp_path))), row).peak.values())
    real = count_with_weights(lm, row)
    assert real > 2 * few
    assert sum(count_row(found, row).peak.values()) == pytest.approx(real, rel=0.02)


def two_layers(config, tmp_path) -> Path:
    LlamaConfig(**(config.to_dict() | {"num_hidden_layers": 2})).save_pretrained(tmp_path / "two")
    return tmp_path / "two"


def test_checkpointing_is_counted(tmp_path):
    config = LlamaConfig(**(ON_TREES["llama"].to_dict() | {"num_hidden_layers": 8}))
    config.save_pretrained(tmp_path)
    (row,) = build_rows(branching_examples(), 256)
    kept, again = (count_row(made(settings_for(tmp_path, f"checkpointing={mode}")), row) for mode in ("none", "full"))
    assert sum(again.peak.values()) < 0.5 * sum(kept.peak.values())
    products = [sum(w.products for w in (*c.forward.values(), *c.backward.values())) for c in (kept, again)]
    assert 1.2 < products[1] / products[0] < 1.6, "the layers' forward pass runs twice"


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_recipes_in_the_place_of_activations_are_counted(family, tmp_path):
    config = ON_TREES[family]
    make_model(config).save_pretrained(tmp_path)
    (row,) = build_rows(branching_examples(), 256)
    lm = TreeLM(add_lora(make_model(config), settings_for(tmp_path).lora, 0))
    lm.model.train()
    remember(lm.model, "selective")
    counted = sum(count_row(made(settings_for(tmp_path, "checkpointing=selective")), row).peak.values())
    assert counted == pytest.approx(count_with_weights(lm, row), rel=0.02)
    assert counted < 0.95 * sum(count_row(made(settings_for(tmp_path)), row).peak.values())


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_a_quantised_base_is_counted_without_its_weights(kind, mode, tmp_path):
    pytest.importorskip(KINDS[kind].library)
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
    make_model(LlamaConfig(**(ON_TREES["llama"].to_dict() | sizes))).save_pretrained(tmp_path)
    settings = settings_for(tmp_path, f"quantize={kind}", f"checkpointing={mode}")
    (row,) = build_rows(branching_examples(), 256)
    model = add_lora(load_base(str(tmp_path), torch.float32, quantize=kind), settings.lora, 0)
    assert fuse_quantized_lora(model) == 4 * 7
    remember(model, mode)
    lm = TreeLM(model)
    lm.model.train()
    found = made(settings)
    assert sum(count_row(found, row).peak.values()) == pytest.approx(count_with_weights(lm, row), rel=0.02)
    frozen = [p for p in dict.fromkeys(model.parameters()) if not p.requires_grad]
    for weight in [p for p in frozen if type(p).__name__ in ("Params4bit", "Int8Params", "Float8Tensor")]:
        frozen = [p for p in frozen if p is not weight]
        if kind == "nf4":
            state = weight.quant_state
            frozen += [weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        else:
            frozen += [weight.qdata, weight.scale] if kind == "fp8" else [weight.data]
    frozen += [m.state.SCB for m in model.modules() if type(m).__name__ == "Linear8bitLt"]
    assert found.frozen_bytes == sum(t.numel() * t.element_size() for t in frozen)
    linear = [m for m in load_base(str(tmp_path), torch.float32).model.modules() if isinstance(m, nn.Linear)]
    assert found.mapped_bytes == 4 * sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("layers", [(0,), (2, 5)])
def test_layers_above_trained_ones_keep_what_their_gradient_needs(layers, tmp_path):
    config = LlamaConfig(**(ON_TREES["llama"].to_dict() | {"num_hidden_layers": 6}))
    make_model(config).save_pretrained(tmp_path)
    shown = "[" + ",".join(map(str, layers)) + "]"
    settings = settings_for(tmp_path, f"lora.layers_to_transform={shown}", "lora.target_modules=[q_proj, up_proj]")
    (row,) = build_rows(branching_examples(), 256)
    lm = TreeLM(add_lora(make_model(config), settings.lora, 0))
    lm.model.train()
    counted = sum(count_row(made(settings), row).peak.values())
    assert counted == pytest.approx(count_with_weights(lm, row), rel=0.05)


@pytest.mark.parametrize(
    "overrides",
    [["method=freeze", "freeze.layers=1", "freeze.patterns=[embed_tokens]"], ["method=full"],
     ["lora.init_lora_weights=pissa"], ["method=peft", "peft={type: IA3}"]],
)  # fmt: skip
def test_what_is_trained_is_what_the_run_trains(base, overrides, tmp_path):
    settings = run_settings(base, tmp_path, "new_tokens=[zxq]", *overrides)
    prepared = prepare(settings, RunFolder(tmp_path / "aside"))
    ready = load_for_training(settings, FP32, CPU, None, prepared)
    found = hollow(settings, FP32, CPU, list(prepared.renderer.new_tokens))
    shapes = {name: (p.shape, p.dtype) for name, p in found.trained.items()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in trainable(ready.lm.model).items()}
    everything = dict.fromkeys(ready.lm.model.parameters())
    assert found.frozen_bytes + found.trained_bytes == sum(p.numel() * p.element_size() for p in everything)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [("adamw", []), ("adamw", ["optimizer_in_backward=true", "clip=null"]), ("adamw", ["master_weights=stochastic"]),
     ("adafactor", []), ("muon", []), ("lion", []), ("schedule_free_adamw", ["schedule=constant"]), ("sgd", []),
     ("adamw_8bit", [])],
)  # fmt: skip
def test_states_of_optimizers_are_those_of_a_real_step(base, optimizer, options):
    settings = settings_for(base, "method=full", f"optimizer={optimizer}", *options)
    library = {"lion": "lion_pytorch", "schedule_free_adamw": "schedulefree", "adamw_8bit": "bitsandbytes"}
    if optimizer in library:
        pytest.importorskip(library[optimizer])
    precision = FP32 if "master_weights=stochastic" not in options else replace(FP32, trained=torch.bfloat16)
    counted = count_update(hollow(settings, precision, CPU), settings).states
    model = AutoModelForCausalLM.from_pretrained(base, dtype=precision.trained)
    tables = {id(table.weight) for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    real = make_optimizer(trainable(model), tables, settings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real.step()
    states = [item for state in real.state.values() for item in state.items()]
    tensors = {id(t): t for name, t in states if isinstance(t, torch.Tensor) and not name.startswith("qmap")}
    assert counted == pytest.approx(sum(t.numel() * t.element_size() for t in tensors.values()), rel=0.01)


@pytest.mark.parametrize(
    ("override", "reason"),
    [("compile=true", "compiler"), ("offload_activations=true", "transfers")],
)  # fmt: skip
def test_what_cannot_be_counted_is_said(base, override, reason):
    with pytest.raises(NotCountable, match=reason):
        made(settings_for(base, override))


@pytest.mark.parametrize(
    "overrides", [("quantize=nf4", "lora.use_dora=true"), ("method=peft", "peft.type=BOFT")], ids=["dora", "boft"]
)
def test_an_adapter_that_begins_with_numbers_is_not_said_to_be_impossible(base, overrides):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(NotCountable, match="without weights"):
        made(settings_for(base, *overrides))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_layers_that_are_computed_again_are_counted_where_they_are(method, tmp_path):
    config = LlamaConfig(**(ON_TREES["llama"].to_dict() | {"num_hidden_layers": 8}))
    make_model(config).save_pretrained(tmp_path)
    settings = settings_for(tmp_path, f"method={method}", "checkpointing=full", "checkpoint_every=3")
    (row,) = build_rows(branching_examples(), 256)
    model = make_model(config)
    model = add_lora(model, settings.lora, 0) if method == "lora" else model.requires_grad_(True)
    remember(model, "full", 3)
    lm = TreeLM(model)
    lm.model.train()
    assert sum(count_row(made(settings), row).peak.values()) == pytest.approx(count_with_weights(lm, row), rel=0.02)


def test_products_are_those_of_the_formula(tmp_path):
    config = ON_TREES["llama"]
    config.save_pretrained(tmp_path)
    (row,) = build_rows(branching_examples(), 256)
    forward = count_row(made(settings_for(tmp_path, "method=full")), row).forward
    others, keys_and_values = 32 * 32 * 2 + 3 * 32 * 48, 2 * 32 * 16  # queries, output and gated MLP
    asked = len(TreeRow.of(row, CPU).asked)
    assert asked < len(row), "the last layer is computed at the predictors only, but for its keys and values"
    assert forward["layers"].products == 2 * (2 * len(row) * keys_and_values + (len(row) + asked) * others)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def run_settings(base: Path, tmp_path: Path, *overrides: str):
    data = tmp_path / "data.jsonl"
    if not data.exists():
        write_rows(data, make_conversations())
    return load_train(
        None,
        [f"model={base}", f"data={data}", f"out={tmp_path / 'run'}", "batch_size=8", "max_steps=4", "split.val=0.2",
         "encode.max_length=128", *overrides],
    )  # fmt: skip


def forecaster(settings, tmp_path) -> Forecaster:
    return Forecaster(settings, prepare(settings, RunFolder(tmp_path / "aside")), CPU, FP32)


def test_rows_of_the_forecast_are_those_of_the_run(base, tmp_path):
    settings = run_settings(base, tmp_path, "trace=true", "row_tokens=200")
    prepared = prepare(settings, RunFolder(tmp_path / "aside"))
    rows = look_at_rows(prepared, 200, made(settings).lm)
    run = train(settings)
    traced = [row["nodes"] for line in run.trace.read_text().splitlines() for row in json.loads(line)["rows"]]
    steps = [row for row in run.read_metrics() if row["kind"] == "train"]
    assert rows.steps == len(steps) == 4
    assert rows.per_step * 4 == pytest.approx(len(traced))
    assert rows.size.nodes * 4 == pytest.approx(sum(traced))
    assert len(rows.heaviest[0]) == max(traced)
    assert rows.sharing > 1.05


def test_auto_takes_what_fits_and_the_run_keeps_it(base, tmp_path, monkeypatch):
    settings = run_settings(base, tmp_path, "row_tokens=auto", "batch_size=32")
    found = forecaster(settings, tmp_path)
    largest, roomy = found.choose_budget(1 << 40)
    smallest, tight = found.choose_budget(0)
    assert largest > smallest == 512
    assert roomy.beyond_process > tight.beyond_process
    between = (roomy.beyond_process + tight.beyond_process) // 2
    budget, forecast = found.choose_budget(int(between / 0.9))
    assert budget < largest
    assert forecast.beyond_process <= between
    monkeypatch.setattr(foresee_module, "free_bytes", lambda _device: 0)
    run = train(settings)
    assert load_train(run.config).row_tokens == 512
    monkeypatch.setattr(foresee_module, "free_bytes", lambda _device: 1 << 40)
    resumed, _ = open_run(settings.model_copy(update={"resume": True}))
    assert resumed.row_tokens == 512, "a resumed run computes the rows that it began with"


def test_automatic_checkpointing_is_forecast_as_the_first_mode_that_fits(base, tmp_path, monkeypatch):
    monkeypatch.setattr("graft.train.costs.forecast.resident", lambda: 1 << 28)
    settings = run_settings(base, tmp_path, "checkpointing=auto")
    prepared = prepare(settings, RunFolder(tmp_path / "aside"))

    def forecast(memory: int, mode: str = "auto"):
        wanted = settings.model_copy(update={"checkpointing": mode})
        return Forecaster(wanted, prepared, CPU, FP32, memory).forecast()

    sizes = {mode: forecast(1 << 40, mode) for mode in ("none", "selective", "full")}
    for mode, found in sizes.items():
        just_enough = (1 << 28) + int(found.beyond_process / 0.9) + 1024
        assert forecast(just_enough).checkpointing == mode, mode
    assert forecast(1 << 20).checkpointing == "full", "there is nothing behind it"
    assert forecast(1 << 40).peak == sizes["none"].peak


def test_a_quantised_base_is_proposed_where_not_everything_fits(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    base = make_model_folder(tmp_path / "model", **sizes)
    found = forecaster(run_settings(base, tmp_path), tmp_path)
    assert not any("quantize" in option.changes for option in found.options(1 << 40))
    options = found.options(0)
    least = {
        kind: min(o.forecast.parts["frozen weights"] for o in options if o.changes.get("quantize", "none") == kind)
        for kind in ("none", "int8", "nf4")
    }
    assert least["none"] > 2 * least["int8"] > 2 * least["nf4"]
    assert [o.forecast.seconds for o in options] == sorted(o.forecast.seconds for o in options)
    line = next(str(o) for o in options if "quantize" in o.changes)
    read = load_train(None, [f"model={base}", "data=none.jsonl", "encode.max_length=64", *line.split()])
    assert f"quantize={read.quantize}" in line
    pissa = forecaster(run_settings(base, tmp_path, "lora.init_lora_weights=pissa"), tmp_path)
    assert not any("quantize" in option.changes for option in pissa.options(0)), "the run would refuse it"
    dora = forecaster(run_settings(base, tmp_path, "lora.use_dora=true"), tmp_path)
    assert not any("quantize" in option.changes for option in dora.options(0)), "int8 is refused, nf4 not countable"


def test_a_quantised_base_has_a_line_only_where_it_gains():
    def option(seconds: float, peak: int, **changes: str):
        forecast = SimpleNamespace(seconds=seconds, peak=peak)
        return SimpleNamespace(changes=changes, forecast=forecast, fits=lambda memory: peak <= memory)

    slow, fast = option(3, 50), option(1, 90)
    big, small = option(2, 60, quantize="nf4"), option(4, 30, quantize="nf4")
    larger = option(5, 55, quantize="int8")
    options = [fast, big, slow, small, larger]
    assert _worth_a_line(options, 40) == [fast, slow, small], "the plain ones do not fit"
    assert _worth_a_line(options, 60) == [fast, big, slow], "faster than what fits of the plain ones"
    assert _worth_a_line(options, 55) == [fast, slow], "a plain one fits and is faster"
    assert _worth_a_line(options, 20) == [fast, slow, small], "nothing fits"


def test_the_peak_is_that_of_the_worst_moment(base, tmp_path):
    settings = run_settings(base, tmp_path, "method=full", "row_tokens=512")
    prepared = prepare(settings, RunFolder(tmp_path / "aside"))
    roomy, tight = (Forecaster(settings, prepared, CPU, FP32, memory).forecast() for memory in (1 << 40, 1 << 20))
    assert roomy.moments["steps"] == sum(roomy.parts.values())
    assert roomy.peak == max(roomy.moments.values())
    assert "rehearsing a save" in roomy.moments
    assert "rehearsing a save" not in tight.moments, "a second model must fit twice into what is free"
    # weights, and twice as much for AdamW's states; gradients are gone when a checkpoint is written
    assert roomy.moments["saving"] - roomy.parts["process"] == pytest.approx(
        3 * roomy.parts["trained weights"], rel=0.01
    )
    averaged = Forecaster(settings.model_copy(update={"ema": 0.9}), prepared, CPU, FP32).forecast()
    more = averaged.moments["saving"] - averaged.parts["process"] - 3 * roomy.parts["trained weights"]
    assert more == pytest.approx(2 * roomy.parts["trained weights"], rel=0.01), "the average, and the live weights"


def test_weights_of_another_format_are_read_from_a_file_that_counts_while_they_load(tmp_path):
    narrow = AutoModelForCausalLM.from_pretrained(make_model_folder(tmp_path / "fp32"), dtype=torch.bfloat16)
    folder = make_model_folder(tmp_path / "bf16")
    narrow.save_pretrained(folder)
    file = sum(p.numel() for p in narrow.parameters()) * 2
    loading = {}
    for name in ("fp32", "bf16"):
        (tmp_path / name / "run").mkdir()
        found = forecaster(run_settings(tmp_path / name, tmp_path / name / "run"), tmp_path).forecast()
        loading[name] = found.moments["loading"] - found.parts["process"]
    assert loading["bf16"] - loading["fp32"] == file


def test_a_rehearsal_changes_no_number(base, tmp_path, monkeypatch):
    computed = []
    own = Fit.rehearse
    monkeypatch.setattr("graft.train.loop.is_small", lambda *_: False)
    monkeypatch.setattr(Fit, "rehearse", lambda fit, stop: (computed.append(1), own(fit, stop))[1])
    with_it = train(run_settings(base, tmp_path, "lora.dropout=0.1"))
    monkeypatch.setattr(Fit, "rehearse", lambda fit, stop: None)
    without = train(run_settings(base, tmp_path, "lora.dropout=0.1", f"out={tmp_path / 'other'}"))
    assert computed == [1]

    def numbers(run):
        return [(r["step"], r["loss"], r.get("grad_norm")) for r in run.read_metrics()]

    assert numbers(with_it) == numbers(without)
    assert len(numbers(with_it)) > 4


def test_a_rehearsal_leaves_no_trace_and_can_be_stopped(base, tmp_path, monkeypatch):
    settings, run = open_run(run_settings(base, tmp_path, "optimizer=adamw"))
    fit = Fit(settings, run, prepare(settings, run), alone(settings, run))
    rows = []
    own = Stepper.accumulate
    monkeypatch.setattr(Stepper, "accumulate", lambda self, row, *args: (rows.append(row), own(self, row, *args))[1])
    stop = threading.Event()
    generator, training, scaler = torch.get_rng_state(), fit.lm.model.training, fit.stepper.scaler.state_dict()
    fit.rehearse(stop)
    assert rows
    assert torch.equal(torch.get_rng_state(), generator)
    assert fit.lm.model.training == training
    assert fit.stepper.scaler.state_dict() == scaler
    assert not fit.optimizer.state
    assert all(p.grad is None for p in fit.lm.model.parameters())
    rows.clear()
    stop.set()
    fit.rehearse(stop)
    assert not rows


def test_updates_within_the_backward_pass_are_not_rehearsed(base, tmp_path, monkeypatch):
    settings, run = open_run(run_settings(base, tmp_path, "method=full", "optimizer_in_backward=true", "clip=null"))
    fit = Fit(settings, run, prepare(settings, run), alone(settings, run))
    monkeypatch.setattr(Stepper, "accumulate", lambda *_: pytest.fail("weights would have changed"))
    fit.rehearse(threading.Event())


def test_automatic_rows_go_with_neither_automatic_checkpointing_nor_updates_in_the_backward_pass(base):
    with pytest.raises(ConfigError, match="row_tokens=auto"):
        settings_for(base, "row_tokens=auto", "checkpointing=auto")
    with pytest.raises(ConfigError, match="row_tokens=auto"):
        settings_for(base, "method=full", "row_tokens=auto", "optimizer_in_backward=true", "clip=null")


def test_running_out_of_memory_names_the_row_and_what_would_help(base, tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("graft.train.step.Stepper.accumulate", fail)
    with pytest.raises(OutOfMemory, match=r"heaviest row has \d+ nodes .*checkpointing=full \(saves") as caught:
        train(run_settings(base, tmp_path, "method=full", "row_tokens=512"))
    assert "method=lora" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8")],
)
def test_running_out_of_memory_on_the_cpu_is_known_by_its_words(base, tmp_path, monkeypatch, error):
    monkeypatch.setattr(foresee_module, "advice", lambda _: "Try less")
    settings = run_settings(base, tmp_path)
    prepared = prepare(settings, RunFolder(tmp_path / "aside"))
    with pytest.raises(OutOfMemory, match="Try less"), foresee_module.explained_out_of_memory(settings, prepared):
        raise error


def test_other_errors_are_not_taken_for_lack_of_memory(base, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("graft.train.step.Stepper.accumulate", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(run_settings(base, tmp_path))


def test_a_run_says_what_it_will_need_and_warns(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(foresee_module, "SMALL_WORK", 0)
    monkeypatch.setattr(foresee_module, "free_bytes", lambda _device: 1000)
    train(run_settings(base, tmp_path, "max_steps=1"))
    said = capsys.readouterr().err
    assert "foreseen: about" in said
    assert "B of memory at the most" in said
    assert "checkpointing=full (saves" in said


def test_a_model_that_cannot_be_counted_is_trained_all_the_same(base, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise NotCountable("it depends on numbers")

    monkeypatch.setattr("graft.train.costs.forecast.count_row", refuse)
    run = train(run_settings(base, tmp_path, "max_steps=1", "row_tokens=auto"))
    assert "not foreseen: it depends on numbers" in capsys.readouterr().err
    assert load_train(run.config).row_tokens == 4096


def test_the_command_prints_a_table_or_json(base, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", make_conversations())
    words = ["plan", f"model={base}", f"data={data}", "encode.max_length=128"]
    shown = CliRunner().invoke(app, [*words, "--memory", "64GiB"])
    assert shown.exit_code == 0, shown.output
    assert "optimizer states" in shown.output
    assert "row_tokens=512 checkpointing=none" in shown.output
    tight = CliRunner().invoke(app, [*words, "--memory", "1MiB"]).output
    assert "nothing fits: graft, torch and transformers alone take" in tight
    told = json.loads(CliRunner().invoke(app, [*words, "--json", "--memory", "1MiB"]).stdout)
    assert told["moments_bytes"]["steps"] == sum(told["bytes"].values())
    assert told["peak_bytes"] == max(told["moments_bytes"].values())
    assert not re.search(r" 0\.0+ [MG]iB", shown.output), "what is nothing is not listed"
    assert "moving average" not in shown.output
    assert told["memory_bytes"] == 2**20
    assert told["options"]
    assert not any(option["fits"] for option in told["options"])
    assert not (tmp_path / "runs").exists()


def test_sizes_are_read():
    assert size_in_bytes("16GiB") == size_in_bytes("16 gb") == size_in_bytes("16g") == 16 * 2**30
    assert size_in_bytes("1.5MiB") == 3 * 2**19
    with pytest.raises(ConfigError, match="16GiB"):
        size_in_bytes("much")


CHILD = """
import sys
import torch
from graft.config.train import load_train
from graft.train.loop import train
from graft.model.device import memory_gib
from graft.model.memory.machine import resident
base = resident()
train(load_train(None, sys.argv[1:]))
print(int(memory_gib(torch.device("cpu")) * 2**30) - base)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is measured the Linux way")
def test_the_peak_is_the_one_measured_in_a_process_of_its_own(tmp_path):
    shape = {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8}
    base = make_model_folder(tmp_path / "model", Qwen2Config, **shape)
    rows = [{"messages": [{"role": r, "content": f"{n} {r} says {n % 7} " * 20} for r in ("user", "assistant")]}
            for n in range(12)]  # fmt: skip
    data = write_rows(tmp_path / "data.jsonl", rows)
    words = [f"model={base}", f"data={data}", f"out={tmp_path / 'run'}", "split.val=0", "max_steps=2", "batch_size=6",
             "encode.max_length=1024", "row_tokens=2048"]  # fmt: skip
    found = forecaster(load_train(None, words), tmp_path).forecast()
    environment = os.environ | {"GRAFT_CACHE": str(tmp_path / "cache"), "THP_MEM_ALLOC_ENABLE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", CHILD, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert said.returncode == 0, said.stderr
    measured = int(said.stdout)
    assert found.beyond_process > 100 * 2**20
    assert found.beyond_process == pytest.approx(measured, rel=0.35)  # what is imported on the way counts too
