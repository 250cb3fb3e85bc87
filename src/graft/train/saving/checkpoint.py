"""Checkpoints that are complete or absent, as they are found, judged, read and thrown away. save.py writes them.

    checkpoints/step-N/
        (adapter or model folder: loadable by every command and by transformers and PEFT)
        optimizer.safetensors   moments by parameter name; the average of the weights, and the live ones where others
                                are saved. Older checkpoints may have lost it (keep_optimizer)
        state.json              position, best validation so far, what the run is made of
        manifest.json           size and hash of every other file; written last

No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from graft.config.train import Train
from graft.console import note, warn
from graft.errors import InputError
from graft.runs import RunFolder, read_manifest, write_manifest
from graft.words import counted

OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands, beside its tensors."""

    step: int
    """Updates done."""
    best_loss: float | None = None
    best_step: int | None = None
    skipped_in_a_row: int = 0
    bad_validations: int = 0
    """Validations since the best one."""
    unvalidated: bool = False
    """A validation was due at this step and was cut short by a stop; the resumed run makes it first."""
    skipped: int = 0
    """Steps that were skipped because they were not finite."""
    window: Mapping[str, Any] = field(default_factory=dict)
    """What was added up since the last logged step."""
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's numbers, by parameter or group."""
    scaler: Mapping[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scaler."""
    sentinels: Mapping[str, Any] = field(default_factory=dict)
    """What the sentinels remember of the steps before."""
    made_of: Mapping[str, str] = field(default_factory=dict)
    """Hash or value of everything that a resumed run must share: data, template, settings."""


def newest_checkpoint(run: RunFolder, to_resume: bool = False) -> Path | None:
    """The complete checkpoint with the largest step; incomplete or damaged ones are passed over, and named.

    `to_resume` also passes over those that have lost their optimizer's state.
    """
    for path in checkpoints(run):
        damage = find_damage(path)
        if damage is None and to_resume and not has_optimizer(path):
            damage = "has its weights only (keep_optimizer)"
        if damage is None:
            return path
        warn(f"{path}: {damage}; looking for an older checkpoint")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, in words; None if every byte is as it was written."""
    expected = read_manifest(folder)
    if expected is None:
        return "its manifest cannot be read"
    if STATE not in expected:
        return "its manifest does not name its files"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, it was written with {size}"
        if _hash(path) != digest:
            return f"{name} has changed since it was written"
    return None


def has_optimizer(checkpoint: Path) -> bool:
    """Whether a run can go on from it exactly."""
    return OPTIMIZER in (read_manifest(checkpoint) or {})


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints(run: RunFolder) -> list[Path]:
    """The run's checkpoints, newest first; complete or not."""
    found = [path for path in run.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def load_state(checkpoint: Path) -> tuple[State, dict[str, Tensor]]:
    """Position and optimizer tensors of a complete checkpoint."""
    return read_state(checkpoint), load_file(checkpoint / OPTIMIZER)


def read_state(checkpoint: Path) -> State:
    """Position of a complete checkpoint."""
    return State(**json.loads((checkpoint / STATE).read_text(encoding="utf-8")))


def decisive(settings: Train) -> dict[str, str]:
    """The settings that decide the course of a run. Those that only decide what is watched or kept are left out."""
    decides = settings.model_dump(
        mode="json",
        include={
            "encode", "split", "method", "lora", "peft", "freeze", "new_tokens", "quantize", "master_weights",
            "precision", "batch_size", "epochs", "max_steps", "seed",
            "lr", "lr_patterns", "schedule", "decay", "power", "warmup", "min_lr_ratio", "weight_decay", "optimizer",
            "optimizer_options", "optimizer_in_backward", "beta1", "beta2", "eps", "clip", "loss", "label_smoothing",
            "neftune_alpha", "ema", "router_aux_loss",
        },
    )  # fmt: skip
    decides["encode"]["template"] = _place(settings.encode.template) if settings.encode.template else None
    places = {
        "model": _place(settings.model),
        "init_from": _place(settings.init_from) if settings.init_from else "None",
    }
    return {key: str(value) for key, value in decides.items()} | places


def _place(name: str) -> str:
    """A folder wherever it is named from; a hub's id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def refuse_changed_settings(run: RunFolder, settings: Train) -> None:
    """What `refuse_if_changed` would refuse of the settings, before the data is read.

    Raises:
        InputError: names every difference.
    """
    named = [Path(settings.resume)] if isinstance(settings.resume, str) else checkpoints(run)
    for checkpoint in named:
        try:
            saved = read_state(checkpoint).made_of
        except (OSError, ValueError, TypeError):  # torn; whoever goes on from it says so
            continue
        refuse_if_changed(checkpoint, saved, decisive(settings))
        return


def refuse_if_changed(checkpoint: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """A resumed run must be the same run.

    Raises:
        InputError: names every difference.
    """
    changed = [key for key in now if str(saved.get(key)) != now[key]]  # None: not a setting yet
    if changed:
        differences = "; ".join(text for key in changed for text in _differences(key, saved.get(key), now[key]))
        raise InputError(
            f"{checkpoint}: cannot be resumed, since the run has changed: {differences}. "
            f"Undo the change, or start a new run with --init-from {checkpoint} (weights only)"
        )


def _differences(key: str, was: str | None, now: str) -> list[str]:
    """What changed, in words; of a group of settings only those that did (`lora.r`)."""
    try:
        old, new = ast.literal_eval(str(was)), ast.literal_eval(now)
    except (ValueError, SyntaxError):  # a name, a path, a hash
        old = new = None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [f"{key} was {was}, is {now}"]
    both = dict.fromkeys([*old, *new])
    return [f"{key}.{k} was {old.get(k)}, is {new.get(k)}" for k in both if old.get(k) != new.get(k)]


def refuse_without_optimizer(checkpoint: Path) -> None:
    """A checkpoint that is named to go on from must be whole, and have the optimizer's state.

    Raises:
        InputError: it is damaged, or holds weights only.
    """
    damage = find_damage(checkpoint)
    if damage is not None:
        raise InputError(f"{checkpoint}: {damage}; resume from another checkpoint of the run, or its newest with RUN")
    if not has_optimizer(checkpoint):
        raise InputError(
            f"{checkpoint}: has its weights only, since keep_optimizer let its optimizer state go; resume from a newer "
            f"checkpoint, or start a new run with --init-from {checkpoint} (weights only)"
        )


def prune(run: RunFolder, keep_last: int, best_step: int | None, keep_optimizer: int | None, whole_best: bool) -> None:
    """Delete old checkpoints: the newest `keep_last` and the best one stay.

    All but the newest `keep_optimizer` lose their optimizer's state; not the best one where it is `whole_best`. The
    manifest is changed before the file goes, so that the checkpoint is complete at any moment.
    """
    for path in checkpoints(run)[keep_last:]:
        if step_of(path) != best_step:
            shutil.rmtree(path)
    left = checkpoints(run)
    for path in left[keep_optimizer or len(left) :]:
        file = path / OPTIMIZER
        if not file.is_file() or (whole_best and step_of(path) == best_step):
            continue
        files = read_manifest(path)
        if files is not None:
            write_manifest(path, {name: wanted for name, wanted in files.items() if name != OPTIMIZER})
            file.unlink()


def clear_up(run: RunFolder) -> None:
    """Put right what a crash in the middle of a save left: what was being replaced goes back, what was half is gone."""
    for old in (*run.checkpoints.glob(".step-*.old"), *run.root.glob(".final.old")):
        final = old.with_name(old.name[1:].removesuffix(".old"))
        if not final.exists() and read_manifest(old) is not None:
            old.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    for half in (*run.checkpoints.glob(".step-*.tmp"), *run.root.glob(".*.tmp")):
        if half.is_dir():
            shutil.rmtree(half, ignore_errors=True)
        else:
            half.unlink(missing_ok=True)


def set_aside_after(run: RunFolder, step: int) -> None:
    """Move newer checkpoints than the one that is gone on from out of the way; nothing of them is lost."""
    newer = [path for path in checkpoints(run) if step_of(path) > step]
    if newer:
        aside = run.checkpoints / f"after-step-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in newer:
            path.rename(aside / path.name)
        note(f"{counted(len(newer), 'newer checkpoint')} set aside in {aside}")
