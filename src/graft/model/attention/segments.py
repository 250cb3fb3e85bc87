"""Attention on token trees, behind the names that transformers' models look up. Knows tensors, not text.

Shapes: B = 1 row, H query heads, K key heads (H is a multiple of K), N nodes, n nodes of one run, A keys of its
ancestors, D head size.

A model is given `row=TreeRow(...)` as an extra keyword argument; transformers hands it on, unchanged, to the attention
function registered here. Where an architecture drops it, the row comes with the mask (`row_mask`). No mask tensor is
ever built for a whole row by the `graft_segments` backend; the `graft_dense` backend writes the N x N mask out and is
the reference that tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from graft.model.attention.attend import FASTER_IN_16_BITS, Shape, added_to_scores, attend
from graft.model.attention.parts import Parts, attention_in_parts
from graft.model.attention.pieces import Pieces, attention_of_pieces
from graft.model.attention.row_mask import Form, RowMask, mask_function
from graft.model.device import send
from graft.model.memory.count import ATTENTION, part
from graft.model.processes.context import Share
from graft.tokens.tree import Segments, segments, targets, visible
from graft.types import Row

SEGMENTS = "graft_segments"
DENSE = "graft_dense"


class RowMissing(RuntimeError):
    """A model's attention was called without the row, or for something that a row does not describe."""


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
    asked: Tensor
    """[P] int64: the predictors, each once, in order."""
    labels: Tensor
    """[M] int64: the token that each predictor must predict."""
    weights: Tensor
    """[M] float32."""
    multiplicity: Tensor
    """[N] float32: number of examples that pass through each node."""
    segments: Segments
    all_depth: Tensor
    """[N] depth of every node of the row, computed here or by another process."""
    share: Share | None = None
    """What this process computes of a row that is split: all of the above but `segments` and `all_depth` are then of
    its own n nodes, and predictors are numbered among them."""
    windows: set[int] = field(default_factory=set)
    """Sliding windows and chunks that the attention function was asked for, in tokens."""
    calls: int = 0
    """How often the attention function was reached."""
    scores: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """What is added to scores, by shape: made in the first layer, used in all."""
    prepared: dict[tuple[object, ...], Any] = field(default_factory=dict)
    """What a backend made of the row for all layers (a block mask, sequence lengths), by a key of its own."""

    @classmethod
    def of(cls, row: Row, device: torch.device, share: Share | None = None) -> TreeRow:
        """Move a row's arrays, or what one process computes of them, to a device.

        The host does not wait until they are there.
        """
        nodes = targets(row)
        predictors = row.parent[nodes]
        mine: Any = slice(None)
        if share is not None:
            mine = share.nodes
            here = share.place[predictors] >= 0
            nodes, predictors = nodes[here], share.place[predictors[here]]

        def tensor(array: Any) -> Tensor:
            return send(array, device)

        depth = tensor(row.depth).long()
        return cls(
            row=row,
            ids=tensor(row.ids[mine]).long()[None],
            depth=depth[None] if share is None else depth[share.queries][None],
            predictors=tensor(predictors).long(),
            # Of a split row another process may have all predictors; not every module takes no nodes at all.
            asked=tensor(np.unique(predictors) if share is None or len(predictors) else np.zeros(1, np.int64)).long(),
            labels=tensor(row.ids[nodes]).long(),
            weights=tensor(row.weight[nodes]),
            multiplicity=tensor(row.multiplicity[mine]).float(),
            segments=segments(row),
            all_depth=depth,
            share=share,
        )


def segment_attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """[1, H, N, D]: each unbranched run of nodes attends to its ancestors' keys and causally to its own.

    Of a split row the queries are those of some nodes, [1, H, n, D]; so they are for every backend.
    """
    if _in_parts(query, value, tree, shape):
        return _attention_in_parts(query, key, value, tree, shape)
    if tree.share is not None:
        return _attention_of_share(query, key, value, tree, shape, tree.share)
    return _attention_by_run(query, key, value, tree, shape)


