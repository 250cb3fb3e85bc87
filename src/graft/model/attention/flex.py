"""Attention on token trees by torch's FlexAttention, for accelerators. Knows tensors, not text.

A row's mask `j <= i < end[j]` is handed to the kernel twice: as a function of (i, j), and as a grid that says which
blocks of queries and keys have nothing to compute, which need no mask, and which need it. The grid follows from
block-wise extremes of `end` and `depth`; nothing of size N x N is ever made.

Shapes: H query heads, K key heads, N nodes, D head size, b nodes of a block, n blocks of queries, m = ceil(N / b) of
keys (n = m but for rows that are split over processes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from graft.model.attention.attend import Shape
from graft.model.attention.segments import TreeRow, register
from graft.model.device import send
from graft.model.fused.compile import MOST_VERSIONS, keep_compiled
from graft.types import Row

FLEX = "graft_flex"
BLOCK = 128
"""Nodes of a block: what the kernels of FlexAttention are tuned for."""
LEAST_HEAD_SIZE = 16
"""The matrix units take no narrower product."""

Grid = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Which blocks of (queries, keys) are computed, each [n, m]."""

    partial: Grid
    """Some pairs are seen: the mask is asked for each. With a window, or where queries of a split row stand apart, now
    and then a block of which none is."""
    full: Grid
    """Every pair is seen."""


def blocks_of(
    row: Row, window: int | None = None, block: int = BLOCK, queries: npt.NDArray[np.int64] | None = None
) -> Blocks:
    """The grid of a row's mask, from `end` and `depth` alone; `queries` are the nodes that ask, in order, if not all.

    A key before the block of a query is seen by the block's first node iff its subtree reaches there, so that
    max(end) over a key block and the first query decide "empty", min(end) and the last query "full". A window adds
    the least and the largest difference of depth that two blocks can have.
    """
    asking = np.arange(len(row)) if queries is None else queries
    of_query, of_key = (np.arange(-(-size // block)) * block for size in (len(asking), len(row)))
    first, last = asking[of_query], asking[_last(of_query, block, len(asking))]
    last_key = _last(of_key, block, len(row))
    end_max, end_min = _extremes(row.end, of_key)
    reached = (of_key[None, :] <= last[:, None]) & (end_max[None, :] > first[:, None])
    covered = (last_key[None, :] <= first[:, None]) & (end_min[None, :] > last[:, None])
    if window is not None:
        depth_max, depth_min = _extremes(row.depth, of_key)
        own_max, own_min = _extremes(row.depth[asking], of_query)
        reached &= own_min[:, None] - depth_max[None, :] < window
        covered &= own_max[:, None] - depth_min[None, :] < window
    whole = of_query + block <= len(asking)  # the kernel takes a full block for one without an edge
    full = reached & covered & whole[:, None]
    return Blocks(partial=reached & ~full, full=full)


def _last(first: npt.NDArray[np.int64], block: int, size: int) -> npt.NDArray[np.int64]:
    """Last place of each block."""
    return np.minimum(first + block, size) - 1


def _extremes(values: npt.NDArray[np.int32], first: npt.NDArray[np.int64]) -> tuple[Any, Any]:
    """Largest and least value of each block."""
    return np.maximum.reduceat(values, first), np.minimum.reduceat(values, first)


def block_mask(tree: TreeRow, window: int | None) -> BlockMask:
    """The row's mask as FlexAttention takes it; made once for all layers with this window."""
    key = (FLEX, window)
    if key not in tree.prepared:
        share = tree.share
        blocks = blocks_of(tree.row, window, queries=None if share is None else share.nodes)
        device = tree.ids.device
        tree.prepared[key] = BlockMask.from_kv_blocks(
            *_listed(blocks.partial, device),
            *_listed(blocks.full, device),
            BLOCK_SIZE=BLOCK,
            mask_mod=_seen(
                send(tree.row.end, device), tree.all_depth, window, None if share is None else share.queries
            ),
            seq_lengths=(tree.ids.shape[1], len(tree.row)),
        )
    return tree.prepared[key]  # type: ignore[no-any-return]


def _listed(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of queries, how many blocks of keys and, in front, which: [1, 1, n] and [1, 1, n, m] int32."""
    count = grid.sum(axis=1, dtype=np.int32)
    order = np.argsort(~grid, axis=1, kind="stable").astype(np.int32)
    return send(count, device)[None, None], send(order, device)[None, None]


def _seen(end: Tensor, depth: Tensor, window: int | None, nodes: Tensor | None) -> Callable[..., Tensor]:
    """The mask of (query, key); `nodes` are the numbers of the queries' nodes where they are not all."""

    def on_path(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key]) & (depth[query] - depth[key] < window)  # type: ignore[operator]

    seen = on_path if window is None else in_window
    if nodes is None:
        return seen
    return lambda batch, head, query, key: seen(batch, head, nodes[query], key)


def _scored(shape: Shape, depth: Tensor) -> Callable[..., Tensor] | None:
    """What a layer makes of each score, or None: a soft cap, ALiBi's bias."""
    cap, slopes = shape.softcap, shape.slopes

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)  # type: ignore[operator]

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + slopes[head] * depth[key]  # type: ignore[index]

    def both(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return biased(capped(score, batch, head, query, key), batch, head, query, key)

    if cap is None:
        return None if slopes is None else biased
    return capped if slopes is None else both


def flex_refuses(query: Tensor, shape: Shape) -> str | None:
    """Why FlexAttention cannot compute this; None if it can."""
    if shape.dropout:
        return "it has no dropout"
    if shape.chunk is not None:
        return "its block mask knows no chunks"
    if query.device.type != "cpu" and query.shape[-1] < LEAST_HEAD_SIZE:
        return f"heads of {query.shape[-1]} features are narrower than {LEAST_HEAD_SIZE}"
    return None


def flex_tree_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """[1, H, N, D] of queries [1, H, N, D], keys and values [1, K, N, D]; of a split row, of some queries.

    A sink is one more score s in the softmax's denominator: with l the logarithm of the sum over the keys, the result
    without it is multiplied by e^l / (e^l + e^s) = sigmoid(l - s).
    """
    query, key, value = in_one_format(query, key, value)
    kernel = _kernel(query.device.type)
    sinks = shape.sinks
    done: Any = kernel(
        query,
        key,
        value,
        score_mod=_scored(shape, tree.all_depth),
        block_mask=block_mask(tree, shape.window),
        scale=shape.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return done  # type: ignore[no-any-return]
    out, aux = done
    share = torch.sigmoid(aux.lse.float() - sinks.float()[None, :, None])
    return out * share[..., None].to(out.dtype)  # type: ignore[no-any-return]


def in_one_format(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast knows nothing of these kernels, so its format is taken by hand (a norm before the scores is in fp32)."""
    kind = tensors[0].device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensors[-1].dtype
    return tuple(tensor.to(dtype) for tensor in tensors)


@cache
def _kernel(kind: str) -> Any:
    """Compiled for each shape of row; on the CPU, where it only serves as a check, its plain definition."""
    if kind == "cpu":
        return flex_attention
    # Beyond the limit it would run uncompiled, with N x N scores: a few row lengths times windows, caps and modes.
    keep_compiled()
    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


register(FLEX, flex_tree_attention)
