"""Checkpoints that are complete or absent: written aside, flushed, given a manifest of sizes and hashes, renamed.

    checkpoints/step-N/
        (adapter or model folder: loadable by every command and by transformers and PEFT)
        optimizer.safetensors   moments by parameter name; the average of the weights, and the live ones where others
                                are saved
        state.json              position, best validation so far, what the run is made of
        manifest.json           size and hash of every other file; written last

No pickle: tensors are safetensors, the rest is JSON.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from graft.console import warn
from graft.errors import InputError
from graft.model.save import save_model
from graft.runs import RunFolder, fsync_folder, write_atomic
from graft.tokens.renderer import Renderer

MANIFEST = "manifest.json"


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
    made_of: Mapping[str, str] = field(default_factory=dict)
    """Hash or value of everything that a resumed run must share: data, template, settings."""


def save_checkpoint(
    run: RunFolder,
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    optimizer: Mapping[str, Tensor],
    state: State,
    start: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoints/step-N; at any moment the folder is complete or not there.

    Raises:
        InputError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = run.checkpoints / f"step-{state.step}"
    aside = run.checkpoints / f".step-{state.step}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        save_model(model, renderer, aside, start=start)
        save_file(dict(optimizer), aside / "optimizer.safetensors")
        (aside / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        put_in_place(aside, final)
    except OSError as error:
        raise _cannot_save(run, final, error) from None
    except SafetensorError as error:  # how safetensors reports a full disk
        raise _cannot_save(run, final, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return final


def put_in_place(aside: Path, final: Path) -> None:
    """Flush every file of a folder, add its manifest, and rename it to where readers look for it."""
    files = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        files[path.relative_to(aside).as_posix()] = {"bytes": path.stat().st_size, "sha256": _flush_and_hash(path)}
    write_atomic(aside / MANIFEST, json.dumps({"files": files}, indent=1))
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        aside.rename(final)
        shutil.rmtree(old)
    else:
        aside.rename(final)
    fsync_folder(final.parent)


def _flush_and_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _cannot_save(run: RunFolder, wanted: Path, error: Exception) -> InputError:
    newest = newest_checkpoint(run)
    free = shutil.disk_usage(run.root).free / 2**20
    kept = f"{newest} is complete: free some space and continue with graft train --resume {run.root}"
    if newest is None:
        kept = "There is no earlier checkpoint: free some space and start again"
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return InputError(f"{wanted}: cannot be saved ({reason}; {free:.0f} MiB free). {kept}")


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The complete checkpoint with the largest step; incomplete or damaged ones are passed over, and named."""
    for path in sorted(_checkpoints(run), key=step_of, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        warn(f"{path}: {damage}; looking for an older checkpoint")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, in words; None if every byte is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (int(wanted["bytes"]), str(wanted["sha256"])) for name, wanted in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest cannot be read"
    if "state.json" not in expected or "optimizer.safetensors" not in expected:
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


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checkpoints(run: RunFolder) -> list[Path]:
    return [path for path in run.checkpoints.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def load_state(checkpoint: Path) -> tuple[State, dict[str, Tensor]]:
    """Position and optimizer tensors of a complete checkpoint."""
    state = State(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    return state, load_file(checkpoint / "optimizer.safetensors")


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
            "Undo the change, or start a new run with init_from="
            f"{checkpoint} (weights only)"
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


def prune(run: RunFolder, keep_last: int, best_step: int | None) -> None:
    """Delete old checkpoints: the newest `keep_last` and the best one stay."""
    newest = sorted(_checkpoints(run), key=step_of, reverse=True)
    for path in newest[keep_last:]:
        if step_of(path) != best_step:
            shutil.rmtree(path)
