"""The journal: every request that began and how it ended, one line each, so that no paid answer is ever lost.

    {"journal": 1, "plan": {...}}                             first: what shapes the requests
    {"asked": KEY, "stage": ..., "up_to": [in, out]}          an attempt begins
    {"answer": KEY, "text": ..., "usage": [in, out], ...}     it ended with an answer, on disk before it is used
    {"lost": KEY, "why": ..., "usage": [in, out]}             it ended without one, and was or may have been paid
    {"free": KEY, "why": ...}                                 it ended without one, and cost nothing
    {"failed": KEY, "why": ...}                               the request is given up

Appended to and never rewritten. Killed at any byte: a torn last line is cut off at the next start, and an attempt that
began and never ended counts as paid. Speaks of keys and replies; knows no network.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.synth.budget import Usage
from graft.data.synth.client import Reply
from graft.errors import InputError

VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """How a request ended."""

    reply: Reply | None
    why: str = ""
    """Why there is no reply."""


class Journal:
    """An open journal. One process at a time: a second one would ask everything twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.plan: dict[str, Any] | None = None
        """The plan of the first start; None where this is it."""
        self.used: list[Usage] = []
        """What each attempt of earlier starts used."""
        self.cut = 0
        """Attempts of earlier starts that were cut off in flight."""
        self.flawed: list[int] = []
        """Lines that cannot be read, beside a torn last one."""
        self.answered_before = 0
        self._open: dict[str, list[Usage]] = {}
        self._synced = 0
        """Bytes of the file that are known to be on disk."""
        self._syncing: asyncio.Task[None] | None = None
        self._lines = self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
        try:
            _lock(self._file, path)
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Note the plan; called at the first start, and again when it was changed on purpose."""
        self._append({"journal": VERSION, "plan": plan})

    def asked(self, key: str, stage: str, up_to: Usage) -> None:
        """An attempt begins."""
        self._append({"asked": key, "stage": stage, "up_to": [up_to.prompt, up_to.completion]})

    def answer(self, key: str, stage: str, reply: Reply) -> Entry:
        """The request is answered. Safe from the end of this process at once, from that of the machine by `on_disk`."""
        row: dict[str, Any] = {"answer": key, "stage": stage, "text": reply.text, "finish": reply.finish}
        row |= {name: getattr(reply, name) for name in ("reasoning", "refusal", "id") if getattr(reply, name)}
        self._append(row | _usage_row(reply.usage))
        entry = self.entries[key] = Entry(reply)
        return entry

    async def on_disk(self) -> None:
        """Until all that was appended so far is on disk. Who waits at the same time shares one fsync: on a slow disk
        one for each answer would be the limit of a fast endpoint.
        """
        wanted = self._size
        while self._synced < wanted:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.create_task(self._sync())
            await asyncio.shield(self._syncing)

    async def _sync(self) -> None:
        size = self._size
        try:
            await asyncio.to_thread(os.fsync, self._file)
        except OSError as error:
            raise self._unwritable(error) from None
        self._synced = size

    def lost(self, key: str, why: str, usage: Usage) -> None:
        """An attempt was, or may have been, paid for nothing."""
        self._append({"lost": key, "why": why} | _usage_row(usage))

    def free(self, key: str, why: str) -> None:
        """An attempt ended and cost nothing."""
        self._append({"free": key, "why": why})

    def failed(self, key: str, why: str) -> Entry:
        """The request is given up: it will not be sent again by a later start."""
        self._append({"failed": key, "why": why})
        entry = self.entries[key] = Entry(None, why)
        return entry

    def close(self) -> None:
        """Put everything on disk and let go of the file."""
        os.fsync(self._file)
        os.close(self._file)

    def _append(self, row: Mapping[str, Any]) -> None:
        data = json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        end = self._size + len(data)
        try:
            while data:  # a full disk takes a part, and then fails
                data = data[os.write(self._file, data) :]
        except OSError as error:
            os.ftruncate(self._file, self._size)  # the answers still in flight are written behind whole lines
            raise self._unwritable(error) from None
        self._size = end
        self._lines += 1

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written ({error.strerror}); make room and start again")

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, self._size)
                    break
                self._size += len(line)
                self._lines = number
                try:
                    self._take(json.loads(line))
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                    self.flawed.append(number)
        for open_attempts in self._open.values():
            self.used += open_attempts
            self.cut += len(open_attempts)
        self.answered_before = sum(entry.reply is not None for entry in self.entries.values())
        if self._lines and self.plan is None:
            raise InputError(f"{self.path}: is no journal of graft data synth (line 1); choose another --out")

    def _take(self, row: Mapping[str, Any]) -> None:
        if "journal" in row:
            if row["journal"] != VERSION:
                raise InputError(f"{self.path}: was written by another version of graft; finish it with that one")
            self.plan = dict(row["plan"])
        elif "asked" in row:
            prompt, completion = row["up_to"]
            self._open.setdefault(row["asked"], []).append(Usage(int(prompt), int(completion), estimated=True))
        elif "answer" in row:
            usage = _read_usage(row)
            self._end(row["answer"], usage)
            more = {name: str(row.get(name, "")) for name in ("reasoning", "refusal", "id")}
            reply = Reply(str(row["text"]), str(row["finish"]), usage, **more)
            self.entries[row["answer"]] = Entry(reply)
        elif "lost" in row:
            self._end(row["lost"], _read_usage(row))
        elif "free" in row:
            self._end(row["free"], None)
        else:
            self.entries[row["failed"]] = Entry(None, str(row["why"]))

    def _end(self, key: str, usage: Usage | None) -> None:
        """An attempt of this key is over."""
        if attempts := self._open.get(key):
            attempts.pop()
        if usage is not None:
            self.used.append(usage)


def _usage_row(usage: Usage) -> dict[str, Any]:
    row: dict[str, Any] = {"usage": [usage.prompt, usage.completion]}
    return row | {"estimated": True} if usage.estimated else row


def _read_usage(row: Mapping[str, Any]) -> Usage:
    prompt, completion = row["usage"]
    return Usage(int(prompt), int(completion), bool(row.get("estimated")))


def _lock(file: int, path: Path) -> None:
    """Refuse a folder that another process works on; the lock ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows: unguarded
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path}: another `graft data synth` is at work here; wait for it or choose another --out"
        ) from None
    except OSError:  # a file system without locks
        return
