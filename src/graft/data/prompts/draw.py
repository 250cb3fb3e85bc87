"""Chance that depends on words alone: the same seed and row draw the same on every machine, in any order of rows.

Speaks of seeds and numbers. Python's own hash and random generators are left out: the first changes with the process,
the second with the number of draws made before.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """A stream of numbers made from some words: a seed, a row's key, what is drawn for."""

    def __init__(self, *words: object) -> None:
        said = "\x1f".join(word.hex() if isinstance(word, bytes) else str(word) for word in words)
        self._key = hashlib.blake2b(said.encode(errors="backslashreplace"), digest_size=16).digest()
        self._drawn = 0
        self._ready: list[int] = []

    def below(self, limit: int) -> int:
        """The next number in [0, limit). The bias of the remainder is below 2^-40 for any limit that occurs here."""
        if not self._ready:  # one digest gives eight numbers
            self._drawn += 1
            digest = hashlib.blake2b(self._drawn.to_bytes(8, "big"), key=self._key).digest()
            self._ready = list(struct.unpack("<8Q", digest))
        return self._ready.pop() % limit

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a new order (Fisher and Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result
