"""One optimizer step: rows become gradients, gradients become an update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graft.errors import Diverged
from graft.model.attention.segments import TreeRow
from graft.model.device import Precision
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.processes.shard import everywhere, local, sum_gradients
from graft.model.router import Routed, RouterWatch, share_of_aux
from graft.model.trees import TreeLM
from graft.train.loss import PLAIN, Objective, Summed, row_loss
from graft.train.noise import noisy_embedding
from graft.train.processes.share import MyRows
from graft.train.sentinels import Sentinels
from graft.types import Row

FEW = 0.02
"""Up to this share of a model's weights, all their gradients beside a part of the weights are little."""
MOST_SKIPPED = 5
"""So many non-finite steps in a row end the run."""


class RowSums(NamedTuple):
    """What a row adds to its step; scalars that stay on the device."""

    loss: Tensor
    """Sum of weight * objective."""
    nll: Tensor
    """Sum of weight * nll; the same where the objective is plain."""


class StepSums(NamedTuple):
    """What a step adds up to."""

    loss: float
    """Sum of weight * objective."""
    nll: float
    """Sum of weight * nll."""
    norm: float
    """Of the gradient, before clipping."""
    answers: tuple[float, ...] = ()
    """To what the sentinels asked."""
    aux: float = 0.0
    """Load-balancing loss, without its coefficient."""

    @classmethod
    def read(
        cls,
        rows: Sequence[RowSums],
        norm: Tensor,
        device: torch.device,
        asked: Sequence[Tensor] = (),
        ranks: Ranks = ALONE,
        aux: Sequence[Tensor] = (),
    ) -> StepSums:
        """Add up what rows gave, in all processes; here the host waits for the device, once.

        `norm` is that of the whole gradient already; what is asked is added up over the processes too, and so are the
        rows' parts `aux` of the load-balancing loss.
        """
        others = [one.to(device, torch.float32) for one in (norm, *asked, *aux)]
        read = torch.stack([*(sums for row in rows for sums in row), *others]).tolist()
        count = 2 * len(rows)
        of_rows, found, answers = read[:count], read[count], read[count + 1 :]
        answers[len(asked) :] = [sum(answers[len(asked) :], 0.0)]
        mine = torch.tensor([sum(of_rows[0::2], 0.0), sum(of_rows[1::2], 0.0), *answers], dtype=torch.float64)
        loss, nll, *answered, balance = ranks.sum(mine).tolist()
        return cls(loss, nll, found, tuple(answered), balance)


def _seed(*numbers: int) -> int:
    return hash(numbers) & 0x7FFF_FFFF_FFFF_FFFF


