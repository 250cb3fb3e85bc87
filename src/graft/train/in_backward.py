"""Updates within the backward pass: each weight's gradient is applied and freed as soon as it is whole.

Full fine-tuning then never holds all gradients at once, which are as large as the weights. What it costs is said
before any weight is loaded: a step must be one row (a second row's gradient would come after the update), and nothing
may need all gradients together: no clipping by their norm, no loss scaler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from graft.errors import ConfigError, Diverged
from graft.model.device import Precision
from graft.model.trees import TreeLM
from graft.tokens.plan import Plan
from graft.tokens.store import ExampleStore
from graft.tokens.tree import SHORTEST_RUN, build_rows
from graft.train.loss import Objective
from graft.train.optimizers import Together
from graft.train.step import RowSums, Stepper, StepSums
from graft.types import Row


def refuse_steps_of_several_rows(plan: Plan, store: ExampleStore, row_tokens: int, share: bool) -> None:
    """Each step must be one row: the first row's update would change the weights that the second one is computed with.

    Raises:
        ConfigError: one is not; names the step and what would make it one.
    """
    tokens = np.diff(store.start[store.first])  # [C] of each conversation, shared or not
    first: int | None = None
    needed = rows_of_first = 0
    for step in range(plan.total_steps):
        conversations = plan.step(step)
        if share and int(tokens[conversations].sum()) <= row_tokens:
            continue
        rows = build_rows(store.examples(conversations), row_tokens, share, SHORTEST_RUN)
        if len(rows) > 1:
            first, rows_of_first = (step, len(rows)) if first is None else (first, rows_of_first)
            needed = max(needed, sum(len(row) for row in rows))
    if first is not None:
        change = f"row_tokens={needed}" if share else "batch_size=1, for conversations of one turn,"
        raise ConfigError(
            f"optimizer_in_backward needs each step in one row, but step {first + 1} of {plan.total_steps} makes "
            f"{rows_of_first} rows of at most {row_tokens} tokens; set {change} or a smaller batch_size, or "
            "optimizer_in_backward=false"
        )


class BackwardStepper(Stepper):
    """A stepper whose updates are done when its backward pass is."""

    revocable = False

    def __init__(
        self,
        lm: TreeLM,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Together,
        precision: Precision,
        seed: int,
        objective: Objective,
        neftune_alpha: float | None,
    ) -> None:
        super().__init__(lm, parameters, optimizer, precision, None, seed, objective, neftune_alpha)
        if precision.scaled:
            raise ConfigError(
                "optimizer_in_backward cannot be joined with fp16, which this device computes in: its scaler must see "
                "every gradient before one is applied; set optimizer_in_backward=false or precision=fp32"
            )
        self.norms: list[Tensor] = []
        """Of the gradients of the step so far."""
        self.step = 0
        names = {id(p): name for name, p in parameters.items()}
        for part in optimizer.parts:
            (parameter,) = part.param_groups[0]["params"]
            parameter.register_post_accumulate_grad_hook(self._applier(names[id(parameter)], part))

    def accumulate(self, row: Row, number: tuple[int, int], weight: float) -> RowSums:
        """Apply the gradient of a step that is this row alone."""
        self.step = number[0] + 1
        self.norms = []
        return super().accumulate(row, number, weight)

    def _backward(self, loss: Tensor) -> None:
        if bool(torch.isfinite(loss)):  # else the step is skipped whole, while it still can be
            loss.backward()

    def update(self, rows: Sequence[RowSums], weight: float, step: int) -> StepSums:
        """Close the step. One whose loss is not finite was skipped.

        Raises:
            Diverged: several steps in a row were not finite.
        """
        norm = torch.linalg.vector_norm(torch.stack(self.norms)) if self.norms else torch.zeros(())
        asked = [] if self.sentinels is None else self.sentinels.questions()
        sums = StepSums.read(rows, norm, self.lm.device, asked, aux=self.aux_of_rows)
        self._count(math.isfinite(sums.loss), sums, weight, step, None)
        return sums

    def _applier(self, name: str, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def apply(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            size = float(norm)
            if not math.isfinite(size):
                raise Diverged(
                    f"step {self.step}: the gradient of {name} is not finite, and optimizer_in_backward has applied "
                    "others of this step already. Lower lr, or set optimizer_in_backward=false, which skips such steps"
                )
            self.norms.append(norm)
            if self.sentinels is not None and size > 0:
                self.sentinels.had_gradient(name)
            optimizer.step()
            parameter.grad = None

        return apply
