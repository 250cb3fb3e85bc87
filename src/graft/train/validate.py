"""Validation: token-weighted loss and teacher-forced token accuracy over a whole set, in the rows of its trees."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from graft.console import track
from graft.model.device import Precision
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.trees import TreeLM
from graft.tokens.tree import total_weight
from graft.train.loss import row_loss
from graft.train.processes.share import rows_of_step
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
    ranks: Ranks = ALONE,
    beat: Callable[[str], None] = lambda _doing: None,
) -> Validation:
    """Loss (the plain nll, whatever is trained on) and token accuracy; (nan, nan, 0) for a set without targets.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    mine = rows_of_step(lm, examples, row_tokens, ranks)
    sums = [torch.zeros(2, device=lm.device)]
    training = lm.model.training
    lm.model.eval()
    # Weights that are gathered for the first time in inference mode could not be trained afterwards.
    without_gradients = torch.inference_mode() if ranks.size == 1 else torch.no_grad()
    try:
        with without_gradients, precision.autocast(lm.device):
            for row in track([*mine.rows, *mine.idle], "validating"):
                summed = row_loss(lm, lm.place(row))
                if len(sums) <= len(mine.rows):
                    sums.append(torch.stack([summed.nll, summed.correct]))  # read at the end: no waiting for the device
                beat("validating")
                if stop is not None and ranks.any(stop.is_set()):
                    raise Stopped
    finally:
        lm.model.train(training)
    weight = total_weight(examples)
    if weight == 0:
        return Validation(math.nan, math.nan, 0.0)
    nll, correct = ranks.sum(torch.stack(sums).double().sum(dim=0).cpu()).tolist()
    return Validation(nll / weight, correct / weight, weight)
