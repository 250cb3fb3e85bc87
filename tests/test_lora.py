"""The fused LoRA layer is PEFT's layer: same outputs, same gradients, same random numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from tiny import ON_TREES, make_model
from torch import nn

from graft.model.fused import lora, product
from graft.model.fused.lora import FusedLinear, fuse_lora, fuse_trained_linears
from graft.model.tuned.adapters import add_lora


def _pair(dropout: float = 0.0, dtype: torch.dtype = torch.float32, family: str = "qwen2", **more):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules="all-linear", **more)
    peft = get_peft_model(make_model(ON_TREES[family]).to(dtype), config)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # PEFT begins with zero, which would hide most mistakes
    ours = copy.deepcopy(peft)
    return peft, ours, fuse_lora(ours)


def _run(model, autocast: bool = False):
    ids = torch.arange(24).reshape(2, 12) % 50
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


@pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.3, False), (0.0, True), (0.3, True)])
def test_a_fused_layer_is_pefts(dropout, autocast):
    peft, ours, fused = _pair(dropout, torch.float32)
    assert fused == sum(isinstance(m, Linear) for m in peft.modules()) > 0
    peft.train(), ours.train()
    wanted, wanted_gradients = _run(peft, autocast)
    found, gradients = _run(ours, autocast)
    within = 5e-2 if autocast else 1e-5
    assert (found - wanted).norm() <= within * wanted.norm()
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == wanted_gradients[name].dtype
        assert (gradient - wanted_gradients[name]).norm() <= within * wanted_gradients[name].norm(), name


def test_base_weights_and_biases_can_be_trained_beside_the_adapter():
    peft, ours, _ = _pair()
    for model in (peft, ours):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("base_layer" in name or "lora" in name)
    wanted, found = _run(peft)[1], _run(ours)[1]
    assert any("base_layer.bias" in name for name in found)
    assert any("base_layer.weight" in name for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-8), name


def test_switching_off_and_merging_stay_pefts():
    peft, ours, _ = _pair()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        tuned = ours(input_ids=ids).logits
        with ours.disable_adapter(), peft.disable_adapter():
            base = ours(input_ids=ids).logits
            assert torch.equal(base, peft(input_ids=ids).logits)
        assert not torch.allclose(base, tuned, atol=1e-3)
        ours.merge_adapter()
        assert torch.allclose(ours(input_ids=ids).logits, tuned, atol=1e-4)
        merged = ours.merge_and_unload()
        assert not any(isinstance(module, Linear) for module in merged.modules())
        assert torch.allclose(merged(input_ids=ids).logits, tuned, atol=1e-4)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_keep_pefts_forward(more):
    _, ours, fused = _pair(**more)
    assert fused == 0
    assert not any(isinstance(module, FusedLinear) for module in ours.modules())


def test_a_16_bit_base_without_autocast_keeps_pefts_arithmetic():
    peft, ours, fused = _pair(dtype=torch.bfloat16)
    assert fused
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, peft(input_ids=ids).logits)


def test_an_unfused_model_is_left_alone():
    assert fuse_lora(make_model(ON_TREES["llama"])) == 0


def test_the_checker_can_fail():
    peft, ours, _ = _pair()
    module = next(m for m in ours.modules() if isinstance(m, FusedLinear))
    module.scaling["default"] *= 1.01
    wanted, found = _run(peft)[0], _run(ours)[0]
    assert not (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_training_uses_it():
    from graft.config.train import Lora
    from graft.model.trees import TreeLM

    model = add_lora(make_model(ON_TREES["llama"]), Lora(), seed=0)
    TreeLM(model)
    assert any(isinstance(module, FusedLinear) for module in model.modules())


@pytest.mark.parametrize("autocast", [False, True])
def test_trained_linear_layers_give_their_own_numbers(autocast, monkeypatch):
    monkeypatch.setattr(lora, "on_amd", lambda: True)
    monkeypatch.setattr(product, "FEWEST_ROWS", 8)  # the tiny model's products go the way of large ones
    monkeypatch.setattr(product, "on_amd", torch.backends.mkldnn.is_available)
    own = make_model(ON_TREES["qwen2"])
    assert any(name.endswith("q_proj.bias") for name, _ in own.named_parameters())
    ours = copy.deepcopy(own)
    assert fuse_trained_linears(ours) == sum(type(m) is nn.Linear for m in own.modules()) > 0
    assert fuse_trained_linears(ours) == 0, "twice is once"
    (wanted, wanted_gradients), (found, gradients) = _run(own, autocast), _run(ours, autocast)
    within = 5e-2 if autocast else 1e-5
    assert (found - wanted).norm() <= within * wanted.norm()
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).norm() <= within * wanted_gradients[name].norm(), name


def test_frozen_layers_keep_their_forward(monkeypatch):
    monkeypatch.setattr(lora, "on_amd", lambda: True)
    assert fuse_trained_linears(make_model(ON_TREES["qwen2"]).requires_grad_(False)) == 0
