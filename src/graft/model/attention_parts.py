"""Attention of a row on a CPU in parts that copy nothing, put together by their log-sum-exps. Knows tensors, no rows.

A run of nodes attends causally to itself and wholly to each run above it. The nodes below a run stand side by side
right after it, so all of them attend to its keys in one call; keys and queries are slices, and no mask is needed. A
softmax over several sets of keys is the mean of those over each, weighted by their sums of exponentials; and given the
whole softmax's output and log-sum-exp, the kernel's gradient of each part is the part's share of the whole gradient
(Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

Shapes: H query heads, K key heads (H is a multiple of K), N nodes, n queries and m keys of a part, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.tokens.tree import Segments

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What torch's attention calls on a CPU, here for its second result, the log-sum-exp of each query's scores."""
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BLOCK = 72
"""Queries of a run that are computed at a time: torch's causal kernel computes all scores of up to 512 keys and drops
half of them; blocks see no key that is later than all of their queries. Fewer make the products too small."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which queries attend to which keys; numbers are nodes."""

    runs: tuple[tuple[int, int], ...]
    """First node and end of each run, which attends causally to itself."""
    below: tuple[tuple[int, int, int], ...]
    """(first node of a run, its end, end of the nodes below it): those from its end on see all of its keys."""

    @classmethod
    def of(cls, cut: Segments) -> Parts:
        """The parts of a row that is cut into runs."""
        ends, end = [], 0
        for size in cut.sizes:
            ends.append(end := end + size)
        last = list(range(len(ends)))
        for index, ancestors in enumerate(cut.ancestors):
            for above in ancestors:
                last[above] = index
        runs = tuple(zip([0, *ends[:-1]], ends, strict=True))
        below = tuple((*runs[index], ends[to]) for index, to in enumerate(last) if to > index)
        return cls(runs, below)

    def mask(self, like: Tensor) -> Tensor:
        """[n, m] to be added to the scores of n queries at the end of m keys, for the largest n and m of all blocks.

        Any block's mask is its lower right corner.
        """
        longest = max(end - start for start, end in self.runs)
        most = max(block_size(end - start) for start, end in self.runs)
        later = torch.ones(most, longest, dtype=torch.bool, device=like.device).triu_(longest - most + 1)
        return torch.zeros(most, longest, dtype=like.dtype, device=like.device).masked_fill_(later, -torch.inf)


def block_size(run: int) -> int:
    """Queries of each block of a run of so many nodes, but perhaps the last."""
    return -(-run // max(1, round(run / BLOCK)))


def attention_in_parts(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, mask: Tensor, scaling: float | None
) -> Tensor:
    """[1, H, N, D] of queries [1, H, N, D], keys and values [1, K, N, D] in one number format; `mask` of `parts`."""
    out: Tensor = _InParts.apply(query, key, value, parts, mask, scaling)  # type: ignore[no-untyped-call]
    return out


class _InParts(torch.autograd.Function):
    """With a and b the log-sum-exps of two parts: out = out_a + sigmoid(b - a) (out_b - out_a)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Parts, mask: Tensor, scaling: float | None
    ) -> Tensor:
        out = _by_nodes(query)
        sums = torch.empty(1, query.shape[2], query.shape[1], dtype=torch.float32, device=query.device).transpose(1, 2)
        for start, stop in parts.runs:
            for first, end in _blocks(start, stop):
                rule = _rule(mask, first - start, end - start, scaling)
                found = attend(query[:, :, first:end], key[:, :, start:end], value[:, :, start:end], **rule)
                out[:, :, first:end], sums[:, :, first:end] = found
        for start, end, to in parts.below:
            found, total = attend(query[:, :, end:to], key[:, :, start:end], value[:, :, start:end], scale=scaling)
            before = sums[:, :, end:to]
            out[:, :, end:to].lerp_(found, (total - before).sigmoid_().to(found.dtype)[..., None])
            before.copy_(torch.logaddexp(before, total))
        ctx.save_for_backward(query, key, value, out, sums, mask)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, sums, mask = ctx.saved_tensors
        d_query, d_key, d_value = (_by_nodes(tensor) for tensor in (query, key, value))

        def pull(queries: slice, keys: slice, is_causal: bool = False, **rule: Any) -> Any:
            g, q, o, s = (tensor[:, :, queries] for tensor in (grad, query, out, sums))
            return attend_backward(g, q, key[:, :, keys], value[:, :, keys], o, s, 0.0, is_causal, **rule)

        for start, stop in ctx.parts.runs:
            # From the last on, which sees all keys of its run and writes where the others add.
            for first, end in reversed(_blocks(start, stop)):
                queries, keys = slice(first, end), slice(start, end)
                dq, dk, dv = pull(queries, keys, **_rule(mask, first - start, end - start, ctx.scaling))
                d_query[:, :, queries] = dq
                if end == stop:
                    d_key[:, :, keys], d_value[:, :, keys] = dk, dv
                else:
                    d_key[:, :, keys] += dk
                    d_value[:, :, keys] += dv
        for start, end, to in ctx.parts.below:
            queries, keys = slice(end, to), slice(start, end)
            dq, dk, dv = pull(queries, keys, scale=ctx.scaling)
            d_query[:, :, queries] += dq
            d_key[:, :, keys] += dk
            d_value[:, :, keys] += dv
        return d_query, d_key, d_value, None, None, None


def _blocks(start: int, stop: int) -> list[tuple[int, int]]:
    """First query and end of each block of a run."""
    size = block_size(stop - start)
    return [(first, min(stop, first + size)) for first in range(start, stop, size)]


def _rule(mask: Tensor, first: int, end: int, scaling: float | None) -> dict[str, Any]:
    """How the kernel leaves out what is later, for queries `first` to `end` of a run and its keys up to `end`."""
    if first == 0:
        return {"is_causal": end > 1, "scale": scaling}
    return {"attn_mask": mask[None, None, first - end :, -end:], "scale": scaling}


def _by_nodes(like: Tensor) -> Tensor:
    """[1, H, N, D] not filled, in memory as [1, N, H, D]: as the kernel writes it and layers read it."""
    heads_last = torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format)
    return heads_last.transpose(1, 2)
