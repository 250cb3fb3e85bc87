"""Attention of some nodes' queries to the keys of a whole row, piece by piece, whatever a layer adds to the scores.

What serves a split row where the CPU's kernel with log-sum-exps (attention_parts) does not: windows, chunks, ALiBi,
soft caps, sinks, dropout, other devices. A piece's keys are those of its path that it can see, and its scores live only
while it is computed: the backward pass computes them again, piece by piece, and adds to one gradient of all keys.

Shapes: H query heads, K key heads, N nodes, n queries held, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from graft.model.attention.attend import Shape, added_to_scores, attend
from graft.tokens.split_row import Held
from graft.tokens.tree import Segments

MOST_QUERIES = 512
"""Of a piece: its scores take so many times the length of its path, times H."""


class Piece(NamedTuple):
    """Neighbouring queries of one run, and the keys on their path."""

    queries: slice
    """Places among the queries that are held."""
    keys: tuple[slice, ...]
    """Nodes from the first that any of the queries can see to the last query, in the order of the path."""
    first: int
    """Depth of the first of the keys."""

    @property
    def size(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.queries.stop - self.queries.start, sum(part.stop - part.start for part in self.keys)


@dataclass(frozen=True, slots=True)
class Pieces:
    """All queries that are held, cut into pieces."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, cut: Segments, held: Sequence[Held], window: int | None, chunk: int | None) -> Pieces:
        """The pieces of a row that is cut into runs."""
        starts = [0, *itertools.accumulate(cut.sizes)]
        pieces = []
        for run, (start, size, offset) in enumerate(zip(starts, cut.sizes, cut.offsets, strict=False)):
            for part in filter(None, (piece.part(start, start + size) for piece in held)):
                for first in range(part.first, part.end, MOST_QUERIES):
                    end = min(part.end, first + MOST_QUERIES)
                    depth = offset + first - start
                    least = 0 if window is None else max(0, depth - window + 1)
                    if chunk is not None:
                        least = max(least, depth // chunk * chunk)
                    keys = _path(cut, starts, run, least, end)
                    at = part.at + first - part.first
                    pieces.append(Piece(slice(at, at + end - first), keys, least))
        return cls(tuple(pieces))


def _path(cut: Segments, starts: Sequence[int], run: int, least: int, end: int) -> tuple[slice, ...]:
    """The nodes on the path to node `end` - 1 of a run, from depth `least` on; neighbours are in one slice."""
    found: list[slice] = []
    for above in (*cut.ancestors[run], run):
        first = starts[above] + max(0, least - cut.offsets[above])
        stop = end if above == run else starts[above + 1]
        if first < stop:
            joins = bool(found) and found[-1].stop == first
            found[-1:] = [slice(found[-1].start, stop)] if joins else [*found[-1:], slice(first, stop)]
    return tuple(found)


def attention_of_pieces(query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, shape: Shape) -> Tensor:
    """[1, H, n, D] of queries [1, H, n, D], keys and values [1, K, N, D] in one number format."""
    seed = int(torch.randint(2**62, ())) if shape.dropout else 0
    plain = replace(shape, sinks=None)
    out: Tensor = _InPieces.apply(query, key, value, shape.sinks, pieces.pieces, plain, seed)  # type: ignore[no-untyped-call]
    return out


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        pieces: Sequence[Piece],
        shape: Shape,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.how = pieces, shape, seed
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]).transpose(1, 2)  # as layers read it
        with _as_it_is(query, seed, shape):
            for piece in pieces:
                taken = query[:, :, piece.queries], _taken(key, piece), _taken(value, piece)
                out[:, :, piece.queries] = _attend(*taken, sinks, piece, shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, sinks = ctx.saved_tensors
        pieces, shape, seed = ctx.how
        d_query = torch.empty_like(query)
        # Added up from all pieces: in fp32, as a kernel would for the whole row.
        d_key, d_value = (torch.zeros_like(whole, dtype=_exact(whole)) for whole in (key, value))
        d_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=_exact(sinks))
        with _as_it_is(query, seed, shape):
            for piece in pieces:
                q, k, v = (
                    taken.detach().requires_grad_()
                    for taken in (query[:, :, piece.queries], _taken(key, piece), _taken(value, piece))
                )
                own_sinks = None if sinks is None else sinks.detach().requires_grad_()
                with torch.enable_grad():
                    out = _attend(q, k, v, own_sinks, piece, shape)
                leaves = [q, k, v] + ([] if own_sinks is None else [own_sinks])
                found = torch.autograd.grad(out, leaves, grad[:, :, piece.queries])
                d_query[:, :, piece.queries] = found[0]
                start = 0
                for part in piece.keys:
                    here = slice(start, start := start + part.stop - part.start)
                    d_key[:, :, part] += found[1][:, :, here]
                    d_value[:, :, part] += found[2][:, :, here]
                if d_sinks is not None:
                    d_sinks += found[3]
        of_sinks = None if sinks is None or d_sinks is None else d_sinks.to(sinks.dtype)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), of_sinks, None, None, None


def _attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, piece: Piece, shape: Shape) -> Tensor:
    asked, seen = piece.size
    shape = replace(shape, sinks=sinks)
    bounds = [size for size in (shape.window, shape.chunk) if size is not None]
    masked = shape.slopes is not None or any(seen > size for size in bounds)
    if not masked and asked in (1, seen):
        return attend(query, key, value, shape, asked > 1, None)
    return attend(query, key, value, shape, False, added_to_scores(asked, seen, shape, query, piece.first))


def _taken(whole: Tensor, piece: Piece) -> Tensor:
    parts = [whole[:, :, part] for part in piece.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


@contextmanager
def _as_it_is(like: Tensor, seed: int, shape: Shape) -> Iterator[None]:
    """Compute in the tensors' own format; what dropout draws is the same each time."""
    with torch.autocast(like.device.type, enabled=False):
        if not shape.dropout:
            yield
            return
        with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
