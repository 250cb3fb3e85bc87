"""A gated MLP as one operation gives the module's own numbers and gradients, and leaves other modules alone."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ON_TREES, make_model
from torch import nn

from graft.model.fused import linear
from graft.model.fused.lora import fuse_lora
from graft.model.fused.mlp import fuse_mlps

GATED = {"llama": 2, "gemma": 2, "gemma2-window-softcap": 2, "granite-logit-scale": 2}


def _with_lora(family: str, **more):
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **more)
    model = get_peft_model(make_model(ON_TREES[family]), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # PEFT begins with zero, which would hide most mistakes
    return model


def _run(model, autocast: bool = False):
    ids = torch.arange(80).reshape(2, 40) % 50
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits
        logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _same(theirs, ours, autocast: bool = False) -> None:
    within = 5e-2 if autocast else 1e-5
    (wanted, wanted_gradients), (found, gradients) = _run(theirs, autocast), _run(ours, autocast)
    assert (found - wanted).norm() <= within * wanted.norm()
    assert gradients.keys() == wanted_gradients.keys()
    assert any("gate_proj" in name for name in gradients)
    for name, gradient in gradients.items():
        assert gradient.dtype == wanted_gradients[name].dtype
        assert (gradient - wanted_gradients[name]).norm() <= within * wanted_gradients[name].norm(), name


@pytest.mark.parametrize("family", GATED)
def test_every_weight_gets_the_modules_own_gradient(family, monkeypatch):
    monkeypatch.setattr(linear, "PIECE_BYTES", 4 * 16 * 48)  # several pieces
    theirs = make_model(ON_TREES[family])
    ours = copy.deepcopy(theirs)
    assert fuse_mlps(ours) == GATED[family]
    _same(theirs, ours)


@pytest.mark.parametrize(("autocast", "merged"), [(False, True), (False, False), (True, False)])
def test_with_lora(autocast, merged, monkeypatch):
    """Many tokens at once take W + s B A as one weight; few, or 16 bits, take the low-rank part by itself."""
    if not merged:
        monkeypatch.setattr(linear.Weights, "for_tokens", lambda self, tokens: self)
    theirs = _with_lora("llama")
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    assert fuse_mlps(ours) == 2
    _same(theirs, ours, autocast)


def test_a_weight_with_its_update_is_used_for_many_tokens_only():
    layer = linear.Weights(torch.zeros(6, 8), None, torch.ones(2, 8), torch.ones(6, 2), 0.5)
    assert layer.for_tokens(7) is layer
    merged = layer.for_tokens(8)
    assert merged.down is None
    assert torch.equal(merged.weight, torch.ones(6, 8))
    assert layer.to(torch.bfloat16).for_tokens(8).down is not None


def test_biases_are_trained_too():
    torch.manual_seed(0)
    theirs = make_model(ON_TREES["llama"].__class__(**(ON_TREES["llama"].to_dict() | {"mlp_bias": True})))
    ours = copy.deepcopy(theirs)
    assert fuse_mlps(ours) == 2
    assert any("up_proj.bias" in name for name in _run(copy.deepcopy(ours))[1])
    _same(theirs, ours)


def test_dropout_in_the_adapter_is_drawn_as_before():
    theirs = _with_lora("llama", lora_dropout=0.3).train()
    ours = copy.deepcopy(theirs)
    fuse_lora(ours), fuse_mlps(ours)
    wanted, found = _run(theirs)[0], _run(ours)[0]
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_less_is_kept_for_the_backward_pass():
    """Two tensors as wide as the intermediate size instead of four."""

    def kept(model) -> int:
        seen: dict[int, int] = {}

        def pack(tensor):
            if tensor.shape[-1] == 48 and tensor.numel() >= 40 * 48:
                seen[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.arange(40)[None] % 50)
        return sum(seen.values())

    theirs = make_model(ON_TREES["llama"])
    ours = copy.deepcopy(theirs)
    fuse_mlps(ours)
    assert kept(ours) == 2 * 2 * 40 * 48 < kept(theirs)


def test_what_is_no_gated_mlp_is_left_alone():
    for family in ("gpt2", "gpt-neox", "phi3", "bloom"):
        assert fuse_mlps(make_model(ON_TREES[family])) == 0


def test_another_formula_under_the_same_names_keeps_its_own():
    model = make_model(ON_TREES["llama"])
    kind = type(model.model.layers[0].mlp)

    class Squared(kind):
        def forward(self, x):
            return super().forward(x).square()

    for layer in model.model.layers:
        layer.mlp.__class__ = Squared
    assert fuse_mlps(model) == 0


def test_the_checker_can_fail():
    theirs = make_model(ON_TREES["llama"])
    ours = copy.deepcopy(theirs)
    fuse_mlps(ours)
    with torch.no_grad():
        ours.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(AssertionError):
        _same(theirs, ours)
