"""A random sample of a stream of unknown length. Knows nothing of what is drawn."""

from __future__ import annotations

import random
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """Every item that passed by is in the sample with the same chance (Vitter's algorithm R, 1985); 0 keeps all."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = random.Random(seed)  # noqa: S311  # no secret
        self._held: list[tuple[int, Item]] = []
        self.seen = 0

    def add(self, item: Item) -> None:
        """Pass one more item by."""
        if not self._size or len(self._held) < self._size:
            self._held.append((self.seen, item))
        elif (place := self._random.randrange(self.seen + 1)) < self._size:
            self._held[place] = (self.seen, item)
        self.seen += 1

    def items(self) -> list[tuple[int, Item]]:
        """What is in the sample, each with its number in the stream, in the stream's order."""
        return sorted(self._held, key=lambda held: held[0])
