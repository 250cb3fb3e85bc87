"""Solved examples for few-shot prompts: kept in bounded memory, drawn evenly over the labels.

Speaks of rows, labels and draws. Knows no templates.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from graft.data.prompts.draw import Draw
from graft.data.prompts.labelled import Labelled

PER_LABEL = 1000
"""Rows that are kept of each label: those with the lowest hashes, so that the order of the rows does not matter."""


class Pool:
    """Training rows to take examples from."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._heaps: dict[str, list[tuple[int, bytes, Labelled]]] = {}
        self._keys: dict[str, set[bytes]] = {}
        self._rows: Mapping[str, list[Labelled]] | None = None

    def add(self, row: Labelled) -> None:
        """Consider a row; of rows that ask the same, the first is kept."""
        heap = self._heaps.setdefault(row.label or "", [])
        keys = self._keys.setdefault(row.label or "", set())
        if row.key in keys:
            return
        entry = (-Draw(self._seed, "pool", row.key).below(1 << 60), row.key, row)
        if len(heap) < PER_LABEL:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            keys.remove(heapq.heapreplace(heap, entry)[1])
        else:
            return
        keys.add(row.key)

    def __len__(self) -> int:
        return sum(map(len, self._heaps.values()))

    def candidates(self, row: Labelled, draw: Draw) -> Iterator[Labelled]:
        """Examples for a row: one of each label in turn, labels and rows in an order drawn for this row.

        Neither the row itself nor one that asks the same is among them, and none comes twice.
        """
        if self._rows is None:
            self._rows = {label: [entry[2] for entry in sorted(self._heaps[label])] for label in sorted(self._heaps)}
        queues = [_walk(self._rows[label], draw) for label in draw.shuffled(list(self._rows))]
        taken = {row.key}
        while queues:
            for queue in list(queues):
                found = next((item for item in queue if item.key not in taken), None)
                if found is None:
                    queues.remove(queue)
                else:
                    taken.add(found.key)
                    yield found


def _walk(rows: list[Labelled], draw: Draw) -> Iterator[Labelled]:
    """All rows once in a drawn order, of which no more is made than is used."""
    seen: set[int] = set()
    while len(seen) < len(rows):
        index = draw.below(len(rows))
        while index in seen:
            index = (index + 1) % len(rows)
        seen.add(index)
        yield rows[index]
