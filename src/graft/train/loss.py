"""The loss: a weighted sum over predictors, without a full logits tensor.

Shapes: M predictors (nodes whose hidden state predicts a target), d hidden size, V vocabulary, C predictors of a chunk.
Sums are returned; dividing by the sum of the weights of the whole optimizer step is done by the caller, once, so that
rows, accumulation and ranks do not change the result.

What is trained on is an `Objective` of the logits z at each predictor with label y and p = softmax(z):

    nll              -log p[y]                                          gradient  p - onehot(y)
    label smoothing  (1 - s) * -log p[y] + s * mean over v of -log p[v]           p - (1 - s) * onehot(y) - s / V
    dft              detached p[y] * -log p[y]                                    p[y] * (p - onehot(y))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, noop_context_fn

from graft.model.attention.segments import TreeRow
from graft.model.device import scratch
from graft.model.fused.product import times, times_transposed
from graft.model.logit_shape import LogitShape, shape_logits
from graft.model.memory.count import HEAD, part
from graft.model.trees import TreeLM

CHUNK_ELEMENTS = 2**24
"""Largest logits chunk, in elements: 64 MiB in fp32."""
LARGE_LOGITS = 2**25
"""Bytes of a chunk of logits that gets a place of its own in memory."""
CACHED_ROWS = 160
"""Predictors of a chunk on the CPU where the head is frozen: seven passes over the logits then stay in the cache."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised; the plain negative log-likelihood unless told otherwise."""

    smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary (Szegedy et al. 2015, arXiv:1512.00567)."""
    dft: bool = False
    """Weigh each target by its own probability, taken as a constant (Wu et al. 2025, arXiv:2508.05629)."""

    @property
    def plain(self) -> bool:
        """Whether it is the negative log-likelihood itself."""
        return not self.smoothing and not self.dft


PLAIN = Objective()


class Summed(NamedTuple):
    """What a row, a step or a set adds up to."""

    loss: Tensor
    """Scalar: sum of weight * objective. Differentiable where gradients are wanted."""
    nll: Tensor
    """Scalar: sum of weight * nll; `loss` itself where the objective is plain, else without gradient."""
    correct: Tensor
    """Scalar: sum of the weights of targets that have the largest logit."""


def row_loss(lm: TreeLM, tree: TreeRow, objective: Objective = PLAIN) -> Summed:
    """Summed loss of one row, or of this process's predictors in it; zero where there are none."""
    summed: Summed = lm.enter(lambda: _row_loss(lm, lm.dealt(tree), objective))
    return summed


def _row_loss(lm: TreeLM, tree: TreeRow, objective: Objective) -> Summed:
    if lm.logit_shape is None:
        return logits_nll(lm.logits(tree), tree.labels, tree.weights, objective)
    states = lm.states(tree)
    with part(HEAD):
        return linear_nll(states, lm.head, lm.logit_shape, tree.labels, tree.weights, objective, lm.recompute)


def linear_nll(
    hidden: Tensor,
    head: nn.Module,
    shape: LogitShape,
    labels: Tensor,
    weights: Tensor,
    objective: Objective = PLAIN,
    recompute: Callable[[], tuple[Any, Any]] = noop_context_fn,
) -> Summed:
    """Summed loss of `head(hidden)` at M predictors.

    hidden [M, d], labels [M], weights [M] float32. A plain linear head computes its gradients in the forward pass (two
    matrix products per chunk and no logits kept); any other head, an adapter on it for example, is recomputed chunk by
    chunk, within the contexts of `recompute`.
    """
    if type(head) is nn.Linear:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if not torch.is_autocast_enabled(hidden.device.type):
            dtype = head.weight.dtype
        grads = torch.is_grad_enabled()
        loss, nll, correct = _LinearNLL.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, labels, weights, shape, dtype, grads, objective
        )
        return Summed(loss, loss if objective.plain else nll, correct)
    total, nll, correct = (hidden.new_zeros((), dtype=torch.float32) for _ in range(3))
    chunk = max(1, CHUNK_ELEMENTS // _vocabulary(head))
    for h, y, w in zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True):
        of_chunk = checkpoint(_module_nll, h, head, shape, y, w, objective, use_reentrant=False, context_fn=recompute)
        total, nll, correct = total + of_chunk[0], nll + of_chunk[1], correct + of_chunk[2]
    return Summed(total, total if objective.plain else nll, correct)


