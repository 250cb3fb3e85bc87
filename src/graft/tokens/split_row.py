"""A row's nodes dealt to the processes that compute it together. Knows ids and numpy; no processes, no tensors.

Everything in a decoder but attention treats each node by itself, so any process can compute any node. The row is cut
into blocks of equal size, some for each process: all hold equally many nodes, which is what memory and most of the work
go by. Late nodes of a path attend to more than early ones, and only some predict anything: the dearest block left
goes to whoever has least so far and lacks blocks (Graham 1969, doi 10.1137/0117039, with a bound on the number).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.tokens.deal import Prices
from graft.tokens.tree import targets
from graft.types import Row

BLOCKS = 4
"""Of each process. Two would do for one path; four are more even where paths differ, and eight hardly more."""


@dataclass(frozen=True, slots=True)
class Held:
    """Neighbouring nodes that one process computes."""

    first: int
    end: int
    at: int
    """Place of the first among all nodes of the process, which are in the order of the row."""

    def part(self, first: int, end: int) -> Held | None:
        """What is held of the nodes from `first` to `end`; None for nothing."""
        begin = max(first, self.first)
        stop = min(end, self.end)
        return Held(begin, stop, self.at + begin - self.first) if begin < stop else None


def split_row(row: Row, processes: int, prices: Prices) -> npt.NDArray[np.int64]:
    """[processes * BLOCKS] which process computes each of so many equal blocks of nodes.

    Raises:
        ValueError: the row cannot be cut so.
    """
    count = processes * BLOCKS
    if len(row) % count:
        raise ValueError(f"a row of {len(row)} nodes cannot be cut into {count} equal blocks")
    price = prices.pair * (row.depth + 1.0)
    np.add.at(price, row.parent[targets(row)], prices.target)
    of_block = price.reshape(count, -1).sum(1)
    owner = np.empty(count, np.int64)
    least = [(0.0, 0, process) for process in range(processes)]
    for block in np.argsort(-of_block, kind="stable"):
        load, taken, process = heapq.heappop(least)
        owner[block] = process
        if taken + 1 < BLOCKS:
            heapq.heappush(least, (load + of_block[block], taken + 1, process))
    return owner


def held_by(owner: npt.NDArray[np.int64], size: int, process: int) -> list[Held]:
    """What a process computes of a row of `size` nodes; neighbouring blocks are one."""
    length = size // len(owner)
    held: list[Held] = []
    at = 0
    for block in np.flatnonzero(owner == process).tolist():
        first = block * length
        if held and held[-1].end == first:
            held[-1] = Held(held[-1].first, first + length, held[-1].at)
        else:
            held.append(Held(first, first + length, at))
        at += length
    return held


def nodes_of(held: list[Held]) -> npt.NDArray[np.int64]:
    """[n] the nodes, in order."""
    return np.concatenate([np.arange(piece.first, piece.end) for piece in held])
