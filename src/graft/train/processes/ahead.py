"""What a step needs before it can be computed: its examples, and this process's rows of them.

Of several processes each makes those of the next step in a thread, while it computes the step at hand: a step of a
thousand processes has ten thousand conversations to be dealt. Knows the plan and the encoded data; no weights.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from graft.model.processes.ranks import Ranks
from graft.model.trees import TreeLM
from graft.tokens.tree import total_weight
from graft.train.prepare import Prepared
from graft.train.processes.share import prices_of, rows_of_rank
from graft.types import Example, Row


@dataclass(frozen=True, slots=True)
class Made:
    """Of one step."""

    examples: list[Example]
    """Of all processes."""
    rows: list[Row]
    """Of this process."""
    weight: float
    """Of all targets."""
    tokens: int
    """Of all examples, each counted as if it were computed alone."""


class Ahead:
    """Makes steps in the order in which they are taken, with several processes the next one before it is asked for."""

    def __init__(self, prepared: Prepared, lm: TreeLM, row_tokens: int, ranks: Ranks) -> None:
        self.prepared = prepared
        self.lm = lm
        self.row_tokens = row_tokens
        self.ranks = ranks
        self._thread = ThreadPoolExecutor(1, "graft-ahead")
        self._next: tuple[int, Future[Made]] | None = None
        if ranks.size > 1:
            prices_of(lm)  # now: while a step is computed its modules' weights come and go

    def take(self, step: int) -> Made:
        """What a step (0-based) needs. No other thread may take one meanwhile."""
        waiting, self._next = self._next, None
        made = waiting[1].result() if waiting is not None and waiting[0] == step else self._make(step)
        if self.ranks.size > 1 and step + 1 < self.prepared.plan.total_steps:
            self._next = step + 1, self._thread.submit(self._make, step + 1)
        return made

    def _make(self, step: int) -> Made:
        examples = self.prepared.train.examples(self.prepared.plan.step(step))
        rows = rows_of_rank(self.lm, examples, self.row_tokens, self.ranks, self.ranks.rank)
        return Made(examples, rows, total_weight(examples), sum(len(example.ids) for example in examples))
