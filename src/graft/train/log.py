"""What a run writes down and says about its steps: metrics.jsonl, trace.jsonl, the words beside the progress bar.

Knows numbers that were read from the device already; asks the device for none but its peak of memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.console import note
from graft.model.device import memory_gib
from graft.runs import RunFolder, append_jsonl, drop_last_rows
from graft.train.step import Stepper, StepSums
from graft.train.validate import Validation
from graft.types import Example, Row


@dataclass(slots=True)
class Window:
    """What was added up since the last logged step."""

    nll: float = 0.0
    objective: float = 0.0
    weight: float = 0.0
    computed: int = 0
    tokens: int = 0
    seconds: float = 0.0
    router_aux: float = 0.0
    expert_load: float = 0.0


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer step did."""

    sums: StepSums
    weight: float
    """Sum of the weights of its targets."""
    lr: float
    computed: int
    """Nodes of its trees."""
    tokens: int
    """Tokens of its examples, each counted as if it were computed alone."""
    seconds: float

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per target token; 0 for a step without targets."""
        return self.sums.nll / self.weight if self.weight else 0.0


class Log:
    """The log of one run; `window` survives in checkpoints, so that a resumed run logs the same sums."""

    def __init__(self, run: RunFolder, total_steps: int, writes: bool = True) -> None:
        """Of several processes all add up, and one writes."""
        self.writes = writes
        self.run = run
        self.total_steps = total_steps
        self.window = Window()
        self.last_val: float | None = None

    def add(self, update: Update, stepper: Stepper) -> None:
        """Take a step into the sums of the next line."""
        window = self.window
        window.objective += update.sums.loss
        window.nll += update.sums.nll
        window.weight += update.weight
        window.computed += update.computed
        window.tokens += update.tokens
        window.seconds += update.seconds
        if stepper.routed is not None:
            window.router_aux = update.sums.aux
            window.expert_load = stepper.routed.heaviest

    def write_steps(self, step: int, epoch: float, update: Update, stepper: Stepper) -> None:
        """One line for the steps since the last one."""
        window, self.window = self.window, Window()
        row: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "epoch": round(epoch, 4),
            "loss": window.nll / window.weight if window.weight else 0.0,
            "lr": update.lr,
            "grad_norm": update.sums.norm,
            "tokens_computed": window.computed,
            "tokens_trained": window.weight,
            "sharing": round(window.tokens / window.computed, 4) if window.computed else 1.0,
            "tokens_per_s": round(window.computed / window.seconds, 1) if window.seconds else 0.0,
            "memory_gib": round(memory_gib(stepper.lm.device), 3),
        }
        if not stepper.objective.plain:
            row["objective"] = window.objective / window.weight if window.weight else 0.0
        if stepper.router is not None:
            row["router_aux_loss"], row["expert_load_max"] = window.router_aux, round(window.expert_load, 3)
        if stepper.skipped:
            row["skipped"] = stepper.skipped
        self._append(self.run.metrics, _finite(row))

    def write_validation(self, step: int, found: Validation) -> None:
        """One line, and the same in words."""
        row = {"kind": "val", "step": step, "loss": found.loss, "token_accuracy": found.token_accuracy}
        self._append(self.run.metrics, _finite(row | {"tokens": found.tokens}))
        self.last_val = found.loss
        note(
            f"step {step}/{self.total_steps}: validation loss {found.loss:.4f}, "
            f"token accuracy {found.token_accuracy:.1%}"
        )

    def write_trace(self, step: int, examples: Sequence[Example], rows: Sequence[Sequence[Row]]) -> None:
        """Which conversations a step (0-based) saw, and in which rows of which rank, so that anyone can replay it."""
        ids = list(dict.fromkeys(example.conversation for example in examples))
        shapes = [
            {"rank": rank, "nodes": len(row), "conversations": list(row.conversations)}
            for rank, its in enumerate(rows)
            for row in its
        ]
        self._append(self.run.trace, {"step": step + 1, "conversations": ids, "rows": shapes})

    def _append(self, path: Path, row: dict[str, Any]) -> None:
        if self.writes:
            append_jsonl(path, row)

    def said(self, update: Update) -> str:
        """What stands beside the progress bar."""
        val = "" if self.last_val is None else f"  val {self.last_val:.4f}"
        return f"loss {update.loss:.4f}{val}"

    def drop_after(self, step: int) -> None:
        """What was logged after the checkpoint will be logged again."""
        for path in (self.run.metrics, self.run.trace):
            if self.writes and path.is_file():
                drop_last_rows(path, lambda row: 0 < step >= row.get("step", math.inf))


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as text: JSON has neither, and another reader must not choke on the line that matters most."""
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
