"""Several processes of one run on this host, by torch's own launcher. Knows commands and exit codes; no training.

`graft train --gpus N` starts N times `python -m graft train` here; runs over several hosts are started by torchrun
itself (docs/scaling.md).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from graft.config.train import Train
from graft.console import fail
from graft.errors import ConfigError, Elsewhere, Interrupted
from graft.runs import RunFolder

SAVING_SECONDS = 600
"""How long processes that were asked to stop may take to save; torch's launcher would kill them after 30 s."""


def launch(processes: int, settings: Train) -> int:
    """Run `graft train` with some settings in several processes; returns their exit code.

    Raises:
        ConfigError: there are fewer accelerators than processes.
        Elsewhere: a signal ended it; what was saved is said by the processes.
    """
    if settings.device != "cpu" and torch.accelerator.is_available() and processes > torch.accelerator.device_count():
        raise ConfigError(
            f"--gpus {processes}, but there are {torch.accelerator.device_count()}; lower it, or use device=cpu"
        )
    # What torch's launcher says of a failed process is its own bookkeeping; the process has said what was wrong.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="graft",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        shutdown_timeout=SAVING_SECONDS,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(yaml.safe_dump(settings.model_dump(mode="json"), allow_unicode=True), encoding="utf-8")
            elastic_launch(config, sys.executable)("-m", "graft", "train", str(recipe))
    except SignalException:  # the processes have said what was saved
        raise Elsewhere(Interrupted.exit_code) from None
    except ChildFailedError as error:
        return _exit_code({rank: failure.exitcode for rank, failure in error.failures.items()}, settings.out)
    return 0


def _exit_code(codes: Mapping[int, int], out: str | None) -> int:
    """The code of a run whose processes ended so, by rank; those that were killed are named: they could not speak.

    torch's launcher ends the others when one has failed, so their SIGTERM, and what they make of it, says nothing.
    """
    said = [code for code in codes.values() if code in (2, 3, 4)]
    if said:
        return min(said)
    saved = out is not None and any(RunFolder(Path(out)).checkpoints.glob("step-*"))
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    if killed:
        names = ", ".join(f"rank {rank} by {signal.Signals(number).name}" for rank, number in killed.items())
        hint = "; was the host out of memory?" if signal.SIGKILL in killed.values() else ""
        there = f". Continue with: graft train --resume {out}" if saved else ". There is no checkpoint: start again"
        fail(f"ended from outside: {names}{hint}{there}")
    return 5 if saved else 1
