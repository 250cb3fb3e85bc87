"""The learning rate as a pure function of the step: nothing to save, nothing to drift between ranks or resumes."""

from __future__ import annotations

import math
from collections.abc import Callable

from graft.config.train import Train

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,  # Loshchilov & Hutter 2016, arXiv:1608.03983
    "linear": lambda progress: 1 - progress,
    "constant": lambda _progress: 1.0,
}
"""Shape of the decay: from 1 at progress 0 to what it ends at, at progress 1."""


def warmup_steps(settings: Train, total_steps: int) -> int:
    """Steps over which the learning rate rises."""
    return round(settings.warmup * total_steps)


def learning_rate(step: int, total_steps: int, settings: Train) -> float:
    """Learning rate of update `step` (0-based) of `total_steps`.

    It rises linearly and reaches the peak with the last warm-up step; the decay begins there and would reach
    `min_lr_ratio * lr` at step `total_steps`, one after the last update, so that no update is wasted on a rate of 0.
    """
    warm = warmup_steps(settings, total_steps)
    if step < warm:
        return settings.peak_lr * (step + 1) / warm
    progress = (step - warm) / max(1, total_steps - warm)
    share = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * SCHEDULES[settings.schedule](progress)
    return settings.peak_lr * share
