"""A run in memory, step by step: what is loaded, what an update does, when it is validated, logged and saved.

validate -> (rows -> gradient -> update -> log, validate, save)* -> final folder
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from graft.config.train import Train
from graft.console import Advance, note, progress, warn
from graft.errors import Diverged, GraftError, Interrupted
from graft.model.device import pick_precision, prepare_device, reset_peak_memory
from graft.model.files.load import load_weights
from graft.model.processes.shard import local
from graft.model.router import RouterWatch
from graft.model.tuned.adapters import count_weights, trainable
from graft.runs import RunFolder, write_atomic
from graft.train.costs.rows import look_at_rows
from graft.train.environment import describe_environment
from graft.train.formats import trained_in
from graft.train.load import check_context, load_for_training, longest_example
from graft.train.log import Log, Update, Window
from graft.train.open_run import say_other_environment, write_settings
from graft.train.prepare import Prepared
from graft.train.processes.ahead import Ahead
from graft.train.processes.share import MyRows, beside_others, rows_of_rank
from graft.train.processes.together import Here
from graft.train.processes.watchdog import FIRST
from graft.train.saving.checkpoint import State, find_damage, load_state, set_aside_after
from graft.train.saving.keeper import WRITING, Keeper
from graft.train.saving.rehearse import piece_of, rehearse_save
from graft.train.sentinels import Sentinels, Step
from graft.train.signals import Stop
from graft.train.tuning import embeddings_of, make_stepper
from graft.train.updates.average import EMA, LIVE, Average, live_tensors, load_live
from graft.train.updates.in_backward import refuse_steps_of_several_rows
from graft.train.updates.optim import (
    load_optimizer_state,
    make_optimizer,
    optimizer_numbers,
    optimizer_state,
    set_learning_rate,
)
from graft.train.updates.schedule import learning_rate
from graft.train.validate import Stopped, validate
from graft.words import counted


class Fit:
    """A run in memory: the model, its optimiser and where they stand."""

    def __init__(
        self, settings: Train, run: RunFolder, prepared: Prepared, here: Here, checkpoint: Path | None = None
    ) -> None:
        """Load the model and, for a resumed run, put everything back to where its checkpoint was."""
        self.settings = settings
        self.run = run
        self.prepared = prepared
        self.ranks, self.watchdog = here.ranks, here.watchdog
        self.total_steps = prepared.plan.total_steps
        prepare_device(here.device)
        self.precision = trained_in(settings, pick_precision(settings.precision, here.device))
        ready = load_for_training(settings, self.precision, here.device, checkpoint, prepared, here.ranks)
        self.lm, self.final_dtype, self.start = ready.lm, ready.final_dtype, ready.start
        check_context(self.lm, settings.model, longest_example(prepared))
        as_most = self.lm.merges == settings.trees and not self.lm.long_texts.differ
        if settings.optimizer_in_backward and not as_most:  # its rows are others than those that were looked at
            refuse_steps_of_several_rows(prepared.plan, prepared.train, settings.row_budget, self.lm.rows, merge=False)
        self.parameters = trainable(self.lm.model)
        self.optimizer = make_optimizer(self.parameters, embeddings_of(self.lm, settings), settings)
        self.stepper = make_stepper(self.lm, self.parameters, self.optimizer, self.precision, settings, here.ranks)
        asked = settings.router_aux_loss
        if asked is not None:
            self.stepper.router = RouterWatch(self.lm, None if asked == "auto" else asked)
        free = settings.optimizer == "schedule_free_adamw"
        self.average = Average(self.parameters, self.optimizer, settings.ema, free)
        self.ahead = Ahead(prepared, self.lm, settings.row_budget, here.ranks)
        self.state = State(step=0, made_of=prepared.made_of)
        self.log = Log(run, self.total_steps, writes=here.ranks.first)
        vocabulary = next(self.lm.embedding.parameters()).shape[0]
        self.sentinels = Sentinels(self.parameters, vocabulary, here.ranks.first)
        self.stepper.sentinels = self.sentinels
        self.keeper = Keeper(settings, run, self.lm, self.parameters, prepared.renderer, self.start, here)
        saves = 3 + sum(self.total_steps // every for every in self._intervals())  # each validation may be the best
        self.keeper.refuse_if_disk_is_small(self.parameters, self._keeps_live, saves)
        if checkpoint is not None:
            self._restore(checkpoint)
        if here.ranks.first:  # not before: a resume that was refused must leave the folder as it was
            self._write_what_it_is(resumed=checkpoint is not None)
        self.val_examples = prepared.val.examples(range(len(prepared.val)))
        self._say_what_is_trained()

    def _write_what_it_is(self, resumed: bool) -> None:
        """config.yaml and environment.json."""
        write_settings(self.settings, self.run)
        self.log.drop_after(self.state.step)
        found = {
            "counts": self.prepared.counts, "thinking": self.prepared.thinking, "processes": self.ranks.size,
        }  # fmt: skip
        environment = describe_environment(self.lm.device, self.prepared.made_of) | found
        if resumed:
            say_other_environment(self.run, environment)
        write_atomic(self.run.environment, json.dumps(environment, indent=1, ensure_ascii=False))

    def rehearse_saving(self) -> None:
        """Save and load what has not been trained yet, so that a folder which would not serve is found out now."""
        if self.state.step > 0:
            return
        (first, *_) = self.prepared.train.examples(self.prepared.plan.step(0))
        (row,) = self.lm.rows([piece_of(first)], self.settings.row_budget)
        self.watchdog.beat("a rehearsal of saving", patience=WRITING)
        rehearse_save(self.keeper.writer, self.lm, self.parameters, self.settings, self.precision, row, self.ranks)

    def rehearse(self, stop: threading.Event) -> None:
        """Compute the plan's heaviest rows first and forget them, so that memory runs out now or never.

        Changes no number of the run: the gradient is discarded, and the generators and the mode are put back. Where the
        backward pass updates the weights there is nothing to discard, so nothing is rehearsed.
        """
        if self.state.step >= self.total_steps or not self.stepper.revocable:
            return
        device = self.lm.device
        training = self.lm.model.training
        self.lm.model.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for row in look_at_rows(self.prepared, self.settings.row_budget, self.lm).heaviest:
                if self.ranks.any(stop.is_set()):  # the loop sees it too, and saves
                    break
                self.watchdog.beat("a rehearsal of the heaviest row", FIRST)
                self.stepper.count_experts(MyRows([row], [], len(row)), self.state.step)  # forgets those of another row
                self.stepper.accumulate(row, (self.state.step, 0), 1.0)
                self.stepper.discard()
        self.lm.model.train(training)
        reset_peak_memory(device)  # the log's peak is that of the steps

    def run_to_the_end(self, stop: Stop) -> None:
        """The steps that are left, and the final folder. However it ends, no save is in flight afterwards."""
        try:
            with progress("training", self.total_steps, self.state.step) as advance:
                self.loop(stop, advance)
            self.finish()
        except Diverged as error:
            with contextlib.suppress(GraftError):
                self.keeper.wait()
            last = self.keeper.newest() or "the base model"
            raise Diverged(f"{error}. The last good checkpoint is {last}") from None
        finally:
            with contextlib.suppress(GraftError):  # what ended the run is what is said
                self.keeper.wait()

    def loop(self, stop: threading.Event, advance: Advance) -> None:
        """Update by update to the end of the plan."""
        eval_every, save_every = self._intervals()
        if self.state.step == 0 or self.state.unvalidated:
            better = self._validate(stop)
            if better or (self.state.step == 0 and self.settings.patience is not None):
                self.save()  # the untrained weights may turn out to be the best
        self.lm.model.train()
        while self.state.step < self.total_steps and not self._out_of_patience():
            self.keeper.check()
            update = None if self.ranks.any(stop.is_set()) else self._update(self.state.step, stop)
            if update is None:
                self._stop_here()
            applied = self.stepper.skipped == self.state.skipped
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                skipped=self.stepper.skipped,
                skipped_in_a_row=self.stepper.skipped_in_a_row,
            )
            done = self.state.step == self.total_steps
            advance(1, self.log.said(update))
            if self.state.step % self.settings.log_every == 0 or done:
                epoch = self.prepared.plan.epoch_at(self.state.step)
                self.log.write_steps(self.state.step, epoch, update, self.stepper)
            seen = Step(self.state.step, update.loss, update.sums.norm, update.weight, applied)
            self.sentinels.judge(seen, update.sums.answers)
            better = False
            if self.state.step % eval_every == 0 or done:
                better = self._validate(stop)
            if self.state.step % save_every == 0 or better or done:
                self.save()

    def _intervals(self) -> tuple[int, int]:
        """Steps between validations, and between checkpoints."""
        eval_every = self.settings.eval_every or max(1, math.ceil(self.total_steps / 10))
        return eval_every, self.settings.save_every or eval_every

    def finish(self) -> None:
        """Write `final/`: the last weights, or with `patience` the best ones."""
        self.keeper.wait()
        self._refuse_if_not_finite()
        if self.stepper.skipped >= self.total_steps:
            raise Diverged(
                f"all {self.total_steps} steps were skipped because they were not finite: nothing was learnt"
            )
        best = self.state.best_step
        if self.settings.patience is not None and best is not None and best != self.state.step:
            damage = self.ranks.from_first("the best checkpoint", lambda: self._damage_of(best) or "")
            if damage:
                warn(f"{damage}; final/ holds the last weights instead of the best")
            else:
                note(f"final/ holds the weights of step {best}, which had the best validation loss")
                self._go_back(self.run.checkpoints / f"step-{best}")
        self.average.keep()
        self.keeper.final(self.final_dtype)
        if self.stepper.skipped:
            warn(f"{self.stepper.skipped} of {self.total_steps} steps were skipped because they were not finite")

    def _damage_of(self, step: int) -> str | None:
        checkpoint = self.run.checkpoints / f"step-{step}"
        damage = find_damage(checkpoint) if checkpoint.is_dir() else "is not there"
        return damage and f"{checkpoint}, which had the best validation loss: {damage}"

    def save(self) -> None:
        """A checkpoint of this moment; older ones than `keep_last` go, never the best."""
        if self.keeper.saved == self.state:  # a stop right after a save
            return
        self._refuse_if_not_finite()
        tensors = optimizer_state(self.optimizer, self.parameters) | self.average.tensors()
        if self._keeps_live:
            tensors |= live_tensors(self.parameters)
        state = replace(
            self.state,
            optimizer=optimizer_numbers(self.optimizer, self.parameters),
            scaler=self.stepper.scaler.state_dict(),
            window=asdict(self.log.window),
            sentinels=self.sentinels.state(),
        )
        with self.average.judged():
            self.keeper.save(state, tensors)
        self.keeper.saved = self.state

    @property
    def _keeps_live(self) -> bool:
        """Whether a folder's weights are not those that training goes on with, which are then kept beside them."""
        return self.average.differs or self.start is not None

    def _update(self, step: int, stop: threading.Event) -> Update | None:
        """One optimizer step over the conversations of the plan; None where a stop was asked for before it was made."""
        started = time.perf_counter()
        budget = self.settings.row_budget
        patience = None if self.sentinels.updates else FIRST
        self.watchdog.beat(f"step {step + 1}", patience)
        made = self.ahead.take(step)
        examples, weight = made.examples, made.weight
        mine = beside_others(self.lm, made.rows, examples, budget, self.ranks)
        lr = learning_rate(step, self.total_steps, self.settings)
        set_learning_rate(self.optimizer, lr)
        of_rows = []
        self.stepper.count_experts(mine, step)
        count = len(mine.rows) + len(mine.idle)
        for index, row in enumerate(mine.rows):
            self.stepper.row_follows(index + 1 < count)
            of_rows.append(self.stepper.accumulate(row, (step, mine.number_of(index)), weight))
            self.watchdog.beat(f"step {step + 1}, row {index + 1}", patience)
            if stop.is_set() and self.stepper.revocable and self.ranks.size == 1:
                break
        for index, row in enumerate(mine.idle, len(mine.rows)):
            self.stepper.row_follows(index + 1 < count)
            self.stepper.idle(row, (step, 0), weight)
            self.watchdog.beat(f"step {step + 1}, row {index + 1}", patience)
        if self.stepper.revocable and self.ranks.any(stop.is_set()):
            self.stepper.discard()
            return None
        skipped = self.stepper.skipped
        sums = self.stepper.update(of_rows, weight, step + 1)
        if self.stepper.skipped == skipped:
            self.average.follow()
        update = Update(sums, weight, lr, mine.nodes, made.tokens, time.perf_counter() - started)
        self.log.add(update, self.stepper)
        if self.settings.trace and self.ranks.first:
            others = [
                rows_of_rank(self.lm, examples, budget, self.ranks, rank) if rank % self.lm.row_ranks == 0 else []
                for rank in range(1, self.ranks.size)
            ]
            self.log.write_trace(step, examples, [mine.rows, *others])
        return update

    def _validate(self, stop: threading.Event) -> bool:
        """Validate and log; whether this is the best so far."""
        if not self.val_examples:
            return False
        self.state = replace(self.state, unvalidated=True)
        try:
            with self.average.judged():
                budget = self.settings.row_budget
                found = validate(
                    self.lm, self.val_examples, budget, self.precision, stop, self.ranks, self.watchdog.beat
                )
        except Stopped:
            self._stop_here()
        self.state = replace(self.state, unvalidated=False)
        self.log.write_validation(self.state.step, found)
        best = self.state.best_loss
        better = math.isfinite(found.loss) and (best is None or found.loss < best)
        if better:
            self.state = replace(self.state, best_loss=found.loss, best_step=self.state.step, bad_validations=0)
        else:
            self.state = replace(self.state, bad_validations=self.state.bad_validations + 1)
        return better and self.state.step > 0

    def _out_of_patience(self) -> bool:
        patience = self.settings.patience
        if patience is None or self.state.bad_validations < patience:
            return False
        note(
            f"stopping early: no better validation loss than {self.state.best_loss:.4f} for "
            f"{counted(patience, 'validation')}"
        )
        return True

    def _refuse_if_not_finite(self) -> None:
        """No checkpoint of spoilt weights may push out a good one.

        Raises:
            Diverged: a trained weight is NaN or infinite.
        """
        bad = next((name for name, p in self.parameters.items() if not bool(torch.isfinite(local(p)).all())), None)
        if self.ranks.any(bad is not None):
            raise Diverged(
                f"step {self.state.step}: {bad or 'a weight'} is no longer finite, so nothing of it is saved. Lower lr "
                f"(now {self.settings.peak_lr}) and start again"
            )

    def _stop_here(self) -> NoReturn:
        self.save()
        self.keeper.wait()
        raise Interrupted(
            f"stopped after step {self.state.step} of {self.total_steps}; checkpoint saved. "
            f"Continue with: graft train --resume {self.run.root}"
        )

    def _restore(self, checkpoint: Path) -> None:
        state, tensors = load_state(checkpoint)
        self._load_tensors(tensors, state.optimizer)
        if state.best_step is not None and self.settings.patience is not None and self.ranks.first:
            damage = self._damage_of(state.best_step)
            if damage is not None:
                warn(f"{damage}; final/ will hold better weights than those only if the run finds some")
        self.state = self.keeper.saved = state
        self.sentinels.load(state.sentinels)
        if isinstance(self.settings.resume, str) and self.ranks.first:
            set_aside_after(self.run, state.step)
        self.stepper.skipped = state.skipped
        self.stepper.skipped_in_a_row = state.skipped_in_a_row
        self.log.window = Window(**state.window)
        if state.scaler:
            self.stepper.scaler.load_state_dict(dict(state.scaler))
        note(f"resuming after step {state.step} of {self.total_steps}")

    def _go_back(self, checkpoint: Path) -> None:
        """The weights of an earlier moment of this run, live and averaged."""
        state, tensors = load_state(checkpoint)
        if self.start is None:
            load_weights(self.lm.model, checkpoint)
        self._load_tensors(tensors, state.optimizer)

    def _load_tensors(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        of_optimizer = {name: value for name, value in tensors.items() if not name.startswith((LIVE, EMA))}
        load_optimizer_state(self.optimizer, self.parameters, of_optimizer, numbers)
        load_live(self.parameters, tensors)
        self.average.load(tensors)

    def _say_what_is_trained(self) -> None:
        trained = sum(p.numel() for p in self.parameters.values())
        total = count_weights(self.lm.model)
        why_not = self.lm.why_not or "trees are switched off"
        how = "on token trees" if self.lm.merges else f"one example per row, since {why_not}"
        over = "" if self.settings.quantize == "none" else f" over a base in {self.settings.quantize}"
        note(
            f"{self.settings.method}: {trained:,} of {total:,} parameters{over}, "
            f"{self.precision.compute} on {self.lm.device}, {how}; {counted(self.total_steps, 'step')}"
        )
