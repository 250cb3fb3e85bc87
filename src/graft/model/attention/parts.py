"""Attention of a row on a CPU in parts that copy nothing, put together by their log-sum-exps. Knows tensors, no rows.

A run of nodes attends causally to itself and wholly to each run above it. The nodes below a run stand side by side
right after it, so all of them attend to its keys in one call; keys and queries are slices, and no mask is needed. A
softmax over several sets of keys is the mean of those over each, weighted by their sums of exponentials; and given the
whole softmax's output and log-sum-exp, the kernel's gradient of each part is the part's share of the whole gradient
(Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135).

Shapes: H query heads, K key heads (H is a multiple of K), N nodes, n queries and m keys of a part, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.tokens.split_row import Held
from graft.tokens.tree import Segments

attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What torch's attention calls on a CPU, here for its second result, the log-sum-exp of each query's scores."""
attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

BLOCK = 72
"""Queries of a run that are computed at a time: torch's causal kernel computes all scores of up to 512 keys and drops
half of them; blocks see no key that is later than all of their queries. Fewer make the products too small."""


class Block(NamedTuple):
    """Neighbouring queries, and the keys of one run that the last of them sees."""

    queries: slice
    """Places among the queries that there are."""
    keys: slice
    """Nodes of the row."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Which queries attend to which keys."""

    runs: tuple[tuple[Block, ...], ...]
    """For each run, or what there is of it, its blocks of queries in order; they attend causally to its keys."""
    below: tuple[Block, ...]
    """Queries of the nodes below a run, which see all of its keys."""
    whole: bool
    """Whether the queries are those of all nodes, so that every key is attended to."""

    @classmethod
    def of(cls, cut: Segments, held: Sequence[Held] | None = None) -> Parts:
        """The parts of a row that is cut into runs; of a split row the queries are those of the nodes that are held."""
        ends = list(itertools.accumulate(cut.sizes))
        last = list(range(len(ends)))
        for index, ancestors in enumerate(cut.ancestors):
            for above in ancestors:
                last[above] = index
        pieces = held if held is not None else [Held(0, ends[-1], 0)]
        runs, below = [], []
        for start, stop, to in zip([0, *ends[:-1]], ends, (ends[index] for index in last), strict=True):
            blocks = [block for piece in pieces for block in _blocks(start, piece.part(start, stop))]
            if blocks:
                runs.append(tuple(blocks))
            for piece in pieces:
                under = piece.part(stop, to)
                if under is not None:
                    below.append(Block(slice(under.at, under.at + under.end - under.first), slice(start, stop)))
        return cls(tuple(runs), tuple(below), held is None)

    def mask(self, like: Tensor) -> Tensor:
        """[n, m] to be added to the scores of n queries at the end of m keys, for the largest n and m of all blocks.

        Any block's mask is its lower right corner.
        """
        blocks = [block for run in self.runs for block in run]
        most, longest = (max(map(_length, side)) for side in zip(*blocks, strict=True))
        later = torch.ones(most, longest, dtype=torch.bool, device=like.device).triu_(longest - most + 1)
        return torch.zeros(most, longest, dtype=like.dtype, device=like.device).masked_fill_(later, -torch.inf)


def block_size(run: int) -> int:
    """Queries of each block of a run of so many nodes, but perhaps the last."""
    return -(-run // max(1, round(run / BLOCK)))


def attention_in_parts(
    query: Tensor, key: Tensor, value: Tensor, parts: Parts, mask: Tensor, scaling: float | None
) -> Tensor:
    """[1, H, n, D] of queries [1, H, n, D], keys and values [1, K, N, D] in one number format; `mask` of `parts`."""
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
        for blocks in parts.runs:
            for queries, keys in blocks:
                rule = _rule(mask, queries, keys, scaling)
                found = attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], **rule)
                out[:, :, queries], sums[:, :, queries] = found
        for queries, keys in parts.below:
            found, total = attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], scale=scaling)
            before = sums[:, :, queries]
            out[:, :, queries].lerp_(found, (total - before).sigmoid_().to(found.dtype)[..., None])
            before.copy_(torch.logaddexp(before, total))
        ctx.save_for_backward(query, key, value, out, sums, mask)
        ctx.parts, ctx.scaling = parts, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, sums, mask = ctx.saved_tensors
        d_query, d_key, d_value = (_by_nodes(tensor) for tensor in (query, key, value))
        if not ctx.parts.whole:  # no query may see a key
            d_key.zero_(), d_value.zero_()

        def pull(queries: slice, keys: slice, is_causal: bool = False, **rule: Any) -> Any:
            g, q, o, s = (tensor[:, :, queries] for tensor in (grad, query, out, sums))
            return attend_backward(g, q, key[:, :, keys], value[:, :, keys], o, s, 0.0, is_causal, **rule)

        for blocks in ctx.parts.runs:
            # From the last on, which sees all keys that the others see and writes where they add.
            for queries, keys in reversed(blocks):
                dq, dk, dv = pull(queries, keys, **_rule(mask, queries, keys, ctx.scaling))
                d_query[:, :, queries] = dq
                if keys == blocks[-1].keys:
                    d_key[:, :, keys], d_value[:, :, keys] = dk, dv
                else:
                    d_key[:, :, keys] += dk
                    d_value[:, :, keys] += dv
        for queries, keys in ctx.parts.below:
            dq, dk, dv = pull(queries, keys, scale=ctx.scaling)
            d_query[:, :, queries] += dq
            d_key[:, :, keys] += dk
            d_value[:, :, keys] += dv
        return d_query, d_key, d_value, None, None, None


def _blocks(start: int, piece: Held | None) -> list[Block]:
    """The blocks of a piece of the run that begins at a node."""
    if piece is None:
        return []
    size = block_size(piece.end - piece.first)
    ends = [(first, min(piece.end, first + size)) for first in range(piece.first, piece.end, size)]
    moved = piece.at - piece.first
    return [Block(slice(first + moved, end + moved), slice(start, end)) for first, end in ends]


def _length(side: slice) -> int:
    size: int = side.stop - side.start
    return size


def _rule(mask: Tensor, queries: slice, keys: slice, scaling: float | None) -> dict[str, Any]:
    """How the kernel leaves out what is later, for queries at the end of some keys."""
    asked, seen = _length(queries), _length(keys)
    if asked == seen:
        return {"is_causal": asked > 1, "scale": scaling}
    return {"attn_mask": mask[None, None, -asked:, -seen:], "scale": scaling}


def _by_nodes(like: Tensor) -> Tensor:
    """[1, H, N, D] not filled, in memory as [1, N, H, D]: as the kernel writes it and layers read it."""
    heads_last = torch.empty_like(like.transpose(1, 2), memory_format=torch.contiguous_format)
    return heads_last.transpose(1, 2)
