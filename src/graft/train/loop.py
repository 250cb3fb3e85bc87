"""A training run from settings to final folder, in the order in which things happen.

prepare data -> load model -> validate -> (rows -> gradient -> update -> log, validate, save)* -> final folder
"""

from __future__ import annotations

import datetime
import json
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor

from graft.config.train import Train, load_train
from graft.console import Advance, note, progress, warn
from graft.errors import Diverged, InputError, Interrupted
from graft.model.adapters import trainable
from graft.model.device import memory_gib, pick_device, pick_precision, prepare_device, reset_peak_memory
from graft.model.load import load_weights
from graft.model.router import RouterWatch
from graft.model.save import save_model
from graft.runs import RunFolder, append_jsonl, make_writable, new_run_folder, read_jsonl, write_atomic
from graft.tokens.tree import sharing, total_weight
from graft.train.average import EMA, LIVE, Average, live_tensors, load_live
from graft.train.checkpoint import (
    State,
    load_state,
    newest_checkpoint,
    prune,
    put_in_place,
    refuse_if_changed,
    save_checkpoint,
)
from graft.train.environment import describe_environment
from graft.train.foresee import explained_out_of_memory, foresee, is_small
from graft.train.formats import refuse_base, trained_in
from graft.train.in_backward import refuse_steps_of_several_rows
from graft.train.load import check_context, load_for_training, longest_example
from graft.train.optim import (
    load_optimizer_state,
    make_optimizer,
    optimizer_numbers,
    optimizer_state,
    set_learning_rate,
)
from graft.train.prepare import Prepared, prepare
from graft.train.rows import look_at_rows
from graft.train.schedule import learning_rate
from graft.train.signals import stop_requests
from graft.train.tuning import check_tuning, embeddings_of, make_stepper
from graft.train.validate import Stopped, validate


def train(settings: Train) -> RunFolder:
    """Run to the end, or to where a signal stops it; returns the run folder with `final/` in it.

    Raises:
        GraftError: the settings, data or model cannot serve, the run diverged, or was interrupted (all saved).
    """
    check_tuning(settings)
    refuse_base(settings)
    settings, run = open_run(settings)
    prepared = prepare(settings, run)
    if settings.optimizer_in_backward:
        refuse_steps_of_several_rows(prepared.plan, prepared.train, settings.row_budget, settings.trees)
    settings = foresee(settings, prepared)
    with explained_out_of_memory(settings, prepared):
        fit = Fit(settings, run, prepared)
        with stop_requests() as stop, progress("training", prepared.plan.total_steps, fit.state.step) as advance:
            try:
                if not is_small(settings, prepared):
                    fit.rehearse(stop)
                fit.loop(stop, advance)
            except Diverged as error:
                raise Diverged(
                    f"{error}. The last good checkpoint is {newest_checkpoint(run) or 'the base model'}"
                ) from None
        fit.finish()
    return run


