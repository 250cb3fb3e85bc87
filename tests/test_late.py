"""Weights that arrive when their layer is spread: the model that is loaded at once, one layer's numbers at a time."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config
from test_ranks import assert_same_course, numbers, run_as, settings_for
from tiny import ON_TREES, make_model, make_model_folder
from together import together
from torch import nn
from transformers import AutoModelForCausalLM

from graft.config.train import Lora, Train
from graft.model.files.late import Late, reads_weights, stored_format
from graft.model.files.load import load_base
from graft.model.processes.shard import local
from graft.model.tuned.adapters import add_lora, decoder_layers, plain
from graft.model.tuned.kinds import lora_config
from graft.runs import RunFolder
from graft.train import load as loading
from graft.train.loop import train

CPU = torch.device("cpu")
MODELS = ["llama", "llama-tied", "qwen2", "gemma3-window", "gpt2", "bloom", "mixtral-moe", "gpt-oss-sinks"]


@pytest.fixture(scope="module")
def in_16_bits(tmp_path_factory) -> Path:
    folder = make_model_folder(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_32_bits(in_16_bits, tmp_path_factory) -> Path:
    """The same numbers."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    shutil.copytree(in_16_bits, folder)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    return folder


def assert_same_model(found: nn.Module, wanted: nn.Module) -> None:
    assert found.training == wanted.training
    assert {m.training for m in found.modules()} == {m.training for m in wanted.modules()}
    kinds = [{name: type(module) for name, module in model.named_modules()} for model in (found, wanted)]
    assert kinds[0] == kinds[1]
    for tensors in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, tensors)()) for model in (found, wanted))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_filled_model_is_the_one_that_is_loaded_at_once(tmp_path, name, quantize):
    if quantize != "none" and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("[quant]")
    make_model(ON_TREES[name]).to(torch.bfloat16).save_pretrained(tmp_path)
    assert stored_format(str(tmp_path)) == torch.bfloat16
    late = Late(CPU)
    found = late.load(str(tmp_path), torch.float32, False, quantize)
    if name == "gpt-oss-sinks" and quantize != "none":  # it wants some weights in fp32, which only transformers does
        assert found is None
        return
    assert found is not None
    large = [p for p in found.parameters() if p.dim() > 1]
    assert late.waiting == len(large) > 8
    assert all(p.untyped_storage().nbytes() == 4 and torch.isnan(p).all() for p in large)
    late.fill(found)
    assert late.waiting == 0
    wanted = load_base(str(tmp_path), torch.float32, quantize=quantize)
    assert_same_model(found, wanted)
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("begins", [True, False, "gaussian", "orthogonal"])
def test_an_adapter_on_a_model_without_numbers_is_that_on_the_whole(in_16_bits, begins):
    lora = Lora(r=4, init_lora_weights=begins)
    late = Late(CPU)
    base = late.load(str(in_16_bits), torch.float32, False, "none")
    found = add_lora(base, lora, seed=0)
    late.fill(found)
    assert_same_model(found, add_lora(load_base(str(in_16_bits), torch.float32), lora, seed=0))


def test_what_looks_at_the_base_is_known():
    for looks in ({"use_dora": True}, {"modules_to_save": ("lm_head",)}, {"trainable_token_indices": (1,)}):
        assert reads_weights(lora_config(Lora(**looks)))
    for begins in ("pissa", "pissa_niter_4", "olora", "eva", "corda"):
        assert reads_weights(lora_config(Lora(init_lora_weights=begins)))
    assert not reads_weights(lora_config(Lora()))
    assert reads_weights(IA3Config())


def test_what_gains_nothing_or_cannot_wait_is_loaded_at_once(in_16_bits, tmp_path):
    late = Late(CPU)
    assert late.load(str(in_16_bits), torch.bfloat16, False, "none") is None
    assert late.load(str(in_16_bits), torch.float32, False, "fp8") is None
    mixed = make_model(ON_TREES["llama"])
    mixed.lm_head.to(torch.bfloat16)
    mixed.save_pretrained(tmp_path)
    assert stored_format(str(tmp_path)) is None
    assert late.load(str(tmp_path), torch.float32, False, "none") is None
    assert stored_format(str(tmp_path / "nowhere")) is None
    assert late.waiting == 0


def run_and_watch(rank: int, settings: Train) -> tuple[bool, float]:
    """A run; whether its base came late, and the most bytes of weights at a time over what is allowed of them."""
    most = []
    spread = loading.shard

    def watched(model, mesh, compute, offload, fill):
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        layers = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in decoder_layers(plain(model))[1]]
        largest = max(*layers, whole - sum(layers))

        def measured(module):
            fill(module)
            now = sum(local(p).untyped_storage().nbytes() for p in model.parameters())
            most.append(now / (whole / mesh.size() + largest))

        return spread(model, mesh, compute, offload, measured)

    took = []
    load = Late.load
    Late.load = lambda *args: took.append(load(*args)) or took[-1]
    loading.shard = watched
    run_as(rank, settings)
    return any(model is not None for model in took), max(most)


@pytest.mark.parametrize(
    "changes",
    [
        ["method=lora"],
        ["method=full"],
        ["method=freeze", "freeze.layers=1"],
        ["method=lora", "tensor_ranks=2"],
        ["method=full", "tensor_ranks=2"],
    ],
    ids=" ".join,
)
def test_a_run_whose_weights_come_late_is_the_run_whose_weights_are_there(in_16_bits, in_32_bits, tmp_path, changes):
    changes = [*changes, "precision=fp32", "max_steps=4"]
    runs = []
    for base, late in ((in_16_bits, True), (in_32_bits, False)):
        settings = settings_for(base, tmp_path, f"late-{late}", *changes)
        found = together(2, run_and_watch, settings)
        assert [took for took, _ in found] == [late, late], found
        if late:
            assert max(most for _, most in found) < 1.05
        runs.append(RunFolder(Path(str(settings.out))))
    np.testing.assert_array_equal(numbers(runs[0]), numbers(runs[1]))
    if changes[0] == "method=lora":
        alone = train(settings_for(in_16_bits, tmp_path, "alone", *[text for text in changes if "tensor" not in text]))
        np.testing.assert_allclose(numbers(runs[0]), numbers(alone), rtol=1e-6)


@pytest.mark.parametrize("change", ["lora.init_lora_weights=pissa", "lora.use_dora=true"])
def test_a_run_whose_adapter_looks_at_the_base_is_one_process_run(in_16_bits, tmp_path, change):
    changes = [change, "precision=fp32", "max_steps=4"]
    settings = settings_for(in_16_bits, tmp_path, "two", *changes)
    found = together(2, run_and_watch, settings)
    assert [took for took, _ in found] == [False, False], found
    assert_same_course(train(settings_for(in_16_bits, tmp_path, "alone", *changes)), RunFolder(tmp_path / "two"))
