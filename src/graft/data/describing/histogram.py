"""How numbers are spread: quantiles and a histogram. Knows nothing of what is counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = Sequence[int] | npt.NDArray[Any]

FEWEST_BARS = 8


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of some whole numbers from 0 up."""

    count: int
    total: int
    least: int = 0
    median: int = 0
    p90: int = 0
    p95: int = 0
    p99: int = 0
    most: int = 0
    mean: float = 0.0
    edges: tuple[int, ...] = ()
    """[B + 1] bar b counts edges[b] <= value < edges[b + 1]; the edges grow by a constant factor."""
    counts: tuple[int, ...] = ()
    """[B]"""


def spread(values: Numbers) -> Spread:
    """Quantiles are values that occur (the nearest rank), so that `p95` is a length that some row has."""
    numbers = np.sort(np.asarray(values, dtype=np.int64))
    if not len(numbers):
        return Spread(0, 0)

    def rank(share: float) -> int:
        return int(numbers[max(0, math.ceil(share * len(numbers)) - 1)])

    edges = _edges(int(numbers[0]), int(numbers[-1]))
    counts, _ = np.histogram(numbers, bins=np.array(edges))
    return Spread(
        count=len(numbers),
        total=int(numbers.sum()),
        least=int(numbers[0]),
        median=rank(0.5),
        p90=rank(0.9),
        p95=rank(0.95),
        p99=rank(0.99),
        most=int(numbers[-1]),
        mean=round(float(numbers.mean()), 2),
        edges=edges,
        counts=tuple(int(count) for count in counts),
    )


def _edges(least: int, most: int) -> tuple[int, ...]:
    """Powers of 2 and steps between them, from at most `least` to more than `most`; powers of 2 are always edges."""
    for steps in (2, 4, 8):
        low = math.floor(steps * math.log2(max(1, least)))
        high = math.ceil(steps * math.log2(most + 1)) if most else 0
        edges = sorted({round(2 ** (k / steps)) for k in range(low, high + 1)} | ({0, 1} if least < 1 else set()))
        while len(edges) > 2 and edges[1] <= least:
            edges.pop(0)
        if edges[-1] <= most:
            edges.append(most + 1)
        if len(edges) > FEWEST_BARS:
            break
    return tuple(edges)