def open_run(settings: Train) -> tuple[Train, RunFolder]:
    """The run folder and every effective setting; a resumed run keeps its date and its rows.

    Raises:
        InputError: the folder cannot be written, holds another run, or holds none to resume.
    """
    name = f"{Path(settings.model).name}-{Path(settings.data[0].path).stem}"
    run = new_run_folder(settings.out, name)
    if run.begun() and not settings.resume:
        raise InputError(f"{run.root}: holds a run already; continue it with resume=true, or choose another out=DIR")
    if not run.exists() and any((run.root / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{run.root}: holds a model; choose another out=DIR, so that no file of it is touched")
    if settings.resume and not run.exists():
        raise InputError(f"{run.root}: there is no run to resume; start it without resume=true")
    make_writable(run.root)
    if settings.resume:
        settings = _as_begun(settings, load_train(run.config))
    effective = {
        "out": str(run.root),
        "lr": settings.peak_lr,
        "row_tokens": "auto" if settings.row_tokens == "auto" else settings.row_budget,
    }
    return with_date(settings).model_copy(update=effective), run


def _as_begun(settings: Train, begun: Train) -> Train:
    """What a run found out when it began, it keeps: its date, and the rows that fitted then."""
    date = begun.encode.date or settings.encode.date
    row_tokens = begun.row_tokens if settings.row_tokens == "auto" else settings.row_tokens
    encode = settings.encode.model_copy(update={"date": date})
    return settings.model_copy(update={"encode": encode, "row_tokens": row_tokens})


def with_date(settings: Train) -> Train:
    """The settings with today's date for templates, where none is given."""
    date = settings.encode.date or datetime.datetime.now().astimezone().date().isoformat()
    return settings.model_copy(update={"encode": settings.encode.model_copy(update={"date": date})})


def write_settings(settings: Train, run: RunFolder) -> None:
    """config.yaml with every effective value; it is a recipe too, and names files so that it serves from anywhere."""
    saved = settings.model_dump(mode="json", exclude={"resume"})
    files = [(source, "path") for source in (*saved["data"], *saved["val"], *saved["test"])]
    for holder, key in (*files, (saved, "model"), (saved, "init_from"), (saved["encode"], "template")):
        holder[key] = _from_anywhere(holder[key])
    write_atomic(run.config, yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))


def _from_anywhere(name: str | None) -> str | None:
    """The absolute path of a file, a folder or a part of one (`FILE#PART`); any other name as it is."""
    if name is None or Path(name).exists():
        return name and str(Path(name).resolve())
    file, sign, part = name.rpartition("#")
    return f"{Path(file).resolve()}{sign}{part}" if file and Path(file).exists() else name


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

    loss: float
    lr: float
    grad_norm: float
    """Before clipping."""


class Fit:
    """A run in memory: the model, its optimiser and where they stand."""

    def __init__(self, settings: Train, run: RunFolder, prepared: Prepared) -> None:
        """Load the model and, for a resumed run, put everything back to where its newest checkpoint was."""
        self.settings = settings
        self.run = run
        self.prepared = prepared
        self.total_steps = prepared.plan.total_steps
        device = pick_device(settings.device)
        prepare_device(device)
        self.precision = trained_in(settings, pick_precision(settings.precision, device))
        checkpoint = newest_checkpoint(run) if settings.resume else None
        ready = load_for_training(settings, self.precision, device, checkpoint, prepared)
        self.lm, self.final_dtype, self.start = ready.lm, ready.final_dtype, ready.start
        check_context(self.lm, settings.model, longest_example(prepared))
        self.parameters = trainable(self.lm.model)
        self.optimizer = make_optimizer(self.parameters, embeddings_of(self.lm, settings), settings)
        self.stepper = make_stepper(self.lm, self.parameters, self.optimizer, self.precision, settings)
        asked = settings.router_aux_loss
        if asked is not None:
            self.stepper.router = RouterWatch(self.lm, None if asked == "auto" else asked)
        free = settings.optimizer == "schedule_free_adamw"
        self.average = Average(self.parameters, self.optimizer, settings.ema, free)
        self.state = State(step=0, made_of=prepared.made_of)
        self.window = Window()
        self.last_val: float | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        write_settings(settings, run)  # not before: a resume that was refused must leave the folder as it was
        self._drop_metrics_after(self.state.step)
        self.val_examples = prepared.val.examples(range(len(prepared.val)))
        found = {"counts": prepared.counts, "thinking": prepared.thinking}
        environment = describe_environment(device, prepared.made_of) | found
        write_atomic(run.environment, json.dumps(environment, indent=1, ensure_ascii=False))
        self._say_what_is_trained()

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
                if stop.is_set():  # the loop sees it too, and saves
                    break
                self.stepper.count_experts([row], self.state.step)  # forgets those of another row
                self.stepper.accumulate(row, (self.state.step, 0), 1.0)
                self.stepper.discard()
        self.lm.model.train(training)
        reset_peak_memory(device)  # the log's peak is that of the steps

    def loop(self, stop: threading.Event, advance: Advance) -> None:
        """Update by update to the end of the plan."""
        eval_every = self.settings.eval_every or max(1, math.ceil(self.total_steps / 10))
        save_every = self.settings.save_every or eval_every
        if self.state.step == 0 or self.state.unvalidated:
            better = self._validate(stop)
            if better or (self.state.step == 0 and self.settings.patience is not None):
                self.save()  # the untrained weights may turn out to be the best
        self.lm.model.train()
        while self.state.step < self.total_steps and not self._out_of_patience():
            update = self._update(self.state.step, stop)
            if update is None:
                self._stop_here()
            self.state = replace(
                self.state,
                step=self.state.step + 1,
                skipped=self.stepper.skipped,
                skipped_in_a_row=self.stepper.skipped_in_a_row,
            )
            done = self.state.step == self.total_steps
            advance(1, self._said(update))
            if self.state.step % self.settings.log_every == 0 or done:
                self._log(update)
            better = False
            if self.state.step % eval_every == 0 or done:
                better = self._validate(stop)
            if self.state.step % save_every == 0 or better or done:
                self.save()

    def finish(self) -> None:
        """Write `final/`: the last weights, or with `patience` the best ones."""
        self._refuse_if_not_finite()
        if self.stepper.skipped >= self.total_steps:
            raise Diverged(
                f"all {self.total_steps} steps were skipped because they were not finite: nothing was learnt"
            )
        best = self.state.best_step
        if self.settings.patience is not None and best is not None and best != self.state.step:
            note(f"final/ holds the weights of step {best}, which had the best validation loss")
            self._go_back(self.run.checkpoints / f"step-{best}")
        self.average.keep()
        aside = self.run.root / ".final.tmp"
        try:
            save_model(self.lm.model, self.prepared.renderer, aside, self.final_dtype, self.start)
            put_in_place(aside, self.run.final)
        except OSError as error:
            raise InputError(
                f"{self.run.final}: cannot be saved ({error.strerror}); free some space and resume"
            ) from None
        if self.stepper.skipped:
            warn(f"{self.stepper.skipped} of {self.total_steps} steps were skipped because they were not finite")

    def save(self) -> None:
        """A checkpoint of this moment; older ones than `keep_last` go, never the best."""
        self._refuse_if_not_finite()
        tensors = optimizer_state(self.optimizer, self.parameters) | self.average.tensors()
        if (
            self.average.differs or self.start is not None
        ):  # the folder's weights are not those that training goes on with
            tensors |= live_tensors(self.parameters)
        state = replace(
            self.state,
            optimizer=optimizer_numbers(self.optimizer, self.parameters),
            scaler=self.stepper.scaler.state_dict(),
            window=asdict(self.window),
        )
        with self.average.judged():
            save_checkpoint(self.run, self.lm.model, self.prepared.renderer, tensors, state, self.start)
        prune(self.run, self.settings.keep_last, self.state.best_step)

    def _update(self, step: int, stop: threading.Event) -> Update | None:
        """One optimizer step over the conversations of the plan; None where a stop was asked for before it was made."""
        started = time.perf_counter()
        examples = self.prepared.train.examples(self.prepared.plan.step(step))
        rows = self.lm.rows(examples, self.settings.row_budget)
        weight = total_weight(examples)
        lr = learning_rate(step, self.total_steps, self.settings)
        set_learning_rate(self.optimizer, lr)
        of_rows = []
        self.stepper.count_experts(rows, step)
        for number, row in enumerate(rows):
            of_rows.append(self.stepper.accumulate(row, (step, number), weight))
            if stop.is_set() and self.stepper.revocable:
                self.stepper.discard()
                return None
        skipped = self.stepper.skipped
        sums = self.stepper.update(of_rows, weight, step + 1)
        if self.stepper.skipped == skipped:
            self.average.follow()
        shared = sharing(examples, rows)
        self.window.objective += sums.loss
        self.window.nll += sums.nll
        self.window.weight += weight
        self.window.computed += shared.nodes
        self.window.tokens += shared.tokens
        if self.stepper.routed is not None:
            self.window.router_aux = self.stepper.aux
            self.window.expert_load = self.stepper.routed.heaviest
        self.window.seconds += time.perf_counter() - started
        if self.settings.trace:
            self._trace(step, examples, rows)
        return Update(sums.nll / weight if weight else 0.0, lr, sums.norm)

    def _validate(self, stop: threading.Event) -> bool:
        """Validate and log; whether this is the best so far."""
        if not self.val_examples:
            return False
        self.state = replace(self.state, unvalidated=True)
        try:
            with self.average.judged():
                found = validate(self.lm, self.val_examples, self.settings.row_budget, self.precision, stop)
        except Stopped:
            self._stop_here()
        self.state = replace(self.state, unvalidated=False)
        row = {"kind": "val", "step": self.state.step, "loss": found.loss, "token_accuracy": found.token_accuracy}
        append_jsonl(self.run.metrics, _finite(row | {"tokens": found.tokens}))
        self.last_val = found.loss
        note(
            f"step {self.state.step}/{self.total_steps}: validation loss {found.loss:.4f}, "
            f"token accuracy {found.token_accuracy:.1%}"
        )
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
        note(f"stopping early: no better validation loss than {self.state.best_loss:.4f} for {patience} validations")
        return True

    def _said(self, update: Update) -> str:
        """What stands beside the progress bar."""
        val = "" if self.last_val is None else f"  val {self.last_val:.4f}"
        return f"loss {update.loss:.4f}{val}"

    def _log(self, update: Update) -> None:
        """One line for the steps since the last one."""
        window, self.window = self.window, Window()
        row: dict[str, Any] = {
            "kind": "train",
            "step": self.state.step,
            "epoch": round(self.prepared.plan.epoch_at(self.state.step), 4),
            "loss": window.nll / window.weight if window.weight else 0.0,
            "lr": update.lr,
            "grad_norm": update.grad_norm,
            "tokens_computed": window.computed,
            "tokens_trained": window.weight,
            "sharing": round(window.tokens / window.computed, 4) if window.computed else 1.0,
            "tokens_per_s": round(window.computed / window.seconds, 1) if window.seconds else 0.0,
            "memory_gib": round(memory_gib(self.lm.device), 3),
        }
        if not self.stepper.objective.plain:
            row["objective"] = window.objective / window.weight if window.weight else 0.0
        if self.stepper.router is not None:
            row["router_aux_loss"], row["expert_load_max"] = window.router_aux, round(window.expert_load, 3)
        if self.stepper.skipped:
            row["skipped"] = self.stepper.skipped
        append_jsonl(self.run.metrics, _finite(row))

    def _trace(self, step: int, examples: Any, rows: Any) -> None:
        ids = list(dict.fromkeys(example.conversation for example in examples))
        shapes = [{"rank": 0, "nodes": len(row), "conversations": list(row.conversations)} for row in rows]
        append_jsonl(self.run.trace, {"step": step + 1, "conversations": ids, "rows": shapes})

    def _refuse_if_not_finite(self) -> None:
        """No checkpoint of spoilt weights may push out a good one.

        Raises:
            Diverged: a trained weight is NaN or infinite.
        """
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                raise Diverged(
                    f"step {self.state.step}: {name} is no longer finite, so nothing of it is saved. Lower lr "
                    f"(now {self.settings.peak_lr}) and start again"
                )

    def _stop_here(self) -> NoReturn:
        self.save()
        raise Interrupted(
            f"stopped after step {self.state.step} of {self.total_steps}; checkpoint saved. "
            f"Continue with: graft train --resume {self.run.root}"
        )

    def _restore(self, checkpoint: Path) -> None:
        state, tensors = load_state(checkpoint)
        refuse_if_changed(checkpoint, state.made_of, self.prepared.made_of)
        self._load_tensors(tensors, state.optimizer)
        self.state = state
        self.stepper.skipped = state.skipped
        self.stepper.skipped_in_a_row = state.skipped_in_a_row
        self.window = Window(**state.window)
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

    def _drop_metrics_after(self, step: int) -> None:
        """What was logged after the checkpoint will be logged again."""
        for path in (self.run.metrics, self.run.trace):
            if path.is_file():
                kept = [row for row in read_jsonl(path) if step and row.get("step", step + 1) <= step]
                write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def _say_what_is_trained(self) -> None:
        trained = sum(p.numel() for p in self.parameters.values())
        total = sum(p.numel() for p in self.lm.model.parameters())
        how = "on token trees" if self.lm.on_trees else f"one example per row, since {self.lm.why_not}"
        note(
            f"{self.settings.method}: {trained:,} of {total:,} parameters, "
            f"{self.precision.compute} on {self.lm.device}, {how}; {self.total_steps} steps"
        )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as text: JSON has neither, and another reader must not choke on the line that matters most."""
    return {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