def _in_parts(query: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> bool:
    """Whether the CPU's kernel, which alone gives log-sum-exps, computes this as it is."""
    reach = min((size for size in (shape.window, shape.chunk) if size is not None), default=len(tree.row))
    whole = reach >= max(map(add, tree.segments.sizes, tree.segments.offsets))
    fast = _format(query).itemsize > 2 or max(tree.segments.sizes) < FASTER_IN_16_BITS
    plain = shape.plain and shape.slopes is None and not shape.dropout
    return query.device.type == "cpu" and plain and whole and fast and query.shape[-1] == value.shape[-1]


def _attention_in_parts(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    wanted = _format(query)
    form = torch.float32 if wanted.itemsize == 2 else wanted
    query, key, value = (tensor.to(form) for tensor in (query, key, value))
    name = ("parts", form)
    if name not in tree.prepared:
        made = Parts.of(tree.segments, None if tree.share is None else tree.share.held)
        tree.prepared[name] = made, made.mask(query)
    parts, mask = tree.prepared[name]
    return attention_in_parts(query, key, value, parts, mask, shape.scaling).to(wanted)


def _attention_of_share(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape, share: Share) -> Tensor:
    name = ("pieces", shape.window, shape.chunk)
    if name not in tree.prepared:
        tree.prepared[name] = Pieces.of(tree.segments, share.held, shape.window, shape.chunk)
    wanted = _format(query)
    query, key, value = (tensor.to(wanted) for tensor in (query, key, value))
    return attention_of_pieces(query, key, value, tree.prepared[name], shape)


def _format(query: Tensor) -> torch.dtype:
    """The number format in which torch's attention would compute."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _attention_by_run(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
    """Each run by a call of its own, its ancestors' keys and values copied before its own.

    Splitting once and concatenating the pieces keeps the backward pass at the size of what was used; slicing N-long
    keys once per run would make autograd add N-long zeros as often.
    """
    cut = tree.segments
    queries, keys, values = (tensor.split(cut.sizes, dim=2) for tensor in (query, key, value))
    done: list[Tensor] = []
    for index, (size, offset) in enumerate(zip(cut.sizes, cut.offsets, strict=True)):
        path, first = _path_in_window(cut, index, shape.window)
        q, k, v = queries[index], _joined(keys, path), _joined(values, path)
        seen = k.shape[2]
        reach = min((size for size in (shape.window, shape.chunk) if size is not None), default=seen)
        masked = shape.slopes is not None or seen > reach
        causal = not masked and size > 1 and (seen == size or offset < size)
        if causal and seen > size:
            # The ancestors' queries go along and their results are dropped: the causal kernel leaves out half of the
            # scores, which a mask does not, and that outweighs a short prefix.
            q = _joined(queries, path)
        added = None
        if masked or (not causal and size > 1):  # one query sees its whole path
            form = (size, seen, first, shape.window, shape.chunk, shape.slopes is not None, q.dtype)
            if form not in tree.scores:
                tree.scores[form] = added_to_scores(size, seen, shape, q, first)
            added = tree.scores[form]
        done.append(attend(q, k, v, shape, causal, added)[:, :, -size:].transpose(1, 2))
    # [1, N, H, D] in memory, which is how the kernel writes it and how the layer reads it: nothing is copied twice.
    return torch.cat(done, dim=1).transpose(1, 2)


def _joined(runs: Sequence[Tensor], path: Sequence[int]) -> Tensor:
    return runs[path[0]] if len(path) == 1 else torch.cat([runs[run] for run in path], dim=2)


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
    seen = torch.as_tensor(visible(tree.row), device=query.device)
    if tree.share is not None:
        seen = seen[tree.share.queries]
    own, depth = tree.depth[0], tree.all_depth
    if shape.window is not None:
        seen &= own[:, None] - depth[None, :] < shape.window
    if shape.chunk is not None:
        seen &= own[:, None] // shape.chunk == depth[None, :] // shape.chunk
    bias = torch.zeros(1, 1, 1) if shape.slopes is None else shape.slopes[:, None, None].cpu() * depth.float().cpu()
    added = bias.to(query).expand(-1, len(own), len(depth)).masked_fill(~seen, -torch.inf)
    return attend(query, key, value, shape, False, added)


Compute = Callable[[Tensor, Tensor, Tensor, TreeRow, Shape], Tensor]
BACKENDS: dict[str, Compute] = {}


def register(name: str, compute: Compute) -> None:
    """Make a backend known: to `BACKENDS`, and to the models of transformers under the same name.

    Of a split row it is given the queries of this process's nodes, and the keys and values of all.
    """
    BACKENDS[name] = _with_all_keys(compute)
    AttentionInterface.register(name, _for_transformers(BACKENDS[name]))
    AttentionMaskInterface.register(name, mask_function)


def _with_all_keys(compute: Compute) -> Compute:
    def attention(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
        if tree.share is None:
            return compute(query, key, value, tree, shape)
        return tree.share.attend(lambda keys, values: compute(query, keys, values, tree, shape), key, value)

    return attention


def _for_transformers(compute: Compute) -> Any:
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
        **others: Any,  # transformers hands on whatever the model was called with
    ) -> tuple[Tensor, None]:
        row, form = _row_of(module, row, attention_mask)
        _refuse_what_a_row_is_not(module, query, key, others)
        window = min((size for size in (sliding_window, form.window) if size is not None), default=None)
        row.calls += 1
        row.windows |= {size for size in (window, form.chunk) if size is not None}
        shape = Shape(scaling, window, softcap, s_aux, dropout=dropout, chunk=form.chunk)
        with part(ATTENTION):
            return compute(query, key, value, row, shape).transpose(1, 2).contiguous(), None

    return attention


def _row_of(module: nn.Module, row: TreeRow | None, mask: Tensor | None) -> tuple[TreeRow, Form]:
    """The row and the mask's form, from the argument or the mask.

    Raises:
        RowMissing: neither has one, or the mask is the architecture's own.
    """
    if isinstance(mask, RowMask) and isinstance(mask.row, TreeRow):
        return mask.row, mask.form
    if mask is not None:
        raise RowMissing(f"{type(module).__name__} makes a mask of its own")
    if row is None:
        raise RowMissing(f"{type(module).__name__} does not hand the row on to its attention")
    return row, Form()


CHANGES_NOTHING = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
    }
)
"""Arguments that attention functions are called with and whose value a row's attention need not know."""


def _refuse_what_a_row_is_not(module: nn.Module, query: Tensor, key: Tensor, others: dict[str, Any]) -> None:
    """An option that is not understood may change what is attended to, perhaps only in longer rows than the probe's.

    Raises:
        RowMissing: there is such an option, or there are other keys than the row's nodes.
    """
    unknown = sorted(name for name, value in others.items() if value is not None and name not in CHANGES_NOTHING)
    if unknown:
        raise RowMissing(f"{type(module).__name__} asks its attention for {', '.join(unknown)}")
    if query.shape[2] != key.shape[2]:
        raise RowMissing(f"{type(module).__name__} attends to {key.shape[2]} keys from {query.shape[2]} tokens")


register(SEGMENTS, segment_attention)
register(DENSE, dense_attention)
