"""The processes of one run: who is who, and how they tell each other things. Knows torch.distributed; no models.

Numbers that steer the run (a stop, a sum of losses) go through gloo on the CPU, so that no device is waited for;
weights and gradients go through the device's own backend. Texts go through the store that the launcher keeps, which
has no time limit: preparing data may take hours, while a collective that takes ten minutes is a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from graft.errors import ConfigError, Elsewhere, GraftError, first_line

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""Longest wait in a collective: nothing in a run that is well keeps a process from one for so long."""
PATIENCE = timedelta(days=30)
"""Wait for what another process makes before the processes are joined; if that one dies, the launcher ends us all."""
_MOMENT = timedelta(seconds=10)
"""A process that fails writes why before its connections break; how long the others look for it."""


ASKED_EVERY = 0.1
"""Seconds between two looks at what another process is to write."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands among those of its run. A lone process is the first of one, and all of this is free."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Index among the processes of this host."""
    host: int = 0
    """Index of the host."""
    on_host: int = 1
    """Processes on this host."""
    restarts: int = 0
    """How often the launcher has started all processes anew."""
    store: Store | None = None
    """Texts that all processes see; None for a lone one."""

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def from_first(self, name: str, make: Callable[[], str], per_host: bool = False) -> str:
        """The text that the first process makes, of the run or of each host; the others wait for it.

        Raises:
            Elsewhere: it could not be made; the process that tried says why.
        """
        if self.store is None:
            return make()
        key = f"{name}/{self.host}" if per_host else name
        if self.local if per_host else self.rank:
            self._await([key], PATIENCE)
            found: dict[str, str] = json.loads(self.store.get(key))
            if "failed" in found:
                raise Elsewhere(int(found["failed"]))
            return found["made"]
        try:
            made = make()
        except BaseException as error:
            code = error.exit_code if isinstance(error, GraftError) else 1
            self.store.set(key, json.dumps({"failed": str(code)}))
            raise
        self.store.set(key, json.dumps({"made": made}))
        return made

    def from_all(self, name: str, mine: str, within: timedelta) -> list[str]:
        """What every process says under a name, in the order of their ranks.

        Raises:
            GraftError: some have not said it in time; names them.
        """
        if self.store is None:
            return [mine]
        self.store.set(f"{name}/{self.rank}", mine)
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        try:
            self._await(keys, within)
        except dist.DistStoreError:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise GraftError(
                f"{name}: {len(missing)} of {self.size} processes have not answered within "
                f"{within.total_seconds():.0f} s (ranks {', '.join(map(str, missing))}); look at what they printed last"
            ) from None
        return [self.store.get(key).decode() for key in keys]

    def _await(self, keys: list[str], within: timedelta) -> None:
        """Until others have written some keys. Asked for again and again: in the store's own wait no signal is heard.

        Raises:
            DistStoreError: they have not, in this time.
            Elsewhere: a process has ended meanwhile.
        """
        assert self.store is not None
        deadline = time.monotonic() + within.total_seconds()
        while not self.store.check(keys):
            if self.store.check(["ended"]):  # it will not come: somebody has failed, and has said why
                raise Elsewhere(int(self.store.get("ended")))
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"no {', '.join(keys)} within {within.total_seconds():.0f} s")
            time.sleep(ASKED_EVERY)

    def join(self, device: torch.device) -> None:
        """Open the connections between the processes: from here on, whatever one does the others wait for.

        Raises:
            ConfigError: this torch has no backend for the device, or it could not be opened.
        """
        if self.store is None:
            return
        self.from_all("ready", "", PATIENCE)  # opening connections to one that has ended would take ten minutes
        backend = "gloo"
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore("collectives", self.store),
                rank=self.rank,
                world_size=self.size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device if device.type == "cuda" else None,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"rank {self.rank} on {socket.gethostname()}: cannot reach the other {self.size - 1} processes over "
                f"{backend} ({first_line(error)}). Where a host has several networks, GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME name the right one"
            ) from None

    def own_store(self) -> Store:
        """A connection to the store of its own, for a thread: one connection answers one caller at a time."""
        store: Any = self.store
        cloned: Store = store.clone()  # torch's stubs do not know it yet
        return cloned

    def leave(self) -> None:
        """Close the connections, when all are done with them: the store may live in the first process."""
        if self.store is not None:
            dist.barrier()
            dist.destroy_process_group()

    def sum(self, numbers: Tensor) -> Tensor:
        """The sums over all processes of some numbers on the CPU, the same to the last bit everywhere."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def least(self, number: float) -> float:
        """The smallest of a number over all processes."""
        if self.size == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return float(found)

    def counts(self, *mine: int) -> list[list[int]]:
        """Some numbers of each process, in the order of their ranks."""
        if self.size == 1:
            return [list(mine)]
        found = torch.zeros(self.size, len(mine), dtype=torch.int64)
        found[self.rank] = torch.tensor(mine)
        return [[int(number) for number in row] for row in self.sum(found).tolist()]

    @contextmanager
    def said_once(self) -> Iterator[None]:
        """What ends the run is said by one process; those that only lost it, or found the same, end quietly.

        Raises:
            Elsewhere: another process says why.
            GraftError: what this process found, or that others are gone without a word.
        """
        if self.store is None:
            yield
            return
        try:
            yield
        except Elsewhere:
            self._go()
            raise
        except GraftError as error:
            code = str(error.exit_code)
            self.store.set("ended", code)
            said = self.store.add(f"said/{hashlib.sha256(str(error).encode()).hexdigest()}", 1)
            self._go()
            if said > 1:
                raise Elsewhere(error.exit_code) from None
            raise
        except (dist.DistError, RuntimeError) as error:
            self._others_gone(error)

    def _go(self) -> None:
        """Before the first process ends, the others get a moment to read why: the store may live in it."""
        assert self.store is not None
        with suppress(dist.DistError, Elsewhere):
            if self.rank:
                self.store.set(f"gone/{self.rank}", "")
            else:
                names = [f"gone/{rank}" for rank in range(1, self.size)]
                deadline = time.monotonic() + _MOMENT.total_seconds()
                while not self.store.check(names) and time.monotonic() < deadline:
                    time.sleep(ASKED_EVERY)

    def _others_gone(self, error: Exception) -> NoReturn:
        """A connection broke: either somebody has said why, or somebody is gone without a word.

        Raises:
            Elsewhere: somebody has.
            GraftError: nobody has, and it is a connection that broke.
        """
        assert self.store is not None
        with suppress(dist.DistError):
            self._await(["ended"], _MOMENT)
            self._go()
            raise Elsewhere(int(self.store.get("ended"))) from None
        if not broken_connection(error):
            raise error
        raise GraftError(
            f"rank {self.rank} on {socket.gethostname()} has lost the other processes ({first_line(error)}): one of "
            "them has ended without a word (killed, or out of memory?), or the network between the hosts is cut. "
            "Continue from the last checkpoint with --resume"
        ) from None


def broken_connection(error: Exception) -> bool:
    """Whether an error of torch.distributed means that a process at the other end is gone or silent."""
    words = ("connection", "timed out", "timeout", "peer", "socket", "broken pipe", "nccl")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def ranks_from_environment() -> Ranks:
    """What a launcher (torchrun, or `graft train --gpus`) says of this process; a lone process where none started it.

    Raises:
        ConfigError: the launcher's store cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but no RANK says which of the {size} processes this is; start them with torchrun "
            "or graft train --gpus N, or unset WORLD_SIZE"
        )
    try:
        store, rank, size = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {size}, but the processes cannot meet ({first_line(error)}); start them with torchrun or "
            "graft train --gpus N, or unset WORLD_SIZE and RANK"
        ) from None
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(
        rank=rank,
        size=size,
        local=int(os.environ.get("LOCAL_RANK", "0")),
        host=int(os.environ.get("GROUP_RANK", str(rank // on_host))),
        on_host=on_host,
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        store=store,
    )


ALONE = Ranks()
