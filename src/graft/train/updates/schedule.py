"""The learning rate as a pure function of the step: nothing to save, nothing to drift between ranks or resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from graft.config.train import Train


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step after the warm-up is."""

    step: int
    """0-based, warm-up included."""
    warm: int
    """Steps of the warm-up."""
    total: int
    """Steps of the run."""

    @property
    def progress(self) -> float:
        """0 at the first step after the warm-up, 1 one step after the last."""
        return (self.step - self.warm) / max(1, self.total - self.warm)


def _stable_then_down(at: Place, settings: Train) -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395), falling as 1 - sqrt (arXiv:2405.18392, section 4)."""
    falling = max(1, round(settings.decay * at.total))
    begun = at.step - (at.total - falling)
    return 1.0 if begun <= 0 else 1 - math.sqrt(begun / falling)


SCHEDULES: dict[str, Callable[[Place, Train], float]] = {
    "cosine": lambda at, _: (1 + math.cos(math.pi * at.progress)) / 2,  # Loshchilov & Hutter 2016, arXiv:1608.03983
    "linear": lambda at, _: 1 - at.progress,
    "constant": lambda _at, _: 1.0,
    "wsd": _stable_then_down,
    "inverse_sqrt": lambda at, _: math.sqrt(max(1, at.warm) / max(1, at.warm, at.step + 1)),  # arXiv:1706.03762, 5.3
    "polynomial": lambda at, settings: (1 - at.progress) ** settings.power,
}
"""Shape of the decay: 1 at the end of the warm-up, and what it has come down to at a later step."""


def warmup_steps(settings: Train, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    return round(settings.warmup * total_steps)


def learning_rate(step: int, total_steps: int, settings: Train) -> float:
    """Learning rate of update `step` (0-based) of `total_steps`.

    It rises linearly and reaches the peak with the last warm-up step; the decay begins there and would reach
    `min_lr_ratio * lr` at step `total_steps`, one after the last update, so that no update is wasted on a rate of 0
    (`constant` stays, and `inverse_sqrt` comes down as far as the number of steps takes it).
    """
    warm = warmup_steps(settings, total_steps)
    if step < warm:
        return settings.peak_lr * (step + 1) / warm
    shape = SCHEDULES[settings.schedule](Place(step, warm, total_steps), settings)
    share = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape
    return settings.peak_lr * share
