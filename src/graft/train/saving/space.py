"""Whether the disk has room: for everything that a run will keep, before it begins, and for each save.

Speaks bytes. Knows how large the tensors of a checkpoint are before the first one is written.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from graft.config.train import Train
from graft.errors import InputError
from graft.model.processes.shard import local
from graft.runs import RunFolder

SMALL_FILES = 2**20
"""Settings, state and manifest of a checkpoint, at the least; a tokenizer comes on top."""
STATE_BYTES = {
    "adamw": 8, "adamw_8bit": 2, "adafactor": 0, "muon": 4, "lion": 4, "schedule_free_adamw": 8, "galore": 0,
    "apollo": 0, "sgd": 0,
}  # fmt: skip
"""Bytes of an optimizer's state per trained number, at the least: what is foreseen must not stop a run that fits."""


def foreseen_bytes(
    settings: Train, weights: Mapping[str, Tensor], trained: Mapping[str, nn.Parameter], live: bool, saves: int
) -> int:
    """Bytes of all checkpoints and `final/` when the run has the most of them, one half-written.

    Args:
        settings: how many are kept.
        weights: what a folder is written from.
        trained: what the optimizer has states of.
        live: whether the live weights are saved beside others.
        saves: most checkpoints that the run will write.
    """
    folder = sum({local(value).data_ptr(): value.nbytes for value in weights.values()}.values()) + SMALL_FILES
    numbers = sum(parameter.numel() for parameter in trained.values())
    per_number = STATE_BYTES[settings.optimizer] + (0 if settings.ema is None else 4)
    state = numbers * per_number + (sum(parameter.nbytes for parameter in trained.values()) if live else 0)
    kept = min(settings.keep_last + 2, max(1, saves))  # the best one, and the one that is being written
    states = kept if settings.keep_optimizer is None else min(kept, settings.keep_optimizer + 1)
    return kept * folder + states * state + folder


def refuse_if_run_does_not_fit(run: RunFolder, needed: int) -> None:
    """Before the first step; what a resumed run has on disk already counts as there.

    Raises:
        InputError: the disk has less room than the run's checkpoints will take.
    """
    there = sum(p.stat().st_size for folder in (run.checkpoints, run.final) for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(run.root).free
    if needed - there > free:
        raise InputError(
            f"{run.root}: the run's checkpoints and final/ will take {_shown(needed - there)} more, {_shown(free)} are "
            "free there. Free some space, choose out=DIR on another disk, or keep less: keep_last=1, keep_optimizer=1"
        )


def refuse_if_full(folder: Path, needed: int) -> None:
    """Before a save.

    Raises:
        OSError: as the disk would say it in the middle of the save, with both numbers.
    """
    free = shutil.disk_usage(folder).free
    if needed + SMALL_FILES > free:
        raise OSError(f"it takes {_shown(needed + SMALL_FILES)}, {_shown(free)} are free")


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


OF_DISK = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def explained_disk_errors(run: RunFolder) -> Iterator[None]:
    """A disk that is full or broken, wherever the run meets it, becomes a message.

    Raises:
        InputError: names the file and what the system said.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in OF_DISK:
            raise
        free = shutil.disk_usage(run.root).free
        raise InputError(
            f"{error.filename or run.root}: cannot be written ({error.strerror}; {_shown(free)} free). Nothing that "
            f"was saved is lost: free some space, or mend the disk, and continue with graft train --resume {run.root}"
        ) from None
