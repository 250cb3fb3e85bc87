"""Attention on token trees, behind the names that transformers' models look up. Knows tensors, not text.

Shapes: B = 1 row, H query heads, K key heads (H is a multiple of K), N nodes, n nodes of one run, A keys of its
ancestors, D head size.

A model is given `row=TreeRow(...)` as an extra keyword argument; transformers hands it on, unchanged, to the attention
function registered here. No mask tensor is ever built for a whole row by the `graft_segments` backend; the
`graft_dense` backend writes the N x N mask out and is the reference that tests compare with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from graft.tokens.tree import Segments, segments, targets, visible
from graft.types import Row

SEGMENTS = "graft_segments"
DENSE = "graft_dense"


class RowMissing(RuntimeError):
    """A model's attention was called without the row: the architecture does not hand extra arguments on."""


@dataclass(slots=True)
class TreeRow:
    """A Row on a device, with what the attention backends and the loss need of it."""

    row: Row
    ids: Tensor
    """[1, N] int64."""
    depth: Tensor
    """[1, N] int64, the position ids."""
    predictors: Tensor
    """[M] int64: parent of each target, the nodes whose hidden state is needed for the loss."""
    labels: Tensor
    """[M] int64: the token that each predictor must predict."""
    weights: Tensor
    """[M] float32."""
    segments: Segments
    windows: set[int] = field(default_factory=set)
    """Sliding windows that the attention function was asked for, in tokens."""
    calls: int = 0
    """How often the attention function was reached."""

    @classmethod
    def of(cls, row: Row, device: torch.device) -> TreeRow:
        """Move a row's arrays to a device."""
        nodes = targets(row)

        def tensor(array: Any) -> Tensor:
            return torch.as_tensor(array, device=device)

        return cls(
            row=row,
            ids=tensor(row.ids).long()[None],
            depth=tensor(row.depth).long()[None],
            predictors=tensor(row.parent[nodes]).long(),
            labels=tensor(row.ids[nodes]).long(),
            weights=tensor(row.weight[nodes]),
            segments=segments(row),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layer adds to plain scaled dot-product attention."""

    scaling: float | None = None
    """Factor on the scores; None is 1 / sqrt(D)."""
    window: int | None = None
    """A query sees keys less than this many depths above it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H] one extra score per head in the softmax's denominator (gpt-oss)."""
    slopes: Tensor | None = None
    """[H] ALiBi: slope * depth of the key is added to each score (Press et al. 2021, arXiv:2108.12409)."""
    dropout: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether the fused kernel computes it."""
        return self.softcap is None and self.sinks is None


def attend(
    query: Tensor, key: Tensor, value: Tensor, shape: Shape, causal: bool, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """[B, H, n, D] attention of queries [B, H, n, D] to keys and values [B, K, m, D].

    `mask` is [n, m], true where a key is seen; without one every key is, or with `causal` (n = m) those not later.
    `bias` is added to the scores, [H, 1 or n, m].
    """
    if causal and (bias is not None or not shape.plain):
        causal, mask = False, causal_mask(query.shape[2], key.shape[2], None, query.device)
    if bias is not None:
        mask = bias.to(query.dtype)[None] if mask is None else bias.to(query.dtype).masked_fill(~mask, -torch.inf)[None]
    if not shape.plain:
        return _attend_written_out(query, key, value, mask, shape)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        dropout_p=shape.dropout,
        scale=shape.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, shape: Shape) -> Tensor:
    """Attention with soft-capped scores or sinks, which no fused kernel of torch computes."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = shape.scaling if shape.scaling is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scaling
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if shape.sinks is not None:
        sinks = shape.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    shares = scores.float().softmax(dim=-1).to(query.dtype)
    if shape.sinks is not None:
        shares = shares[..., :-1]
    return F.dropout(shares, shape.dropout) @ value


