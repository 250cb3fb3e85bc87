"""The chunked loss equals cross-entropy over full logits, in value and gradients."""

import pytest
import torch
from torch import nn

from graft.model import device as device_module
from graft.model.logit_shape import LogitShape, shape_logits
from graft.train import loss as loss_module
from graft.train.loss import PLAIN, Objective, linear_nll, logits_nll


def problem(predictors: int = 23, vocabulary: int = 50, bias: bool = False):
    torch.manual_seed(0)
    head = nn.Linear(16, vocabulary, bias=bias)
    hidden = torch.randn(predictors, 16, requires_grad=True)
    return head, hidden, torch.randint(0, vocabulary, (predictors,)), torch.rand(predictors)


@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(softcap=2.0), LogitShape(scale=0.3), LogitShape(3.0, 1.5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("smallest_mapping", [1, 2**22])
def test_chunks_equal_full_logits(monkeypatch, shape, bias, chunk, smallest_mapping):
    monkeypatch.setattr(device_module, "SMALLEST_MAPPING", smallest_mapping)
    monkeypatch.setattr(loss_module, "LARGE_LOGITS", smallest_mapping)
    head, hidden, labels, weights = problem(bias=bias)
    wanted = logits_nll(shape_logits(head(hidden), shape), labels, weights)
    (wanted.nll * 1.7).backward()
    gradients = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk * 50)
    found = linear_nll(hidden, head, shape, labels, weights)
    (found.nll * 1.7).backward()
    assert found.nll.item() == pytest.approx(wanted.nll.item(), rel=1e-6)
    assert float(found.correct) == pytest.approx(float(wanted.correct))
    for ours, theirs in zip([hidden.grad, *(p.grad for p in head.parameters())], gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_head_that_is_no_plain_linear_is_the_same():
    head, hidden, labels, weights = problem()
    plain = linear_nll(hidden, head, LogitShape(), labels, weights)
    wrapped = linear_nll(hidden, nn.Sequential(head), LogitShape(), labels, weights)
    assert plain.nll.item() == pytest.approx(wrapped.nll.item(), rel=1e-6)
    plain.nll.backward()
    gradient = hidden.grad.clone()
    hidden.grad = None
    wrapped.nll.backward()
    assert torch.allclose(hidden.grad, gradient, atol=1e-6)


def test_extreme_logits_do_not_overflow():
    head, hidden, labels, weights = problem()
    with torch.no_grad():
        head.weight.mul_(1e4)
    found = linear_nll(hidden, head, LogitShape(), labels, weights)
    assert torch.isfinite(found.nll)
    found.nll.backward()
    assert torch.isfinite(hidden.grad).all()


def test_no_predictors_is_zero():
    head, hidden, labels, weights = problem(predictors=0)
    found = linear_nll(hidden, head, LogitShape(), labels, weights)
    found.nll.backward()
    assert found.nll.item() == 0


def test_without_gradients_none_are_made():
    head, hidden, labels, weights = problem()
    with torch.no_grad():
        found = linear_nll(hidden, head, LogitShape(), labels, weights)
    assert not found.nll.requires_grad


OBJECTIVES = {"plain": PLAIN, "smooth": Objective(smoothing=0.2), "dft": Objective(dft=True)}


def by_autograd(logits, labels, weights, objective):
    """The formulas as they are written down, over full logits."""
    log_p = logits.log_softmax(-1)
    of_label = log_p.gather(1, labels[:, None])[:, 0]
    if objective.dft:
        return (weights * of_label.exp().detach() * -of_label).sum()
    return (weights * -((1 - objective.smoothing) * of_label + objective.smoothing * log_p.mean(-1))).sum()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [LogitShape(), LogitShape(3.0, 1.5)])
@pytest.mark.parametrize("way", ["chunks", "any head", "whole logits"])
def test_objectives_and_their_gradients_are_their_formulas(monkeypatch, name, shape, way):
    objective = OBJECTIVES[name]
    head, hidden, labels, weights = problem(bias=True)
    wanted = by_autograd(shape_logits(head(hidden), shape), labels, weights, objective)
    (wanted * 1.7).backward()
    gradients = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * 50)
    if way == "whole logits":
        found = logits_nll(shape_logits(head(hidden), shape), labels, weights, objective)
    else:
        used = head if way == "chunks" else nn.Sequential(head)
        found = linear_nll(hidden, used, shape, labels, weights, objective)
    (found.loss * 1.7).backward()
    assert found.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip([hidden.grad, *(p.grad for p in head.parameters())], gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    plain = by_autograd(shape_logits(head(hidden), shape), labels, weights, PLAIN)
    assert found.nll.item() == pytest.approx(plain.item(), rel=1e-6)
    assert found.nll.requires_grad == objective.plain
    assert objective.plain or abs(wanted.item() - plain.item()) > 0.1, "the formulas must differ"