class Stepper:
    """Turns rows into updates, and counts the updates that were skipped because they were not finite."""

    revocable = True
    """Whether a step that was begun can still be discarded."""

    def __init__(
        self,
        lm: TreeLM,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        clip: float | None,
        seed: int,
        objective: Objective = PLAIN,
        neftune_alpha: float | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.lm = lm
        self.ranks = ranks
        self.parameters = parameters
        self.optimizer = optimizer
        self.precision = precision
        self.clip = clip
        self.seed = seed
        self.objective = objective
        self.neftune_alpha = neftune_alpha
        self.router: RouterWatch | None = None
        """Set where the balance of a mixture of experts is trained too."""
        self.routed: Routed | None = None
        """What the routers did with the tokens of the step at hand; None until that is known."""
        self.aux_of_rows: list[Tensor] = []
        """The part of the step's load-balancing loss of each row of this process, without its coefficient."""
        self.sentinels: Sentinels | None = None
        """What asks for further scalars to be read with a step's sums."""
        self.skipped = 0
        self.skipped_in_a_row = 0
        trained = sum(parameter.numel() for parameter in parameters.values())
        self.few = trained <= FEW * sum(parameter.numel() for parameter in lm.model.parameters())
        """Whether so little is trained that gradients are added up between processes once per step, not per row."""
        self.scaler = torch.amp.GradScaler(lm.device.type, enabled=precision.scaled)

    @property
    def aux(self) -> float:
        """Load-balancing loss of this process's rows of the step, without its coefficient."""
        return float(sum(self.aux_of_rows, torch.zeros(())))

    def count_experts(self, mine: MyRows, step: int) -> None:
        """Run the rows of a step once to see which experts they choose: the balance is that of the whole step.

        Only where it is trained and there are several rows; a lone row of a lone process knows all by itself.
        """
        self.routed, self.aux_of_rows = None, []
        if self.router is None or (len(mine.rows) == 1 and self.ranks.size == 1):
            return
        for index, row in enumerate([*mine.rows, *mine.idle]):
            with torch.no_grad():
                _, found = self._row_loss(row, (step, mine.number_of(index)))
            if found is not None and index >= len(mine.rows):
                found = found.times(0)
            self.routed = found if self.routed is None or found is None else self.routed.plus(found)
        if self.routed is not None:
            self.routed = self.routed.everywhere(self.ranks)

    def accumulate(self, row: Row, number: tuple[int, int], weight: float) -> RowSums:
        """Add the gradient of one row's share of the step's mean loss; returns the row's sums.

        Nothing here waits for the device: the host goes on to the next row while this one is computed.

        `number` is (step, index of the row in it): dropout and noise are seeded by it, so that a resumed run, or one on
        other hardware, draws what the unbroken one would have drawn.
        """
        summed, routed = self._row_loss(row, number)
        loss = summed.loss / weight if weight else summed.loss
        if routed is not None and self.router is not None:
            self.routed = self.routed or routed
            aux = share_of_aux(routed, self.routed)
            loss = loss + self.router.coefficient * aux
            self.aux_of_rows.append(aux.detach())
        if weight and loss.requires_grad:
            self._backward(loss)
        return RowSums(summed.loss.detach(), summed.nll.detach())

    def row_follows(self, follows: bool) -> None:
        """Say before each row whether another one of this step follows, in any process."""
        sum_gradients(self.lm.model, not follows, self.few)

    def idle(self, row: Row, number: tuple[int, int], weight: float) -> None:
        """Compute a row for nothing: each process must pass through the model as often as the others, and back."""
        summed, _ = self._row_loss(row, number)
        if weight:
            self._backward(summed.loss * 0.0)

    def _row_loss(self, row: Row, number: tuple[int, int]) -> tuple[Summed, Routed | None]:
        """A row's sums and what its routers did, where that is asked for."""
        seed = _seed(self.seed, *number)
        context = self.lm.context
        # Nodes of a split row that two processes compute must not be dropped alike.
        torch.manual_seed(seed if context is None else _seed(self.seed, *number, context.index))
        tree = self.lm.place(row)
        with (
            self.precision.autocast(self.lm.device),
            noisy_embedding(self.lm.embedding, tree, self.neftune_alpha, seed),
            self._reading(tree) as found,
        ):
            summed = row_loss(self.lm, tree, self.objective)
        return summed, found[0] if found else None

    @contextmanager
    def _reading(self, tree: TreeRow) -> Iterator[list[Routed]]:
        if self.router is None:
            yield []
            return
        with self.router.reading(tree) as found:
            yield found

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self, rows: Sequence[RowSums], weight: float, step: int) -> StepSums:
        """Clip and apply the gradient of the rows that were accumulated. A non-finite one is skipped and counted.

        Raises:
            Diverged: several steps in a row were not finite.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = everywhere(torch.nn.utils.get_total_norm(gradients))
        asked = [] if self.sentinels is None else self.sentinels.questions()
        sums = StepSums.read(rows, norm, self.lm.device, asked, self.ranks, self.aux_of_rows)
        finite = math.isfinite(sums.loss) and math.isfinite(sums.norm)
        if finite and self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        culprit = None if finite else self._first_bad_gradient()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(finite, sums, weight, step, culprit)
        return sums

    def discard(self) -> None:
        """Forget what was accumulated, so that an interrupted step leaves no trace."""
        self.optimizer.zero_grad(set_to_none=True)

    def _count(self, finite: bool, sums: StepSums, weight: float, step: int, culprit: str | None) -> None:
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise Diverged(
                f"step {step}: loss {sums.loss / (weight or 1.0)} and gradient norm {sums.norm} are not finite for the "
                f"{self.skipped_in_a_row}th step in a row ({culprit or 'the loss itself'}); none of them was applied. "
                "Lower lr, or use precision=bf16 or fp32"
            )

    def _first_bad_gradient(self) -> str | None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(local(parameter.grad)).all()):
                return f"first in {name}"
        return None
