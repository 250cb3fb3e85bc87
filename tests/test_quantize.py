"""Quantised bases: the numbers that the libraries give by themselves, on trees, and gradients that reach all."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch
from peft import PeftModel
from test_exact import in_rows, one_by_one
from tiny import branching_examples, make_conversations, make_model_folder, write_rows
from torch import nn
from transformers import AutoModelForCausalLM

from graft.config.train import Lora, load_train
from graft.errors import ConfigError, InputError
from graft.model.files import quantize
from graft.model.files.load import load_base, load_merged, load_model
from graft.model.files.quantize import KINDS, check_quantize, quantization_config, refuse_stored
from graft.model.fused.lora_quantized import fuse_quantized_lora
from graft.model.memory.remember import kept_bytes
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_adapter, add_lora, count_weights
from graft.model.tuned.kinds import peft_config
from graft.train.loop import train

CPU = torch.device("cpu")
HERE = [
    pytest.param(kind, marks=pytest.mark.skipif(not importlib.util.find_spec(KINDS[kind].library), reason="[quant]"))
    for kind in ("nf4", "int8", "fp8")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama", hidden_size=64, intermediate_size=128)


def tuned(folder, kind: str, dropout: float = 0.0, **more) -> PeftModel:
    base = load_base(str(folder), torch.float32, quantize=kind)
    model = add_lora(base, Lora(r=4, dropout=dropout, **more), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def settings_for(folder, tmp_path, *more: str):
    data = write_rows(tmp_path / "data.jsonl", make_conversations(24))
    return load_train(
        None,
        [f"model={folder}", f"data={data}", f"out={tmp_path / 'run'}", "encode.max_length=128", "max_steps=3",
         "batch_size=8", "split.val=0.2", "lr=5e-3", *more],
    )  # fmt: skip


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", HERE)
def test_a_tree_over_a_quantised_base_is_that_base_one_by_one(folder, kind):
    examples = branching_examples()
    loss, gradients = one_by_one(tuned(folder, kind), examples)
    model = tuned(folder, kind)
    assert fuse_quantized_lora(model) == 14
    lm = TreeLM(model)
    assert lm.why_not is None
    found_loss, found, _ = in_rows(lm, examples, 40)
    # LLM.int8 rounds activations, and takes a column of them out where any token of the row has an outlier in it.
    of_loss, of_gradient = (1e-3, 5e-2) if kind == "int8" else (2e-6, 2e-5)
    assert found_loss == pytest.approx(loss, rel=of_loss)
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        assert relative(found[name], gradient) < of_gradient, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", HERE)
def test_a_fused_layer_over_a_quantised_one_is_pefts(folder, kind, dropout):
    results = []
    for fuse in (False, True):
        model = tuned(folder, kind, dropout)
        assert bool(fuse_quantized_lora(model)) if fuse else True
        model.train()
        torch.manual_seed(1)
        logits = model(torch.arange(3, 40)[None]).logits
        logits.square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (wanted, gradients), (found, ours) = results
    assert relative(found, wanted) < 1e-5
    assert ours.keys() == gradients.keys()
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        assert relative(ours[name], gradient) < (1e-3 if kind == "int8" else 1e-5), name


@pytest.mark.parametrize("kind", HERE)
def test_packed_weights_are_counted_as_what_they_stand_for(folder, kind):
    plain, packed = (load_base(str(folder), torch.float32, quantize=kind) for kind in ("none", kind))
    assert count_weights(packed) == count_weights(plain) == sum(p.numel() for p in plain.parameters())


def test_other_kinds_of_lora_keep_pefts_forward(folder):
    pytest.importorskip("bitsandbytes")
    assert fuse_quantized_lora(tuned(folder, "nf4", use_dora=True)) == 0
    assert fuse_quantized_lora(load_base(str(folder), torch.float32)) == 0


@pytest.mark.parametrize("kind", HERE)
def test_an_evaluation_before_the_first_step_leaves_the_gradients_alone(folder, kind):
    """bitsandbytes repacks 4-bit weights in eval mode on some CPUs, for a product that has no gradient."""
    gradients = []
    for evaluate in (False, True):
        model = tuned(folder, kind)
        if evaluate:
            model.eval()
            with torch.no_grad():
                model(torch.arange(3, 40)[None])
        model.train()
        model(torch.arange(3, 40)[None]).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert relative(gradients[1][name], gradient) < 1e-3, name


@pytest.mark.parametrize("kind", HERE)
def test_a_run_learns_and_its_adapter_loads_elsewhere_with_equal_logits(folder, tmp_path, kind):
    run = train(settings_for(folder, tmp_path, f"quantize={kind}", "checkpointing=selective"))
    rows = run.read_metrics()
    validations = [row["loss"] for row in rows if row["kind"] == "val"]
    assert validations[-1] < validations[0]
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization_config(kind, torch.float32)
    )
    theirs = PeftModel.from_pretrained(base, run.final)
    theirs.train(kind == "nf4")  # in eval mode some CPUs compute bitsandbytes' 4-bit products in bf16
    with torch.no_grad():
        theirs = theirs(ids).logits
        ours = load_model(run.final, "cpu", "fp32", base=str(folder), quantize=kind).model(ids).logits
        bare = load_model(run.final, "cpu", "fp32", base=str(folder)).model(ids).logits
    assert torch.equal(ours, theirs)
    assert relative(bare, theirs) > 1e-3, "the base was quantised"


@pytest.mark.parametrize("kind", HERE[:1])
def test_merging_goes_onto_the_unquantised_base(folder, tmp_path, kind):
    run = train(settings_for(folder, tmp_path, f"quantize={kind}"))
    ids = torch.arange(3, 40)[None]
    merged = load_merged(str(folder), run.final, torch.float32)
    assert not merged.config.to_dict().get("quantization_config")
    with torch.no_grad():
        wanted = load_model(run.final, "cpu", "fp32", base=str(folder)).model(ids).logits
        assert relative(merged.eval()(ids).logits, wanted) < 1e-5


@pytest.mark.parametrize("kind", HERE)
def test_the_library_gives_right_numbers_here_and_wrong_ones_are_refused(kind, monkeypatch):
    check_quantize(kind, CPU, torch.float32)
    check_quantize(kind, CPU, torch.bfloat16)
    monkeypatch.setattr(quantize, "error_of_a_product", lambda *given: float("nan"))
    with pytest.raises(ConfigError, match="computes wrong numbers on cpu"):
        check_quantize(kind, CPU, torch.float32)


def test_a_missing_library_is_named_with_the_command_that_installs_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"nf4 needs bitsandbytes .*pip install 'graft-llm\[quant\]'"):
        train(settings_for(folder, tmp_path, "quantize=nf4"))
    assert not (tmp_path / "run").exists()


def test_what_a_device_cannot_do_is_refused_with_what_it_can():
    with pytest.raises(ConfigError, match=r"fp8 runs on cpu and cuda, not on xpu; use quantize=nf4 or int8 there"):
        check_quantize("fp8", torch.device("xpu"), torch.float32)
    with pytest.raises(ConfigError, match=r"nf4 runs on cpu and cuda and xpu, not on mps; use quantize=none there"):
        check_quantize("nf4", torch.device("mps"), torch.float32)


@pytest.mark.parametrize("kind", HERE)
def test_trained_biases_of_quantised_layers_get_their_gradient(tmp_path, kind):
    folder = make_model_folder(tmp_path / "model", hidden_size=64, intermediate_size=128, attention_bias=True)
    settings = settings_for(
        folder, tmp_path, "method=peft", "peft.type=lora", "peft.bias=all", "peft.target_modules=all-linear"
    )
    found = []
    for fuse in (False, True):
        model = add_adapter(load_base(str(folder), torch.float32, quantize=kind), peft_config(settings), 0)
        if fuse:
            assert fuse_quantized_lora(model) == 6  # those without a bias
        model.train()(torch.arange(3, 40)[None]).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if name.endswith("bias")})
    assert len(found[0]) == 8
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert relative(found[1][name], gradient) < (1e-2 if kind == "int8" else 1e-5), name


@pytest.mark.parametrize(("kind", "fuse"), [*((kind, True) for kind in KINDS), ("fp8", False)])
def test_what_came_out_of_packed_weights_is_not_kept_for_the_gradient(tmp_path, kind, fuse):
    """torchao's own product would keep each weight in fp32: more than the base takes without quantising it."""
    folder = make_model_folder(tmp_path / "model", hidden_size=256, intermediate_size=512)
    pytest.importorskip(KINDS[kind].library)
    kept = []
    for form in ("none", kind):
        model = tuned(folder, form)
        if fuse:
            assert fuse_quantized_lora(model) == (14 if form == kind else 0)
        ids = torch.arange(3, 11)[None]
        kept.append(kept_bytes(lambda model=model, ids=ids: model.train()(ids).logits))
    linear = sum(m.weight.numel() for m in load_base(str(folder), torch.float32).modules() if isinstance(m, nn.Linear))
    assert kept[1] < kept[0] + linear  # a quarter of the weights in fp32


