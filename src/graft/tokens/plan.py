"""The plan of steps: which conversations each optimizer step sees. A pure function of (data, seed, step).

Hardware, row budget, world size and history do not enter, so a run is the same on other machines and after a resume,
and step 1,000,000 is found without walking through the steps before it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Plan:
    """Steps over `len(repeats)` conversations.

    An epoch holds conversation i `repeats[i]` times: 2.0 is twice, 0.25 is in one epoch of four. Its steps are of
    equal size to within one conversation, at most `batch_size`: 33 conversations at 16 make 11 + 11 + 11 and not
    16 + 16 + 1, so that no single conversation gets a step of its own.
    """

    repeats: tuple[float, ...]
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None

    def epoch_order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices of the conversations of one epoch, shuffled."""
        repeats = np.asarray(self.repeats)
        # A fractional repeat is served at fixed phases: over many epochs conversation i appears repeats[i] times per
        # epoch on average, and another subset each time.
        phase = np.random.default_rng([self.seed, 1]).random(len(repeats))
        times = np.floor(phase + repeats * (epoch + 1)) - np.floor(phase + repeats * epoch)
        order = np.repeat(np.arange(len(repeats)), times.astype(np.int64))
        return np.random.default_rng([self.seed, 2, epoch]).permutation(order)

    @functools.cached_property
    def _per_epoch(self) -> int:
        """Steps of one epoch; the same for all, from the mean number of conversations."""
        return max(1, math.ceil(sum(self.repeats) / self.batch_size - 1e-9))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, at least 1."""
        wanted = max(1, round(self._per_epoch * self.epochs))
        return wanted if self.max_steps is None else min(wanted, self.max_steps)

    def step(self, number: int) -> npt.NDArray[np.int64]:
        """Indices of the conversations of step `number` (0-based); one that repeats in a step stands there twice."""
        epoch, index = divmod(number, self._per_epoch)
        order = self._order(epoch)
        size, longer = divmod(len(order), self._per_epoch)  # the first `longer` steps have one conversation more
        start = index * size + min(index, longer)
        return order[start : start + size + (index < longer)].copy()

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """`epoch_order`, remembered for the epoch at hand: shuffling a million takes longer than a small step."""
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self.epoch_order(epoch)
        return self._orders[epoch]

    @functools.cached_property
    def _orders(self) -> dict[int, npt.NDArray[np.int64]]:
        return {}

    def epoch_at(self, number: int) -> float:
        """Epochs completed before step `number`."""
        return number / self._per_epoch