def logits_nll(logits: Tensor, labels: Tensor, weights: Tensor, objective: Objective = PLAIN) -> Summed:
    """Summed loss of logits [M, V] that a model computed itself."""
    nll = F.cross_entropy(logits.float(), labels, reduction="none")
    plain = (weights * nll).sum()
    correct = (weights * (logits.argmax(-1) == labels)).sum()
    if objective.plain:
        return Summed(plain, plain, correct)
    if objective.dft:
        wanted = (-nll.detach()).exp() * nll
    else:
        wanted = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=objective.smoothing)
    return Summed((weights * wanted).sum(), plain.detach(), correct)


def _module_nll(
    hidden: Tensor, head: nn.Module, shape: LogitShape, labels: Tensor, weights: Tensor, objective: Objective
) -> Any:
    logits = shape_logits(head(hidden).float(), shape)
    summed = logits_nll(logits, labels, weights, objective)
    return summed.loss, summed.nll.detach(), summed.correct.detach()


def _room(rows: int, vocabulary: int, like: Tensor) -> Tensor | None:
    """Room for large logits, which all chunks use in turn; None for small ones, which the faster product makes."""
    return scratch(rows, vocabulary, like) if 4 * rows * vocabulary >= LARGE_LOGITS else None


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor | None) -> Tensor:
    """[C, V] the head's product in fp32; written into `room` [at least C, V] where there is one."""
    if room is None:
        return times(hidden, weight, bias).float()
    out = room[: len(hidden)]
    if hidden.dtype != out.dtype:
        return out.copy_(F.linear(hidden, weight, bias))
    return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


def _vocabulary(head: nn.Module) -> int:
    sizes = [parameter.shape[0] for parameter in head.parameters() if parameter.dim() == 2]
    return max(sizes) if sizes else CHUNK_ELEMENTS


class _LinearNLL(torch.autograd.Function):
    """The objective's sum and sum(w * (logsumexp(z) - z[label])), z = shaped(hidden @ weight.T + bias), by chunks.

    d/dz is w times the objective's gradient (above), times the shape's own derivative. Logits are fp32 in each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        shape: LogitShape,
        dtype: torch.dtype,
        grads: bool,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants = [grads and needed for needed in ctx.needs_input_grad[:3]]
        product = weight.to(dtype)
        # fp32 until the caller's factor is known: in fp16 a small gradient would vanish before the scaler lifts it.
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if bias is not None and wants[2] else None
        exact = torch.float64 if hidden.device.type == "cpu" else torch.float32
        nll = torch.zeros((), dtype=exact, device=hidden.device)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        if hidden.device.type == "cpu" and grad_weight is None:  # its gradient would be passed over for each chunk
            chunk = min(chunk, CACHED_ROWS)
        room = _room(min(chunk, hidden.shape[0]), weight.shape[0], hidden)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, y, w = hidden[part].to(dtype), labels[part], weights[part]
            z = shape_logits(_product(h, product, None if bias is None else bias.to(dtype), room), shape)
            at_label = z.gather(1, y[:, None]).squeeze(1)
            largest, best = z.max(dim=1)
            correct += (w * (best == y)).sum()
            slope = None if shape.softcap is None else 1 - (z / shape.softcap) ** 2
            mean = z.mean(dim=1) if objective.smoothing else at_label
            z.sub_(largest[:, None]).exp_()
            norm = z.sum(dim=1)
            log_norm = norm.log() + largest
            of_target = log_norm - at_label
            nll += (w * of_target).sum()
            if objective.dft:
                w = w * (-of_target).exp()
            # The smoothed nll is logsumexp(z) minus a share of z[label] and a share of the mean of z.
            total += (w * torch.lerp(of_target, log_norm - mean, objective.smoothing)).sum()
            if not any(wants):
                continue
            z.mul_((w / norm)[:, None])
            if objective.smoothing:
                z.sub_((w * (objective.smoothing / z.shape[1]))[:, None])
            z[torch.arange(len(y), device=y.device), y] -= w * (1 - objective.smoothing)
            if slope is not None:
                z.mul_(slope)
            if shape.scale != 1.0:
                z.mul_(shape.scale)
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            z = z.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = times_transposed(z, product)
            if grad_weight is not None:
                grad_weight += (z.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        plain = nll.float()
        ctx.mark_non_differentiable(plain, correct)
        return total.float(), plain, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_nll: Tensor, _grad_correct: Tensor) -> Any:
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None, None)