def causal_mask(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """[n, m] for n queries at the end of a path of m keys: true where the key is not later and within the window."""
    depth_of_query = torch.arange(m - n, m, device=device)[:, None]
    depth_of_key = torch.arange(m, device=device)[None, :]
    seen = depth_of_key <= depth_of_query
    return seen if window is None else seen & (depth_of_query - depth_of_key < window)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """[1, H, N, D]: each unbranched run of nodes attends to its ancestors' keys and causally to its own.

    Splitting once and concatenating the pieces keeps the backward pass at the size of what was used; slicing N-long
    keys once per run would make autograd add N-long zeros as often.
    """
    cut = tree.segments
    queries, keys, values = (tensor.split(cut.sizes, dim=2) for tensor in (query, key, value))
    masks: dict[tuple[int, int], Tensor] = {}
    done: list[Tensor] = []
    for index, (size, offset) in enumerate(zip(cut.sizes, cut.offsets, strict=True)):
        path, first = _path_in_window(cut, index, shape.window)
        k = torch.cat([keys[run] for run in path], dim=2) if len(path) > 1 else keys[index]
        v = torch.cat([values[run] for run in path], dim=2) if len(path) > 1 else values[index]
        seen = k.shape[2]
        within = shape.window is None or seen <= shape.window
        causal = within and seen == size > 1
        mask = None
        if not causal and not (within and size == 1):  # a single query sees its whole path
            if (size, seen) not in masks:
                masks[size, seen] = causal_mask(size, seen, shape.window, query.device)
            mask = masks[size, seen]
        bias = None
        if shape.slopes is not None:
            depth_of_key = torch.arange(first, offset + size, device=query.device, dtype=torch.float32)
            bias = shape.slopes[:, None, None] * depth_of_key
        done.append(attend(queries[index], k, v, shape, causal, mask, bias))
    return torch.cat(done, dim=2)


def _path_in_window(cut: Segments, index: int, window: int | None) -> tuple[Sequence[int], int]:
    """The runs on the path that the window reaches, the run itself last, and the depth of the first of their nodes."""
    path, first = (*cut.ancestors[index], index), 0
    if window is not None:
        keep = 0
        while keep < len(path) - 1 and cut.offsets[path[keep + 1]] <= cut.offsets[index] - window + 1:
            keep += 1
        path, first = path[keep:], cut.offsets[path[keep]]
    return path, first


def dense_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """[1, H, N, D] with the N x N mask written out: the definition, for tests."""
    mask = torch.as_tensor(visible(tree.row), device=query.device)
    depth = tree.depth[0]
    if shape.window is not None:
        mask &= depth[:, None] - depth[None, :] < shape.window
    bias = None if shape.slopes is None else shape.slopes[:, None, None] * depth.float()
    return attend(query, key, value, shape, False, mask, bias)


BACKENDS = {SEGMENTS: segment_attention, DENSE: dense_attention}


def _for_transformers(backend: str) -> Any:
    compute = BACKENDS[backend]

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        row: TreeRow | None = None,
        **_others: Any,  # transformers hands on whatever the model was called with
    ) -> tuple[Tensor, None]:
        if row is None:
            raise RowMissing(f"{type(module).__name__} does not hand the row on to its attention")
        row.calls += 1
        if sliding_window is not None:
            row.windows.add(sliding_window)
        shape = Shape(scaling, sliding_window, softcap, s_aux, dropout=dropout)
        return compute(query, key, value, row, shape).transpose(1, 2).contiguous(), None

    return attention


_windows_of_masks: ContextVar[set[int] | None] = ContextVar("windows_of_masks", default=None)


@contextmanager
def watch_masks() -> Iterator[set[int]]:
    """Collect the window sizes of the masks that a model asks for.

    A model that expresses a sliding window only through its mask would lose it here, where no mask is built; comparing
    these sizes with those that reached the attention function shows it.
    """
    windows: set[int] = set()
    token = _windows_of_masks.set(windows)
    try:
        yield windows
    finally:
        _windows_of_masks.reset(token)


def _no_mask(*_args: Any, local_size: int | None = None, **_others: Any) -> None:
    windows = _windows_of_masks.get()
    if windows is not None and local_size is not None:
        windows.add(local_size)


for _name in BACKENDS:
    AttentionInterface.register(_name, _for_transformers(_name))
    AttentionMaskInterface.register(_name, _no_mask)
