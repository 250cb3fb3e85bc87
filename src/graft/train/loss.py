"""The loss: a weighted sum of negative log-likelihoods over predictors, without a full logits tensor.

Shapes: M predictors (nodes whose hidden state predicts a target), d hidden size, V vocabulary, C predictors of a chunk.
`sum(weight * nll)` is returned as a sum; dividing by the sum of the weights of the whole optimizer step is done by the
caller, once, so that rows, accumulation and ranks do not change the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from graft.model.attention import TreeRow
from graft.model.trees import LogitShape, TreeLM, shape_logits

CHUNK_ELEMENTS = 2**24
"""Largest logits chunk, in elements: 64 MiB in fp32."""
CACHED_ROWS = 160
"""Predictors of a chunk on the CPU where the head is frozen: seven passes over the logits then stay in the cache."""


@dataclass(frozen=True, slots=True)
class Summed:
    """What a row, a step or a set adds up to."""

    nll: Tensor
    """Scalar: sum of weight * nll. Differentiable where gradients are wanted."""
    correct: Tensor
    """Scalar: sum of the weights of targets that have the largest logit."""


def row_loss(lm: TreeLM, tree: TreeRow) -> Summed:
    """Summed loss of one row; zero for a row without targets."""
    if lm.logit_shape is None:
        return logits_nll(lm.logits(tree), tree.labels, tree.weights)
    return linear_nll(lm.states(tree), lm.head, lm.logit_shape, tree.labels, tree.weights)


def linear_nll(hidden: Tensor, head: nn.Module, shape: LogitShape, labels: Tensor, weights: Tensor) -> Summed:
    """Summed loss of `head(hidden)` at M predictors.

    hidden [M, d], labels [M], weights [M] float32. A plain linear head computes its gradients in the forward pass (two
    matrix products per chunk and no logits kept); any other head, an adapter on it for example, is recomputed chunk by
    chunk.
    """
    if type(head) is nn.Linear:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if not torch.is_autocast_enabled(hidden.device.type):
            dtype = head.weight.dtype
        grads = torch.is_grad_enabled()
        nll, correct = _LinearNLL.apply(hidden, head.weight, head.bias, labels, weights, shape, dtype, grads)  # type: ignore[no-untyped-call]
        return Summed(nll, correct)
    total = hidden.new_zeros((), dtype=torch.float32)
    correct = hidden.new_zeros((), dtype=torch.float32)
    chunk = max(1, CHUNK_ELEMENTS // _vocabulary(head))
    for h, y, w in zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True):
        nll, hits = checkpoint(_module_nll, h, head, shape, y, w, use_reentrant=False)
        total, correct = total + nll, correct + hits
    return Summed(total, correct)


def logits_nll(logits: Tensor, labels: Tensor, weights: Tensor) -> Summed:
    """Summed loss of logits [M, V] that a model computed itself."""
    nll = F.cross_entropy(logits.float(), labels, reduction="none")
    return Summed((weights * nll).sum(), (weights * (logits.argmax(-1) == labels)).sum())


def _module_nll(hidden: Tensor, head: nn.Module, shape: LogitShape, labels: Tensor, weights: Tensor) -> Any:
    logits = shape_logits(head(hidden).float(), shape)
    summed = logits_nll(logits, labels, weights)
    return summed.nll, summed.correct.detach()


def _vocabulary(head: nn.Module) -> int:
    sizes = [parameter.shape[0] for parameter in head.parameters() if parameter.dim() == 2]
    return max(sizes) if sizes else CHUNK_ELEMENTS


class _LinearNLL(torch.autograd.Function):
    """sum(w * (logsumexp(z) - z[label])) for z = shaped(hidden @ weight.T + bias), chunk by chunk.

    d/dz = w * (softmax(z) - onehot(label)), times the shape's own derivative. Logits are fp32 in each chunk.
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
    ) -> tuple[Tensor, Tensor]:
        wants = [grads and needed for needed in ctx.needs_input_grad[:3]]
        product = weight.to(dtype)
        # fp32 until the caller's factor is known: in fp16 a small gradient would vanish before the scaler lifts it.
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wants[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if bias is not None and wants[2] else None
        total = torch.zeros(
            (), dtype=torch.float64 if hidden.device.type == "cpu" else torch.float32, device=hidden.device
        )
        correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        if hidden.device.type == "cpu" and grad_weight is None:  # its gradient would be passed over for each chunk
            chunk = min(chunk, CACHED_ROWS)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, y, w = hidden[part].to(dtype), labels[part], weights[part]
            z = shape_logits(F.linear(h, product, None if bias is None else bias.to(dtype)).float(), shape)
            at_label = z.gather(1, y[:, None]).squeeze(1)
            largest, best = z.max(dim=1)
            correct += (w * (best == y)).sum()
            slope = None if shape.softcap is None else 1 - (z / shape.softcap) ** 2
            z.sub_(largest[:, None]).exp_()
            norm = z.sum(dim=1)
            total += (w * (norm.log() + largest - at_label)).sum()
            if not any(wants):
                continue
            z.mul_((w / norm)[:, None])
            z[torch.arange(len(y), device=y.device), y] -= w
            if slope is not None:
                z.mul_(slope)
            if shape.scale != 1.0:
                z.mul_(shape.scale)
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            z = z.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = z @ product
            if grad_weight is not None:
                grad_weight += (z.T @ h).float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.mark_non_differentiable(correct)
        return total.float(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _grad_correct: Tensor) -> Any:
        scaled = [
            None if saved is None else (saved * grad).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)
