"""What a run keeps of itself: which checkpoints are written, when and in which thread, and which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from graft.config.train import Train
from graft.console import warn
from graft.model.files.save import live_weights, saved_weights
from graft.model.trees import TreeLM
from graft.runs import RunFolder
from graft.tokens.renderer import Renderer
from graft.train.processes.together import Here
from graft.train.saving.background import Background
from graft.train.saving.checkpoint import State, newest_checkpoint, prune
from graft.train.saving.save import Snapshot, Writer
from graft.train.saving.space import foreseen_bytes, refuse_if_run_does_not_fit

WRITING = 4 * 3600.0
"""Seconds that the first process may write a checkpoint before it counts as late."""
LARGE = 2**30
"""Bytes of a checkpoint that `save_async: auto` writes beside the run."""


class Keeper:
    """Saves one run. Whoever is done with it calls `wait`, so that no save is left in flight."""

    def __init__(
        self,
        settings: Train,
        run: RunFolder,
        lm: TreeLM,
        trained: Mapping[str, nn.Parameter],
        renderer: Renderer,
        start: Mapping[str, Tensor] | None,
        here: Here,
    ) -> None:
        """Of several processes all hold parts of what is saved, and the first one writes."""
        self.ranks, self.watchdog = here.ranks, here.watchdog
        self.saves = 0
        self.settings = settings
        self.run = run
        self.lm = lm
        self.writer = Writer(run, lm.model, renderer, start)
        self.saved: State | None = None
        """Where the newest checkpoint stands; None as long as there is none."""
        self.background = Background(self._apart(trained))

    def _apart(self, trained: Mapping[str, nn.Parameter]) -> bool:
        """Whether checkpoints are written in a thread while the run goes on."""
        if self.ranks.size > 1:  # the others wait for the one that writes: what they hold is gathered for it
            return False
        if self.settings.save_async != "auto":
            return self.settings.save_async
        size = sum(value.nbytes for value in saved_weights(self.lm.model).values())
        size += 2 * sum(parameter.nbytes for parameter in trained.values())  # AdamW's
        return self.lm.device.type != "cpu" and size > LARGE

    def refuse_if_disk_is_small(self, trained: Mapping[str, nn.Parameter], live: bool, saves: int) -> None:
        """Before the run begins; see `foreseen_bytes`.

        Raises:
            InputError: what the run will keep does not fit on the disk.
        """
        weights = live_weights(self.lm.model)  # by all: a spread model gives its parts back to ask for them
        needed = foreseen_bytes(self.settings, weights, trained, live, saves)
        self._by_first("room on the disk", lambda: refuse_if_run_does_not_fit(self.run, needed))

    def save(self, state: State, optimizer: Mapping[str, Tensor]) -> None:
        """A checkpoint of this moment, with the weights that the model has now; what need not stay goes.

        Raises:
            InputError: it, or the one before that was in flight, could not be written.
        """
        self.wait()  # at most one copy in the host's memory
        snapshot = Snapshot(state, saved_weights(self.lm.model), optimizer)
        if self.background.apart:
            snapshot = snapshot.on_host(self.lm.device)
        self.saves += 1
        self.background.do(lambda: self._by_first(f"checkpoint {self.saves}", lambda: self._write(snapshot)))

    def _write(self, snapshot: Snapshot) -> None:
        self.writer.checkpoint(snapshot)
        settings = self.settings
        whole_best = settings.patience is not None  # final/ may be made from it
        try:
            prune(self.run, settings.keep_last, snapshot.state.best_step, settings.keep_optimizer, whole_best)
        except OSError as error:  # the new one is complete; the next save tries again
            warn(f"{self.run.checkpoints}: an old checkpoint could not be deleted ({error.strerror})")

    def final(self, dtype: torch.dtype) -> None:
        """Write `final/` from the weights that the model has now.

        Raises:
            InputError: it could not be written.
        """
        self.wait()
        weights = saved_weights(self.lm.model)
        self._by_first("final", lambda: self.writer.final(dtype, weights))

    def _by_first(self, name: str, do: Callable[[], None]) -> None:
        """Let the first process do something while the others wait; what goes wrong ends all."""
        self.watchdog.beat(name, patience=WRITING)

        def made() -> str:
            do()
            return ""

        self.ranks.from_first(name, made)

    def check(self) -> None:
        """Raise what a save in the background has raised since."""
        self.background.check()

    def wait(self) -> None:
        """Until no save is in flight; raises what the last one raised."""
        self.background.wait()

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return newest_checkpoint(self.run)
