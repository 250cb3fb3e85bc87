"""One optimizer step: rows become gradients, gradients become an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from graft.errors import Diverged
from graft.model.device import Precision
from graft.model.trees import TreeLM
from graft.train.loss import row_loss
from graft.types import Row

MOST_SKIPPED = 5
"""So many non-finite steps in a row end the run."""


class Stepper:
    """Turns rows into updates, and counts the updates that were skipped because they were not finite."""

    def __init__(
        self,
        lm: TreeLM,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float | None,
        seed: int,
    ) -> None:
        self.lm = lm
        self.parameters = parameters
        self.optimizer = optimizer
        self.precision = precision
        self.clip = clip
        self.seed = seed
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.scaler = torch.amp.GradScaler(lm.device.type, enabled=precision.scaled)

    def accumulate(self, row: Row, number: tuple[int, int], weight: float) -> Tensor:
        """Add the gradient of one row's share of the step's mean loss; returns the row's summed nll, on the device.

        Nothing here waits for the device: the host goes on to the next row while this one is computed.

        `number` is (step, index of the row in it): dropout is seeded by it, so that a resumed run, or one on other
        hardware, draws what the unbroken one would have drawn.
        """
        torch.manual_seed(hash((self.seed, *number)) & 0x7FFF_FFFF_FFFF_FFFF)
        with self.precision.autocast(self.lm.device):
            nll = row_loss(self.lm, self.lm.place(row)).nll
        if weight and nll.requires_grad:
            self.scaler.scale(nll / weight).backward()
        return nll.detach()

    def update(self, nlls: Sequence[Tensor], weight: float, step: int) -> tuple[float, float]:
        """Clip and apply the gradient; returns the summed nll of the rows and the norm before clipping.

        A non-finite one is skipped and counted. Here the host waits for the device, once.

        Raises:
            Diverged: several steps in a row were not finite.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        *of_rows, found_norm = torch.stack([*nlls, norm.to(self.lm.device, torch.float32)]).tolist()
        nll = sum(of_rows, 0.0)
        loss = nll / weight if weight else 0.0
        finite = math.isfinite(loss) and math.isfinite(found_norm)
        if finite and self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        if finite:
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.scaler.update()
        culprit = None if finite else self._first_bad_gradient()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"step {step}: loss {loss} and gradient norm {found_norm} are not finite for the "
                f"{self.skipped_in_a_row}th step in a row ({culprit or 'the loss itself'}); none of them was applied. "
                "Lower lr, or use precision=bf16 or fp32"
            )
        return nll, found_norm

    def discard(self) -> None:
        """Forget what was accumulated, so that an interrupted step leaves no trace."""
        self.optimizer.zero_grad(set_to_none=True)

    def _first_bad_gradient(self) -> str | None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f"first in {name}"
        return None
