"""Attention on rows whose trees are all paths, by torch's flash kernel for sequences of unequal length. CUDA only.

Shapes: H query heads, K key heads, N nodes, S paths, D head size.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from graft.model.attention.attend import Shape
from graft.model.attention.flex import in_one_format
from graft.model.attention.segments import TreeRow, register
from graft.model.device import send
from graft.tokens.tree import path_starts

VARLEN = "graft_varlen"
MOST_HEAD_SIZE = 256
"""The flash kernel's limit, in features."""


def sequences(tree: TreeRow) -> tuple[Tensor, int] | None:
    """[S + 1] int32, where each path starts and the last one ends, and the longest path's length; None for a branch."""
    key = (VARLEN,)
    if key not in tree.prepared:
        starts = path_starts(tree.row)
        if starts is None:
            tree.prepared[key] = None
        else:
            bounds = np.append(starts, len(tree.row)).astype(np.int32)
            tree.prepared[key] = (send(bounds, tree.ids.device), int(np.diff(bounds).max()))
    return tree.prepared[key]  # type: ignore[no-any-return]


def varlen_refuses(query: Tensor, tree: TreeRow, shape: Shape) -> str | None:
    """Why the flash kernel cannot compute this; None if it can."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind != "cuda":
        return "it runs on CUDA alone"
    if "window_size" not in _parameters():
        return f"that of torch {torch.__version__} cannot be told of a window"
    if dtype not in {torch.float16, torch.bfloat16}:
        return f"it computes in 16 bits, not in {dtype}"
    return _width_refused(query.shape[-1]) or _form_refused(tree, shape)


def _width_refused(width: int) -> str | None:
    wrong = width % 8 or width > MOST_HEAD_SIZE
    return f"heads of {width} features are not a multiple of 8 up to {MOST_HEAD_SIZE}" if wrong else None


def _form_refused(tree: TreeRow, shape: Shape) -> str | None:
    if shape.dropout or not shape.plain or shape.slopes is not None or shape.chunk is not None:
        return "it has no dropout, soft cap, sinks, ALiBi or chunks"
    if tree.share is not None or sequences(tree) is None:
        return "a tree of the row branches" if tree.share is None else "the row is split over processes"
    return None


@cache
def _parameters() -> frozenset[str]:
    """Names of the kernel's arguments: they changed from torch 2.10 to 2.13."""
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """[1, H, N, D] of queries [1, H, N, D], keys and values [1, K, N, D], for a row without branches.

    The kernel's window counts the keys before a query, ours counts the query too.
    """
    found = sequences(tree)
    if found is None:
        raise ValueError("a row with branches cannot be computed as sequences")
    bounds, longest = found
    q, k, v = (tensor[0].transpose(0, 1) for tensor in in_one_format(query, key, value))  # [N, H or K, D]
    grouped: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if "enable_gqa" in _parameters() else {}
    window = -1 if shape.window is None else shape.window - 1
    out = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=shape.scaling, window_size=(window, 0), **grouped
    )
    assert isinstance(out, Tensor)  # no auxiliary outputs were asked for
    return out.transpose(0, 1)[None]


register(VARLEN, varlen_attention)
