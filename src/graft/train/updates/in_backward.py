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
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.processes.shard import copies_of, local
from graft.model.trees import TreeLM
from graft.tokens.plan import Plan
from graft.tokens.store import ExampleStore
from graft.train.loss import Objective
from graft.train.step import RowSums, Stepper, StepSums
from graft.train.updates.optimizers import Together
from graft.types import Example, Row


def refuse_steps_of_several_rows(
    plan: Plan,
    store: ExampleStore,
    row_tokens: int,
    rows_of: Callable[[Sequence[Example], int], list[Row]],
    merge: bool,
) -> None:
    """Each step must be one row: the first row's update would change the weights that the second one is computed with.

    `rows_of` makes the rows of some examples, with `merge` one of all that fit into one.

    Raises:
        ConfigError: one is not; names the step and what would make it one.
    """
    tokens = np.diff(store.start[store.first])  # [C] of each conversation, shared or not
    first: int | None = None
    needed = rows_of_first = 0
    for step in range(plan.total_steps):
        conversations = plan.step(step)
        if merge and int(tokens[conversations].sum()) <= row_tokens:
            continue
        rows = rows_of(store.examples(conversations), row_tokens)
        if len(rows) > 1:
            first, rows_of_first = (step, len(rows)) if first is None else (first, rows_of_first)
            needed = max(needed, sum(len(row) for row in rows))
    if first is not None:
        change = f"row_tokens={needed}" if merge else "batch_size=1, for conversations of one turn,"
        raise ConfigError(
            f"optimizer_in_backward needs each step in one row, but step {first + 1} of {plan.total_steps} makes "
            f"{rows_of_first} rows of at most {row_tokens} tokens; set {change} or a smaller batch_size, or "
            "optimizer_in_backward=false"
        )


class BackwardStepper(Stepper):
    """A stepper whose updates are done when its backward pass is.

    Of several processes each has one row, and updates its parts of a weight as soon as all gradients of it are added.
    """

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
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(lm, parameters, optimizer, precision, None, seed, objective, neftune_alpha, ranks)
        if precision.scaled:
            raise ConfigError(
                "optimizer_in_backward cannot be joined with fp16, which this device computes in: its scaler must see "
                "every gradient before one is applied; set optimizer_in_backward=false or precision=fp32"
            )
        self.squares = torch.zeros(len(parameters), dtype=torch.float64)
        """[P] of each gradient of the step so far, the sum of its squares; here of this process's part of it."""
        places = {id(p): place for place, p in enumerate(parameters.values())}
        for part in optimizer.parts:
            (parameter,) = part.param_groups[0]["params"]
            parameter.register_post_accumulate_grad_hook(self._applier(places[id(parameter)], part))

    def _backward(self, loss: Tensor) -> None:
        # Else the step is skipped whole, while it still can be; by all, since all must go back through the model.
        if not self.ranks.any(not bool(torch.isfinite(loss))):
            loss.backward()

    def update(self, rows: Sequence[RowSums], weight: float, step: int) -> StepSums:
        """Close the step. One whose loss is not finite was skipped.

        Raises:
            Diverged: a gradient was not finite, or the loss several steps in a row.
        """
        copies = [copies_of(parameter) for parameter in self.parameters.values()]
        squares = self.ranks.sum(self.squares / torch.tensor(copies, dtype=torch.float64))
        self.squares = torch.zeros_like(self.squares)
        for name, square in zip(self.parameters, squares.tolist(), strict=True):
            if not math.isfinite(square):
                raise Diverged(
                    f"step {step}: the gradient of {name} is not finite, and optimizer_in_backward has applied "
                    "others of this step already. Lower lr, or set optimizer_in_backward=false, which skips such steps"
                )
            if self.sentinels is not None and square > 0:
                self.sentinels.had_gradient(name)
        asked = [] if self.sentinels is None else self.sentinels.questions()
        sums = StepSums.read(rows, squares.sum().sqrt(), self.lm.device, asked, self.ranks, self.aux_of_rows)
        self._count(math.isfinite(sums.loss), sums, weight, step, None)
        return sums

    def _applier(self, place: int, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
        def apply(parameter: Tensor) -> None:
            assert parameter.grad is not None
            norm = float(torch.linalg.vector_norm(local(parameter.grad), dtype=torch.float32))
            self.squares[place] = norm**2
            if math.isfinite(norm):  # else the run ends with the step
                optimizer.step()
            parameter.grad = None

        return apply
