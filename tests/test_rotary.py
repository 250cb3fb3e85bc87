"""The CPU's rotary positions give transformers' own numbers and gradients, and replace nothing else."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from tiny import ON_TREES, make_model
from transformers.models.llama import modeling_llama

from graft.model.fused import rotary
from graft.model.fused.rotary import fuse_rotary, rotate


@pytest.fixture
def restored():
    """transformers' modules as they were: the function is replaced for the whole process."""
    files = {name: file for name, file in sys.modules.items() if name.startswith("transformers.models.")}
    before = {name: vars(file).get(rotary.NAME) for name, file in files.items()}
    originals = {name: found.theirs if isinstance(found, rotary._Rotary) else found for name, found in before.items()}
    for name, function in originals.items():
        if function is not None:
            setattr(files[name], rotary.NAME, function)
    yield
    for name, function in before.items():
        if function is not None:
            setattr(files[name], rotary.NAME, function)


@pytest.mark.parametrize("piece", [1, 2**19])
def test_values_and_gradients_are_those_of_transformers(restored, monkeypatch, piece):
    monkeypatch.setattr(rotary, "PIECE_BYTES", piece)
    torch.manual_seed(0)
    q = torch.randn(1, 7, 4, 8).transpose(1, 2).requires_grad_()
    k = torch.randn(1, 7, 2, 8).transpose(1, 2).requires_grad_()
    cos, sin = torch.randn(1, 7, 8), torch.randn(1, 7, 8)  # halves that differ, as no model has them
    wanted = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)
    found = rotate(q, cos, sin), rotate(k, cos, sin)
    for x, ours, theirs in zip((q, k), found, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        grad = torch.randn_like(ours)
        mine, other = (torch.autograd.grad(y, x, grad)[0] for y in (ours, theirs))
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma", "mixtral-moe"])
def test_a_models_numbers_stay(restored, family):
    model = make_model(ON_TREES[family])
    ids = torch.arange(20)[None]
    wanted = model(input_ids=ids).logits
    wanted.square().mean().backward()
    ours = copy.deepcopy(model)
    ours.zero_grad()
    assert fuse_rotary(ours) == 1
    assert fuse_rotary(ours) == 0  # once is enough
    found = ours(input_ids=ids).logits
    found.square().mean().backward()
    assert torch.allclose(found, wanted, atol=1e-5)
    for (name, mine), (_, theirs) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm().clamp_min(1e-12), name


def test_neighbours_instead_of_halves_keep_their_own(restored):
    """Cohere turns each even feature with the odd one after it."""
    assert fuse_rotary(make_model(ON_TREES["cohere-logit-scale"])) == 0


def test_other_formats_and_partial_rotation_reach_the_old_function(restored):
    fuse_rotary(make_model(ON_TREES["llama"]))
    function = modeling_llama.apply_rotary_pos_emb
    assert isinstance(function, rotary._Rotary)
    q, k, cos, sin = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    wanted = function.theirs(q.double(), k.double(), cos.double(), sin.double())[0]
    assert torch.equal(function(q.double(), k.double(), cos.double(), sin.double())[0], wanted)
    assert torch.allclose(function(q, k, cos, sin)[0].double(), wanted, atol=1e-5)
    swapped = function(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)[0]
    assert torch.allclose(swapped.transpose(1, 2).double(), wanted, atol=1e-5)
