"""What stops a run that has gone wrong while it still looks like one: a rule, a sentence and exit code 4 for each.

Speaks the numbers that a step is read out with. What has to be asked of the device is asked as scalars that are read
together with the step's own sums, so that watching never makes the host wait for the device once more.

Steps that were not finite are counted in train/step.py, which does not apply them.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.console import warn
from graft.errors import Diverged
from graft.model.processes.shard import local

IN_A_ROW = 3
"""So many steps with a loss or a gradient of exactly zero end the run. One may happen by underflow."""
NEAR_UNIFORM = 1e-3
"""A loss within this of ln(vocabulary) is that of an output which says nothing."""
SPIKE = 10.0
"""A loss so many times the running median is a spike."""
LEAST_MEDIAN = 0.1
"""Below this median a ratio says nothing: what is known by heart has a loss of 0.001, and a new row one of 0.1."""
SPIKES_IN_A_ROW = 10
"""A spike that lasts so long has not gone away."""
HISTORY = 50
"""Losses that the median is taken over."""
LEAST_HISTORY = 8
"""Losses before a median means anything."""
SEEN_BY = 3
"""By this update every trained tensor has had a gradient. A LoRA's first matrix has none at the first, where the second
one is still zero."""
CHANGED_BY = 50
"""After so many updates it is asked which weights have changed at all."""
LEAST_CHANGED = 0.01
"""A smaller share of changed weights is said: updates are lost to rounding."""
SAMPLED = 1 << 16
"""Trained numbers that are looked at for it, evenly taken; a copy of all would be as large as the weights."""
MAY_WAIT = re.compile(r"expert|trainable_tokens|token_adapter|vector_bank")
"""Names of tensors that only some tokens reach: an expert that none was sent to is no mistake."""


class Step(NamedTuple):
    """What a step was read out as."""

    number: int
    """Counted from 1."""
    loss: float
    """Mean negative log-likelihood per target token."""
    norm: float
    """Of the gradient, before clipping."""
    weight: float
    """Sum of the weights of its targets."""
    applied: bool
    """False where it was skipped because it was not finite."""


class Sentinels:
    """Watches the steps of one run.

    Before a step's sums are read, `questions` says which further scalars to read; `judge` then looks at all of them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], vocabulary: int, first: bool = True) -> None:
        """Of several processes, which hold parts of the weights each, the first one's part is the sample of change."""
        self.parameters = parameters
        self.first = first
        self.uniform = math.log(vocabulary)
        self.zero_losses = 0
        self.zero_norms = 0
        self.spikes = 0
        self.losses: list[float] = []
        self.updates = 0
        """Since this process began."""
        self.unseen = dict.fromkeys(parameters)
        """Names of the tensors that have had no gradient yet."""
        self._asked: list[str] = []
        self._asked_for_change = False
        self._sample: Sample | None = Sample(parameters)

    def questions(self) -> list[Tensor]:
        """Scalars to read with the step at hand; asked after its backward pass and before its update."""
        self._asked, asked = [], []
        self._asked_for_change = False
        if self.updates < SEEN_BY:
            graded = [(name, p.grad) for name in self.unseen if (p := self.parameters[name]).grad is not None]
            self._asked = [name for name, _ in graded]
            asked = list(torch._foreach_norm([local(grad) for _, grad in graded])) if graded else []
        if self.updates == CHANGED_BY and self._sample is not None:
            self._asked_for_change = True
            asked.append(self._sample.changed(self.parameters) * float(self.first))
        return asked

    def judge(self, step: Step, answers: Sequence[float]) -> None:
        """Look at a step that was read out.

        Raises:
            Diverged: the run has gone wrong; says how it is known and what to look at.
        """
        for name, norm in zip(self._asked, answers, strict=False):
            if norm > 0:  # false for NaN, which is no gradient to learn from
                self.unseen.pop(name, None)
        if not step.applied:
            return
        if self._asked_for_change:
            self._look_at_change(answers[-1])
            self._sample = None
        self.updates += 1
        if step.weight:
            self._look_at_zeros(step)
            self._look_for_spike(step)
        if self.updates == SEEN_BY:
            self._look_at_unseen(step.number)

    def had_gradient(self, name: str) -> None:
        """Say of a tensor whose gradient is applied and freed at once that it had one."""
        self.unseen.pop(name, None)

    def _look_at_zeros(self, step: Step) -> None:
        self.zero_norms = self.zero_norms + 1 if step.norm == 0 else 0
        self.zero_losses = self.zero_losses + 1 if step.loss == 0 else 0
        if self.zero_losses >= IN_A_ROW:
            raise Diverged(
                f"step {step.number}: the loss is exactly 0 for {IN_A_ROW} steps in a row, over {step.weight:g} target "
                "tokens: the model is sure of everything, or its logits are no numbers. Look at the targets with graft "
                "data inspect; if the data is known by heart, train for fewer epochs"
            )
        if self.zero_norms < IN_A_ROW:
            return
        if abs(step.loss - self.uniform) < NEAR_UNIFORM:
            raise Diverged(
                f"step {step.number}: the loss is {step.loss:.4f}, which is ln(vocabulary) {self.uniform:.4f}, with a "
                f"gradient of 0 for {IN_A_ROW} steps in a row: every token is equally likely to the model, so its "
                "output layer or its hidden states are zero. Load the base elsewhere to see whether its files are whole"
            )
        raise Diverged(
            f"step {step.number}: the gradient is exactly 0 for {IN_A_ROW} steps in a row (loss {step.loss:.4f}), "
            "so nothing is learnt. Something between the loss and what is trained lets no gradient through, or fp16 "
            "loses it: try precision=fp32 and checkpointing=none"
        )

    def _look_for_spike(self, step: Step) -> None:
        median = max(statistics.median(self.losses), LEAST_MEDIAN) if len(self.losses) >= LEAST_HISTORY else math.inf
        if not step.loss > SPIKE * median:
            self.spikes = 0
            self.losses = [*self.losses, step.loss][-HISTORY:]
            return
        self.spikes += 1
        said = f"step {step.number}: loss {step.loss:.4g} is over {SPIKE:g} times the median of late, {median:.4g}"
        if self.spikes == 1:
            warn(f"{said}. The run stops if it stays there for {SPIKES_IN_A_ROW} steps")
        if self.spikes >= SPIKES_IN_A_ROW:
            raise Diverged(f"{said}, for the {self.spikes}th step in a row. Lower lr, or lengthen warmup")

    def _look_at_unseen(self, number: int) -> None:
        waiting = [name for name in self.unseen if MAY_WAIT.search(name)]
        dead = [name for name in self.unseen if not MAY_WAIT.search(name)]
        if dead:
            raise Diverged(
                f"step {number}: {len(dead)} of {len(self.parameters)} trained tensors have had no gradient in "
                f"{self.updates} updates, for example {', '.join(dead[:3])}: they would stay as they are. Leave them "
                "out of what is trained (lora.target_modules, freeze.patterns), or try checkpointing=none"
            )
        if waiting:
            warn(
                f"{len(waiting)} trained tensors that only some tokens reach have had no gradient in {self.updates} "
                f"updates, for example {waiting[0]}"
            )

    def _look_at_change(self, share: float) -> None:
        if share < LEAST_CHANGED:
            warn(
                f"{share:.2%} of the trained weights have changed in {CHANGED_BY} updates (of {SAMPLED:,} looked at at "
                "the most): the updates are smaller than the weights' last digit. Raise lr, or keep the weights in "
                "fp32 (master_weights=fp32)"
            )

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "zero_losses": self.zero_losses, "zero_norms": self.zero_norms, "spikes": self.spikes,
            "losses": self.losses,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Put a saved state back."""
        for name, value in state.items():
            setattr(self, name, value)


class Sample:
    """Some of the trained numbers, as they were when the run began."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.stride = max(1, -(-sum(p.numel() for p in parameters.values()) // SAMPLED))
        self.before = self._take(parameters)

    def changed(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """Share of them that are other numbers now; a scalar on the device."""
        return (self._take(parameters) != self.before).float().mean()

    def _take(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        with torch.no_grad():
            taken = [local(p.detach()).reshape(-1)[:: self.stride].float() for p in parameters.values()]
            return torch.cat([part.to(taken[0].device) for part in taken])
