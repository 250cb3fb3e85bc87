"""How a checkpoint is written: aside, read back and compared with memory, flushed, given its manifest, renamed.

    snapshot (state; weights, optimizer: tensors by name) --write--> .step-N.tmp --compare--> manifest --> step-N

At any byte the folder is complete or not there, and the older ones are untouched. No pickle: tensors are safetensors,
the rest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from graft.errors import GraftError, InputError, first_line
from graft.model.files.save import find_fault, save_model
from graft.model.files.tensor_file import find_difference, write_mapping
from graft.runs import RunFolder, fsync_folder, write_manifest
from graft.tokens.renderer import Renderer
from graft.train.saving.checkpoint import OPTIMIZER, STATE, State, newest_checkpoint
from graft.train.saving.space import refuse_if_full


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of a run, as it goes to disk."""

    state: State
    weights: Mapping[str, Tensor]
    """What the folder is written from, by `saved_weights`."""
    optimizer: Mapping[str, Tensor]
    """Moments, averages and live weights, on the host."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those that are tied counted once."""
        tensors = (*self.weights.values(), *self.optimizer.values())
        return sum({value.data_ptr(): value.nbytes for value in tensors}.values())

    def on_host(self, device: torch.device) -> Snapshot:
        """A copy that nothing changes any more, in the host's memory; tied tensors are one still.

        Of another device than the CPU the optimizer's tensors are copies already.
        """
        copies: dict[tuple[int, torch.Size], Tensor] = {}

        def copied(value: Tensor) -> Tensor:
            key = (value.data_ptr(), value.shape)
            if key not in copies:
                # `copy=True` also where it is on the host already: the run goes on while this is written.
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]

        return Snapshot(
            self.state,
            {name: copied(value) for name, value in self.weights.items()},
            self.optimizer if device.type != "cpu" else {n: copied(value) for n, value in self.optimizer.items()},
        )


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes the checkpoints and the final folder of one run."""

    run: RunFolder
    model: PreTrainedModel | PeftModel
    renderer: Renderer
    start: Mapping[str, Tensor] | None
    """What an adapter began as, where that was subtracted from the base."""

    def checkpoint(self, snapshot: Snapshot) -> Path:
        """Write checkpoints/step-N.

        Raises:
            InputError: the disk is full or cannot be written, or what was written is not what was to be; older
                checkpoints are untouched.
        """
        final = self.run.checkpoints / f"step-{snapshot.state.step}"
        with self._aside(final) as aside:
            refuse_if_full(self.run.root, snapshot.nbytes)
            aside.mkdir(parents=True)
            save_model(self.model, self.renderer, aside, start=self.start, weights=snapshot.weights)
            write_mapping(aside / OPTIMIZER, snapshot.optimizer)
            (aside / STATE).write_text(json.dumps(asdict(snapshot.state), indent=1), encoding="utf-8")
            fault = find_fault(aside, self.model, start=self.start, weights=snapshot.weights)
            _refuse_if(fault or find_difference([aside / OPTIMIZER], snapshot.optimizer))
            put_in_place(aside, final)
        return final

    def final(self, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> None:
        """Write final/ from weights of `saved_weights`; a full model's in `dtype`.

        Raises:
            InputError: as for a checkpoint.
        """
        with self._aside(self.run.final) as aside:
            save_model(self.model, self.renderer, aside, dtype, self.start, weights)
            _refuse_if(find_fault(aside, self.model, dtype, self.start, weights))
            put_in_place(aside, self.run.final)

    @contextmanager
    def _aside(self, final: Path) -> Iterator[Path]:
        aside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
        except Exception as error:
            reason = _of_disk(error)
            if reason is None:
                raise
            raise self._cannot_save(final, reason) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _cannot_save(self, wanted: Path, reason: str) -> InputError:
        newest = newest_checkpoint(self.run, to_resume=True)
        free = shutil.disk_usage(self.run.root).free / 2**20
        kept = f"{newest} is complete: free some space and continue with graft train --resume {self.run.root}"
        if newest is None:
            kept = "There is no earlier checkpoint: free some space and start again"
        return InputError(f"{wanted}: cannot be saved ({reason}; {free:.0f} MiB free). {kept}")


class NotAsInMemory(GraftError):
    """What was read back is not what was to be saved. Reaches the user inside of an InputError."""


def _refuse_if(fault: str | None) -> None:
    if fault is not None:
        raise NotAsInMemory(f"what was written differs from what is in memory: {fault}")


def _of_disk(error: Exception) -> str | None:
    """What the disk said; None for an error that is not the disk's. Rust's libraries put the system's into words."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error)
    if isinstance(error, SafetensorError | NotAsInMemory) or "os error" in str(error):
        return first_line(error)
    return None


def put_in_place(aside: Path, final: Path) -> None:
    """Flush every file of a folder, add its manifest, and rename it to where readers look for it.

    A folder that is replaced is kept beside until the new one is in its place; `clear_up` puts it back after a crash.
    """
    files = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        files[path.relative_to(aside).as_posix()] = (path.stat().st_size, _flush_and_hash(path))
    write_manifest(aside, files)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            aside.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
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
