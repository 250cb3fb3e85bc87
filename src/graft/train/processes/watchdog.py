"""A run of several processes does not hang: whoever is late or gone is named, and all end.

Each process has a thread that says every few seconds how far its main thread is. The first process's thread compares.
A process that says nothing is gone; one that stays behind while the others wait is late, and shows where it stands.
Whatever is done between two beats must take as long in every process, or have its own patience.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from graft.console import fail
from graft.model.processes.ranks import Ranks

TICK = 3.0
"""Seconds between two signs of life."""
SILENT = 60.0
"""Seconds without one after which a process is gone."""
LATE = 100.0
"""Seconds for which the others wait for a process that is behind, unless steps are longer: then thrice the longest."""
LOADING = 2 * 3600.0
"""The same while weights are loaded, which large ones on a slow disk take long for."""
FIRST = 600.0
"""The same in the first step: kernels are compiled, memory is mapped."""
NOTICED = 20
"""Seconds within which a launcher that is well has noticed that its process has ended; it looks ten times a second."""
WAITS_IN = ("torch/distributed", "graft/model/processes/ranks.py")
"""Files in whose functions a process waits for others."""


@dataclass(slots=True)
class _Seen:
    """What the first process knows of another one."""

    text: str = ""
    changed: float = field(default_factory=time.monotonic)
    """When it last said something new."""
    count: int = -1
    since: float = field(default_factory=time.monotonic)
    """When its main thread last went on."""


class Watchdog:
    """One process's signs of life; in the first process also the judge of all."""

    def __init__(self, ranks: Ranks, checkpoints: Path) -> None:
        """Begin to watch; a lone process is not watched. `checkpoints` decides the exit code: 5 where there is one."""
        self.ranks = ranks
        self.checkpoints = checkpoints
        self._count = 0
        self._doing = "loading"
        self._patience: float | None = LOADING
        self._longest = 0.0
        self._last = time.monotonic()
        self._unanswered = 0
        """How often the second thread has woken up since the store answered the first one."""
        self._over = threading.Event()
        self._seen = [_Seen() for _ in range(ranks.size)]
        self._main = threading.main_thread().ident
        if ranks.store is not None:
            # A store answers one caller at a time, and the main thread may wait in it for hours.
            store = ranks.own_store()
            threading.Thread(target=self._watch, args=(store,), name="watchdog", daemon=True).start()
            threading.Thread(target=self._watch_the_store, name="watchdog of the store", daemon=True).start()

    def beat(self, doing: str, patience: float | None = None) -> None:
        """Say what the main thread begins to do; `patience` is for what only one process does, while others wait."""
        now = time.monotonic()
        if self._patience is None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        self._doing, self._patience = doing, patience
        self._count += 1

    def rest(self) -> None:
        """The run is over; silence is no longer a fault."""
        self._over.set()

    def _watch(self, store: Store) -> None:
        tick = 0
        while tick == 0 or not self._over.wait(TICK):
            tick += 1
            with suppress(dist.DistError):  # the store's host is gone, or about to be
                self._say(store, tick)
                if store.check(["watchdog/verdict"]):
                    self._leave()
                if self.ranks.first:
                    self._judge(store)
                else:
                    self._look_at_first(store)
                self._unanswered = 0

    def _watch_the_store(self) -> None:
        """Where a cable is cut no error comes: whoever asked the store would wait for its answer for ten minutes."""
        while not self._over.wait(TICK):
            self._unanswered += 1  # no clock: a process that was stopped for a while has not waited
            if self._unanswered * TICK > SILENT:
                who = f"rank {self.ranks.rank} on {socket.gethostname()}"
                self._end(None, f"{who} has had no answer from the host of the first process for {SILENT:.0f} s")

    def _say(self, store: Store, tick: int) -> None:
        mine = {
            "tick": tick, "count": self._count, "doing": self._doing, "patience": self._patience,
            "longest": self._longest, "who": f"rank {self.ranks.rank} on {socket.gethostname()} (pid {os.getpid()})",
        }  # fmt: skip
        store.set(f"watchdog/{self.ranks.rank}", json.dumps(mine))
        if store.check(["watchdog/show"]) and not store.check([f"watchdog/stack/{self.ranks.rank}"]):
            store.set(f"watchdog/stack/{self.ranks.rank}", json.dumps(self._stacks()))

    def _stacks(self) -> dict[str, object]:
        """Where the threads stand, and whether one of them waits for another process."""
        waits = False
        main = ""
        for ident, frame in sys._current_frames().items():
            if ident == threading.get_ident():
                continue
            frames = traceback.extract_stack(frame)
            waits = waits or any(part in call.filename for call in frames[-8:] for part in WAITS_IN)
            if ident == self._main:
                main = "".join(traceback.format_list(frames[-6:]))
        return {"waits": waits, "stack": main}

    def _judge(self, store: Store) -> None:
        names = [f"watchdog/{rank}" for rank in range(self.ranks.size)]
        now = time.monotonic()
        known = [rank for rank, name in enumerate(names) if store.check([name])]
        texts = dict(zip(known, store.multi_get([names[rank] for rank in known]), strict=True))
        said = {rank: json.loads(text) for rank, text in texts.items()}
        for rank, seen in enumerate(self._seen):
            text = texts.get(rank, b"").decode()
            if text != seen.text:
                seen.text, seen.changed = text, now
            count = said[rank]["count"] if rank in said else -1
            if count != seen.count:
                seen.count, seen.since = count, now
            if now - seen.changed > SILENT:
                last = f", last seen {said[rank]['doing']}" if rank in said else ""
                who = said[rank]["who"] if rank in said else f"rank {rank}"
                self._end(store, f"{who} has been silent for {now - seen.changed:.0f} s{last}")
        behind = self._behind(said, now)
        if behind:
            self._end(store, self._named(store, behind, said))

    def _behind(self, said: dict[int, dict[str, object]], now: float) -> list[int]:
        """Ranks for which the others have waited too long; all of them where all stand at the same place."""
        if len(said) < self.ranks.size:
            return []
        least = min(seen.count for seen in self._seen)
        behind = [rank for rank, seen in enumerate(self._seen) if seen.count == least]
        limit = max(LATE, 3 * max(float(str(its["longest"])) for its in said.values()))
        patience = [said[rank]["patience"] for rank in behind if said[rank]["patience"] is not None]
        limit = max([limit, *(float(str(given)) for given in patience)])
        return behind if now - max(seen.since for seen in self._seen) > limit else []

    def _named(self, store: Store, behind: Sequence[int], said: dict[int, dict[str, object]]) -> str:
        """Ask everybody where they stand; those who wait for others are not to blame."""
        store.set("watchdog/show", "")
        store.set(f"watchdog/stack/{self.ranks.rank}", json.dumps(self._stacks()))
        shown: dict[int, dict[str, object]] = {}
        deadline = time.monotonic() + 4 * TICK
        while len(shown) < self.ranks.size and time.monotonic() < deadline:
            time.sleep(TICK / 4)
            for rank in range(self.ranks.size):
                if rank not in shown and store.check([f"watchdog/stack/{rank}"]):
                    shown[rank] = json.loads(store.get(f"watchdog/stack/{rank}"))
        if len(behind) == self.ranks.size:
            behind = [rank for rank in behind if not shown.get(rank, {}).get("waits", False)]
        if not behind:
            return "every process waits for the others: the network between them stands still"
        lines = []
        for rank in behind[:4]:
            stack = str(shown.get(rank, {}).get("stack", "it does not show where\n"))
            lines.append(f"{said[rank]['who']} does not go on ({said[rank]['doing']}), and the others wait:\n{stack}")
        return "\n".join(lines).rstrip()

    def _look_at_first(self, store: Store) -> None:
        """The judge may be gone itself."""
        seen, now = self._seen[0], time.monotonic()
        text = store.get("watchdog/0").decode() if store.check(["watchdog/0"]) else ""
        if text != seen.text:
            seen.text, seen.changed = text, now
        if now - seen.changed > SILENT + 4 * TICK:
            self._end(store, f"rank 0 has been silent for {now - seen.changed:.0f} s")

    def _end(self, store: Store | None, why: str) -> None:
        """End all processes of the run; this one says why."""
        told = 0
        if store is None:
            _end_a_launcher_that_hangs()
        else:
            with suppress(dist.DistError):
                told = store.add("watchdog/told", 1)
                store.set("watchdog/verdict", why)
        if told <= 1:
            fail(f"{why}\nThe run is ended. {self._next_step()}")
        if self.ranks.first:
            time.sleep(2 * TICK)  # the store may live in this process: let the others read it
        self._leave()

    def _next_step(self) -> str:
        run = self.checkpoints.parent
        return (
            f"Continue with: graft train --resume {run}" if self._saved() else "There is no checkpoint yet: start again"
        )

    def _saved(self) -> bool:
        return any(self.checkpoints.glob("step-*"))

    def _leave(self) -> None:
        os._exit(5 if self._saved() else 1)


def _end_a_launcher_that_hangs() -> None:
    """End torch's launcher too, where it does not notice that this process ends.

    On a host that is cut off it asks the rendezvous for news, and waits for the answer as long as TCP does (15
    minutes), deaf to SIGTERM; nothing above it would learn that the run is over. Then this process is never reaped.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        wait = f"sleep {NOTICED}; kill -0 {os.getpid()} 2>/dev/null && kill -KILL {os.getppid()}"
        subprocess.Popen(  # noqa: S603 (two numbers of our own)
            ["/bin/sh", "-c", wait],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
