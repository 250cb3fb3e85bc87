"""The processes of a run look at each other before the first step: same versions, recipe, data and weights, all alive.

What differs would not fail: it would train something that nobody asked for, or hang in the first collective.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from graft.config.train import Train
from graft.console import table, warn
from graft.errors import ConfigError, first_line
from graft.model.device import free_bytes
from graft.model.processes.ranks import Ranks
from graft.train.environment import PACKAGES, device_label, package_version
from graft.version import __version__

WITHIN = timedelta(seconds=60)
"""Everybody must answer, and a first sum must be made, in this time."""
SHARED_MEMORY_GIB = 1.0
"""NCCL's processes of one host talk through /dev/shm; containers often have 64 MiB of it."""


def recipe_of(settings: Train) -> dict[str, str]:
    """Every setting by its dotted name; where the run lies and whether it is resumed do not count."""
    return dict(_flat(settings.model_dump(mode="json", exclude={"out", "resume"})))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def look_at_each_other(
    ranks: Ranks, device: torch.device, recipe: Mapping[str, str], made_of: Mapping[str, str]
) -> None:
    """Compare the processes, sum one number through every connection, and show who takes part.

    `recipe` is what this process was told to do (`recipe_of`).

    Raises:
        ConfigError: two processes differ in what must be equal, or the sum is wrong or does not come in time.
        GraftError: a process does not answer.
    """
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": device_label(device),
        "free": round(free_bytes(device) / 2**30, 1),
        "shared memory": _shared_memory_gib(),
        "told": _other_settings(ranks, recipe),
        "equal": _must_be_equal(made_of),
    }
    said = [json.loads(text) for text in ranks.from_all("preflight", json.dumps(mine), WITHIN)]
    _refuse_differences(said, "told")
    _refuse_differences(said, "equal")
    _sum_in_time(ranks, device)
    _show(said)


def _must_be_equal(made_of: Mapping[str, str]) -> dict[str, str]:
    versions = {name: str(package_version(name)) for name in PACKAGES}
    return {"graft": __version__, "python": platform.python_version(), **versions, **made_of}


def _other_settings(ranks: Ranks, recipe: Mapping[str, str]) -> dict[str, str]:
    """What this process was told otherwise than the first one; that one shows all, to be compared with."""
    first: dict[str, str] = json.loads(ranks.from_first("recipe", lambda: json.dumps(dict(recipe))))
    return {name: value for name, value in recipe.items() if ranks.first or first.get(name) != value}


def _refuse_differences(said: Sequence[Mapping[str, Any]], kind: str) -> None:
    for rank, its in enumerate(said):
        for key, found in its[kind].items():
            wanted = said[0][kind].get(key)
            if found != wanted and not _is_place(key, wanted, found):
                raise ConfigError(
                    f"the processes differ in {key}: rank 0 on {said[0]['host']} has {wanted}, rank {rank} on "
                    f"{its['host']} has {found}; make them equal (same command, recipe, files and packages everywhere)"
                )


def _is_place(key: str, wanted: str | None, found: str) -> bool:
    """Where the model lies may differ from host to host; its weights have a hash of their own."""
    return key in ("model", "init_from") and wanted is not None and Path(wanted).name == Path(found).name


def _sum_in_time(ranks: Ranks, device: torch.device) -> None:
    for where in dict.fromkeys((torch.device("cpu"), device)):
        number = torch.full((1,), float(ranks.rank + 1), device=where)
        wanted = ranks.size * (ranks.size + 1) / 2
        try:
            work = dist.all_reduce(number, async_op=True)
            if work is not None:
                work.wait(WITHIN)
        except RuntimeError as error:
            raise ConfigError(
                f"rank {ranks.rank} on {socket.gethostname()}: no sum over {ranks.size} processes on {where} within "
                f"{WITHIN.total_seconds():.0f} s ({first_line(error)}). Where a host has several networks, "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the right one"
            ) from None
        if float(number) != wanted:
            raise ConfigError(
                f"rank {ranks.rank}: the sum of 1 to {ranks.size} over {where} came out as {float(number):g}, "
                f"not {wanted:g}; its connection cannot be trusted"
            )


def _show(said: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        [str(rank), its["host"], str(its["pid"]), its["device"], f"{its['free']} GiB"] for rank, its in enumerate(said)
    ]
    table(f"{len(said)} processes", ["rank", "host", "pid", "device", "free memory"], rows, text=["host", "device"])
    for rank, its in enumerate(said):
        shared = its["shared memory"]
        if "cpu" not in its["device"] and shared is not None and shared < SHARED_MEMORY_GIB:
            warn(
                f"rank {rank} on {its['host']}: /dev/shm has {shared:.2f} GiB; NCCL may fail below "
                f"{SHARED_MEMORY_GIB:g} GiB. Start the container with a larger --shm-size"
            )
            break


def _shared_memory_gib() -> float | None:
    folder = Path("/dev/shm")  # noqa: S108
    return shutil.disk_usage(folder).total / 2**30 if folder.is_dir() else None
