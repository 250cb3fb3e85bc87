"""The CPU's RMS norm gives the module's own numbers and gradients, and leaves other norms alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import ON_TREES, make_model
from torch import nn

from graft.model.fused.norm import fuse_norms, rms_norm


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 300, 512), (1, 3, 5, 16)])
def test_values_and_gradients_are_those_of_the_formula(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double().float(), torch.rand(shape[-1]) + 0.5
    results = []
    for compute in (
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w.double(),
    ):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = compute(a, w)
        (y.double() * torch.linspace(-1, 1, y.numel()).reshape(shape)).sum().backward()
        results.append((y.detach().double(), a.grad.double(), w.grad.double()))
    for ours, wanted in zip(*results, strict=True):
        assert (ours - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_view_that_is_not_contiguous_serves():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16).transpose(0, 1).requires_grad_()
    weight = torch.rand(16)
    assert not x.is_contiguous()
    grad = torch.randn(4, 3, 16).transpose(0, 1)
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-6), x, grad)[0]
    wanted = torch.autograd.grad(nn.functional.rms_norm(x, (16,), weight, 1e-6), x, grad)[0]
    assert torch.allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "mixtral-moe"])
def test_a_models_norms_are_replaced_without_a_difference(family):
    torch.manual_seed(0)
    model = make_model(ON_TREES[family])
    ours = copy.deepcopy(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    assert fuse_norms(ours) == norms > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    ids = torch.arange(20)[None]
    assert torch.allclose(ours(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)
    for each in (model, ours):
        each(input_ids=ids).logits.square().mean().backward()
    for (name, mine), (_, wanted) in zip(ours.named_parameters(), model.named_parameters(), strict=True):
        assert (mine.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm().clamp_min(1e-12), name


def test_a_norm_with_another_formula_keeps_its_own():
    """Gemma's scale is 1 + weight: the name is the same, the numbers are not."""
    model = make_model(ON_TREES["gemma"])
    assert any(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert fuse_norms(model) == 0


def test_in_16_bits_it_rounds_once():
    torch.manual_seed(0)
    model = make_model(ON_TREES["llama"]).to(torch.bfloat16)
    norm = copy.deepcopy(model.model.norm)
    exact = copy.deepcopy(norm).double()
    assert fuse_norms(model) == 5
    x = torch.randn(1, 50, 32, dtype=torch.bfloat16)
    wanted = nn.functional.rms_norm(x.double(), (32,), exact.weight, norm.variance_epsilon)
    ours, theirs = model.model.norm(x), norm(x)
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - wanted).norm() <= (theirs.double() - wanted).norm()
