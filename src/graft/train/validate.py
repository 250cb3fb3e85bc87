"""Validation: token-weighted loss and teacher-forced token accuracy over a whole set, in the rows of its trees."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.console import track
from graft.model.device import Precision
from graft.model.trees import TreeLM
from graft.tokens.tree import total_weight
from graft.train.loss import row_loss
from graft.types import Example


@dataclass(frozen=True, slots=True)
class Validation:
    """Sums over the set, divided once: the same for any row size, batch and number of ranks."""

    loss: float
    """Mean negative log-likelihood per target token, weighted."""
    token_accuracy: float
    """Share of target tokens with the largest logit when everything before them is given (not task accuracy)."""
    tokens: float
    """Sum of the weights of all targets: their number, where every weight is 1."""


class Stopped(Exception):
    """A stop was asked for before the validation was through. Never reaches the user."""


def validate(
    lm: TreeLM,
    examples: Sequence[Example],
    row_tokens: int,
    precision: Precision,
    stop: threading.Event | None = None,
) -> Validation:
    """Loss (the plain nll, whatever is trained on) and token accuracy; (nan, nan, 0) for a set without targets.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    sums: list[Tensor] = []
    training = lm.model.training
    lm.model.eval()
    try:
        with torch.inference_mode(), precision.autocast(lm.device):
            for row in track(lm.rows(examples, row_tokens), "validating"):
                summed = row_loss(lm, lm.place(row))
                sums.append(torch.stack([summed.nll, summed.correct]))  # read at the end: the device is not waited for
                if stop is not None and stop.is_set():
                    raise Stopped
    finally:
        lm.model.train(training)
    weight = total_weight(examples)
    if weight == 0:
        return Validation(math.nan, math.nan, 0.0)
    nll, correct = (sum(column) for column in zip(*torch.stack(sums).tolist(), strict=True))
    return Validation(nll / weight, correct / weight, weight)
