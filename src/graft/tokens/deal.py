"""A step's examples dealt to the processes of a run, each about as much work. Knows ids and numpy; no processes.

The examples are cut, in the order of their tree, where they share least, until no piece is more than a process's share,
and further while a cut costs little; the pieces then go, largest first, to whoever has least so far (LPT, Graham 1969,
doi 10.1137/0117039). A stem that two processes have between them is computed by both. The deal is a function of the
examples and of the number of processes, so each process finds the whole of it without asking.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.tokens.tree import common_length
from graft.types import Example, IntArray

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Price = Callable[[Indices, Indices], Floats]

PIECES_PER_SHARE = 8
"""Pieces are cut until they are this part of a process's share, where it costs little."""
LITTLE = 0.1
"""Part of a piece that may be computed twice to cut it in two."""
WINDOW = 8
"""Tokens in which neighbours are compared first; most differ there."""


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
    if not examples:
        return [[] for _ in range(processes)]
    ids = np.concatenate([example.ids for example in examples])
    lengths = np.array([len(example.ids) for example in examples])
    begins = np.cumsum(lengths) - lengths
    order = _in_order(examples, ids, begins)
    ordered = [examples[index] for index in order]
    if processes == 1:
        return [ordered]
    begins, sizes = begins[order], lengths[order].astype(np.float64)
    shared = _shared(ids, begins, lengths[order]) if share else np.zeros(len(ordered))
    if len(shared) > 1:  # the stem of all is computed by all, whatever the deal
        stem = shared[1:].min()
        sizes, shared = sizes - stem, np.maximum(0.0, shared - stem)
    targets = np.array([np.count_nonzero(example.weights) for example in ordered], np.float64)
    price = _pricer(prices, sizes, shared, targets)
    fair = float(price(np.array([0]), np.array([len(ordered)]))[0]) / processes
    loads = [(0.0, process) for process in range(processes)]
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for cost, first, last in _cut(price, prices.node * shared, fair):
        load, process = heapq.heappop(loads)
        dealt[process] += range(first, last)
        heapq.heappush(loads, (load + cost, process))
    return [[ordered[index] for index in sorted(indices)] for indices in dealt]


def _in_order(examples: Sequence[Example], ids: IntArray, begins: Indices) -> list[int]:
    """Indices of the examples, sorted as `lexicographic` would; `ids` are those of all, one behind the other."""
    text = ids.astype(">i4").tobytes()
    starts = [*(4 * begins).tolist(), len(text)]
    keys = [
        (text[begin:end], example.conversation, example.turn)
        for begin, end, example in zip(starts, starts[1:], examples, strict=False)
    ]
    return sorted(range(len(examples)), key=keys.__getitem__)


def _sums(values: npt.ArrayLike) -> Floats:
    """[n + 1] sums of the values before each, and of all."""
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _shared(ids: IntArray, begins: Indices, lengths: Indices) -> Floats:
    """[E] tokens that each example has in common with the one before it, of examples in order.

    What the first and the last one have in common all have. Beyond it pairs are compared in windows that grow, as long
    as they are equal.
    """
    most = np.minimum(lengths[1:], lengths[:-1])
    found = np.zeros(len(lengths), np.int64)
    if not len(most):
        return found.astype(np.float64)
    at = common_length(*(ids[begins[one] : begins[one] + lengths[one]] for one in (0, -1)))
    going = np.arange(len(most))  # pair i is of examples i and i + 1
    width = WINDOW
    while len(going):
        columns = at + np.arange(width)
        here = np.minimum(columns, most[going, None] - 1)  # beyond the shorter one nothing is equal
        same = ids[begins[going, None] + here] == ids[begins[going + 1, None] + here]
        same &= columns < most[going, None]
        count = np.where(same.all(axis=1), width, same.argmin(axis=1))
        found[going + 1] = np.minimum(at + count, most[going])
        going = going[count == width]
        at += width
        width *= 2
    return found.astype(np.float64)


def _pricer(prices: Prices, lengths: Floats, shared: Floats, targets: Floats) -> Price:
    """The price of examples first to last - 1, computed together and apart from all others; of many at once."""
    nodes, common = _sums(lengths), _sums(shared)
    pairs, common_pairs = _sums(lengths**2 / 2), _sums(shared**2 / 2)
    predicted = _sums(targets)

    def price(first: Indices, last: Indices) -> Floats:
        own = nodes[last] - nodes[first] - (common[last] - common[first + 1])
        attended = pairs[last] - pairs[first] - (common_pairs[last] - common_pairs[first + 1])
        found: Floats = (
            prices.node * own + prices.pair * attended + prices.target * (predicted[last] - predicted[first])
        )
        return found

    return price


def _cut(price: Price, shared: Floats, fair: float) -> list[tuple[float, int, int]]:
    """Pieces (price, first, last), the dearest first; `shared` is what it costs to cut before an example.

    All pieces that are still to be cut are cut at once: a step of a thousand processes has ten thousand.
    """
    first, last = np.array([0]), np.array([len(shared)])
    done: list[tuple[Floats, Indices, Indices]] = []
    while len(first):
        cost = price(first, last)
        least, at = _cheapest(shared, first, last)
        costly = least > LITTLE * cost
        whole = (last - first == 1) | (cost <= np.where(costly, fair, fair / PIECES_PER_SHARE))
        done.append((cost[whole], first[whole], last[whole]))
        first, at, last = first[~whole], at[~whole], last[~whole]
        first, last = np.concatenate([first, at]), np.concatenate([at, last])
    costs, begins, ends = (np.concatenate(its) for its in zip(*done, strict=True))
    order = np.lexsort((begins, -costs))
    return list(zip(costs[order].tolist(), begins[order].tolist(), ends[order].tolist(), strict=True))


def _cheapest(shared: Floats, first: Indices, last: Indices) -> tuple[Floats, Indices]:
    """What the cheapest cut of each piece costs, and where it is; of several the one nearest to the middle.

    For a piece of one example, which cannot be cut, infinity and no place.
    """
    several = np.flatnonzero(last - first > 1)
    least, at = np.full(len(first), np.inf), np.zeros(len(first), np.int64)
    if len(several):
        sizes = (last - first)[several] - 1  # places for a cut
        begins = np.cumsum(sizes) - sizes
        of = np.repeat(np.arange(len(several)), sizes)
        inside = np.arange(len(of)) - begins[of]
        costs = shared[first[several][of] + 1 + inside]
        least[several] = np.minimum.reduceat(costs, begins)
        away = np.where(costs == least[several][of], np.abs(inside - sizes[of] / 2), np.inf)
        nearest = np.flatnonzero(away == np.minimum.reduceat(away, begins)[of])
        _, which = np.unique(of[nearest], return_index=True)
        at[several] = first[several] + 1 + inside[nearest[which]]
    return least, at