@pytest.mark.parametrize("kind", HERE)
def test_a_quantised_layer_cannot_be_saved_whole(folder, kind):
    with pytest.raises(ConfigError, match=r"modules_to_save: .*q_proj \(weight\) is quantised.*leave it out"):
        tuned(folder, kind, modules_to_save=["q_proj"])


def test_dora_over_int8_is_refused_before_anything_is_read(folder, tmp_path):
    of_peft = ("method=peft", "peft.type=lora", "peft.use_dora=true", "peft.target_modules=all-linear")
    for options in (("lora.use_dora=true",), of_peft):
        with pytest.raises(ConfigError, match="use quantize=nf4 or fp8"):
            train(settings_for(folder, tmp_path, "quantize=int8", *options))


def test_full_fine_tuning_of_frozen_weights_is_a_contradiction(folder, tmp_path):
    with pytest.raises(ConfigError, match="method: full trains them"):
        settings_for(folder, tmp_path, "quantize=nf4", "method=full")


# Bases that are stored quantised --------------------------------------------------------------------------------------


def stored(tmp_path, **quantization):
    folder = tmp_path / "stored"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "mxfp4"}, "stored as mxfp4"),
        ({"quant_method": "gptq", "bits": 4}, "stored as gptq, which cannot be used here"),
        ({"quant_method": "awq", "bits": 4}, "stored as awq, which cannot be used here"),
        ({"quant_method": "compressed-tensors"}, "stored as compressed-tensors, which cannot be used here"),
        ({"quant_method": "sometype"}, "stored as sometype, which cannot be used here"),
    ],
)
def test_a_stored_format_that_cannot_be_trained_through_is_named(tmp_path, config, said):
    with pytest.raises(InputError, match=said):
        refuse_stored(stored(tmp_path, **config), "lora", "none")


