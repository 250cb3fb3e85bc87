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
from pathlib import Path

import torch
import yaml
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from graft.config.train import Train
from graft.console import fail
from graft.errors import ConfigError, Elsewhere, Interrupted

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
        return _exit_code(error.failures)
    return 0


def _exit_code(failures: dict[int, ProcessFailure]) -> int:
    """The code with which the processes ended; those that were killed are named, since they could not speak."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    killed = {rank: code for rank, code in codes.items() if code < 0}
    said = [code for code in codes.values() if code > 0]
    for rank, code in killed.items():
        hint = "; was the host out of memory?" if code == -signal.SIGKILL else ""
        if not said:
            fail(f"rank {rank} was ended by {signal.Signals(-code).name}{hint}")
    return min(said) if said else 1
