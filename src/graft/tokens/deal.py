"""A step's examples dealt to the processes of a run, each about as much work. Knows ids and numpy; no processes.

The examples are cut, in the order of their tree, where they share least, until no piece is more than a process's share,
and further while a cut costs little; the pieces then go, largest first, to whoever has least so far (LPT, Graham 1969,
doi 10.1137/0117039). A stem that two processes have between them is computed by both. The deal is a function of the
examples and of the number of processes, so each process finds the whole of it without asking.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.tokens.tree import common_length, lexicographic
from graft.types import Example

PIECES_PER_SHARE = 8
"""Pieces are cut until they are this part of a process's share, where it costs little."""
LITTLE = 0.1
"""Part of a piece that may be computed twice to cut it in two."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Operations of a forward pass: what a node, a pair of nodes that attend, and a predicted token take."""

    node: float = 1.0
    pair: float = 0.0
    target: float = 0.0


def deal(examples: Sequence[Example], processes: int, prices: Prices, share: bool = True) -> list[list[Example]]:
    """For each process its examples; together they are all, and each list is in the order of its tree.

    Without `share`, examples are priced as if each was computed alone, for models that do not run on trees.
    """
    ordered = sorted(examples, key=lexicographic)
    if processes == 1:
        return [ordered]
    lengths = np.array([len(e.ids) for e in ordered], np.float64)
    shared = np.zeros(len(ordered))  # with the example before
    if share:
        shared[1:] = [common_length(a.ids, b.ids) for a, b in itertools.pairwise(ordered)]
    if len(shared) > 1:  # the stem of all is computed by all, whatever the deal
        stem = shared[1:].min()
        lengths, shared = lengths - stem, np.maximum(0.0, shared - stem)
    targets = np.array([np.count_nonzero(e.weights) for e in ordered], np.float64)

    def price(first: int, last: int) -> float:
        """Of the examples first to last - 1, computed together and apart from all others."""
        before = np.concatenate([[0.0], shared[first + 1 : last]])
        own = lengths[first:last]
        pairs = (own**2 - before**2) / 2
        return float(
            prices.node * (own - before).sum() + prices.pair * pairs.sum() + prices.target * targets[first:last].sum()
        )

    pieces = _cut(price, prices.node * shared, len(ordered), price(0, len(ordered)) / processes)
    loads = [(0.0, process) for process in range(processes)]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for cost, first, last in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        load, process = heapq.heappop(loads)
        dealt[process] += range(first, last)
        heapq.heappush(loads, (load + cost, process))
    return [[ordered[index] for index in sorted(indices)] for indices in dealt]


def _cut(
    price: Callable[[int, int], float], shared: npt.NDArray[np.float64], count: int, fair: float
) -> list[tuple[float, int, int]]:
    """Pieces (price, first, last); `shared` is what it costs to cut before an example."""
    pieces = []
    waiting = [(0, count)] if count else []
    while waiting:
        first, last = waiting.pop()
        cost = price(first, last)
        inner = shared[first + 1 : last]
        costly = last - first == 1 or inner.min() > LITTLE * cost
        if last - first == 1 or cost <= (fair if costly else fair / PIECES_PER_SHARE):
            pieces.append((cost, first, last))
            continue
        least = np.flatnonzero(inner == inner.min())  # of the cheapest cuts the one nearest to the middle
        at = first + 1 + int(least[np.abs(least - len(inner) / 2).argmin()])
        waiting += [(first, at), (at, last)]
    return pieces