def test_a_stored_format_and_full_or_a_second_quantisation_is_refused(tmp_path):
    path = stored(tmp_path, quant_method="bitsandbytes", load_in_4bit=True)
    with pytest.raises(InputError, match="method=full needs unquantised weights"):
        refuse_stored(path, "full", "none")
    with pytest.raises(InputError, match="stored as bitsandbytes already"):
        refuse_stored(path, "lora", "nf4")


def test_a_base_stored_in_nf4_is_trained_as_it_is(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    small = tmp_path / "small"
    load_base(str(folder), torch.float32, quantize="nf4").save_pretrained(small)
    for file in folder.glob("*token*"):
        (small / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("chat_template*"):
        (small / file.name).write_bytes(file.read_bytes())
    run = train(settings_for(small, tmp_path))
    assert (run.final / "adapter_model.safetensors").is_file()
    losses = [row["loss"] for row in run.read_metrics() if row["kind"] == "val"]
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
def test_on_a_gpu_every_kind_has_right_numbers(kind):
    check_quantize(kind, torch.device("cuda"), torch.bfloat16)


def test_an_adapter_that_changes_the_base_needs_one_that_can_be_changed(folder, tmp_path):
    with pytest.raises(ConfigError, match="init_lora_weights: pissa, which subtracts"):
        train(settings_for(folder, tmp_path, "quantize=nf4", "lora.init_lora_weights=pissa"))
