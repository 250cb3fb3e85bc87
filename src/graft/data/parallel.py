"""One function over many items in several processes, with the order and the results of one process.

Knows nothing of what the items are: they and the results only have to be picklable.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

from graft.errors import GraftError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Batches per worker that are read before they are needed: enough to keep all busy, little enough to hold."""


def usable_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_batches(
    function: Callable[[list[Item]], Result], items: Iterable[Item], workers: int, batch: int = 256
) -> Iterator[Result]:
    """`function` of each list of `batch` consecutive items (the last may be shorter): one result per list, in order.

    With one worker everything runs in this process, and no process is started for a single batch either. Otherwise
    `function` is sent to freshly started processes, so it must be picklable: a function of a module, or a
    `functools.partial` of one. Items are taken from the iterable as they are needed, at most AHEAD batches per
    worker before their time. Leaving the loop early, an error or Ctrl-C ends the processes.

    Raises:
        Exception: what `function` raised, as itself, when its batch's turn comes.
        GraftError: a worker process was killed, most often by the system for want of memory.
    """
    batches = _batched(iter(items), batch)
    if workers > 1:
        head = list(islice(batches, 2))
        if len(head) > 1:
            yield from _in_processes(function, _chain(head, batches), workers)
            return
        batches = iter(head)
    for items_of_one in batches:
        yield function(items_of_one)


def _batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(islice(items, size)):
        yield batch


def _chain(head: list[list[Item]], rest: Iterator[list[Item]]) -> Iterator[list[Item]]:
    """Like itertools.chain, but lets go of the head while the rest is read."""
    while head:
        yield head.pop(0)
    yield from rest


def _in_processes(
    function: Callable[[list[Item]], Result], batches: Iterator[list[Item]], workers: int
) -> Iterator[Result]:
    # Fresh processes: a fork would copy the locks that the threads of pyarrow or torch hold, and hang on them.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for batch in islice(batches, workers * AHEAD):
            waiting.append(_submit(pool, function, batch))
        while waiting:
            result = waiting.popleft().result()
            for batch in islice(batches, 1):
                waiting.append(_submit(pool, function, batch))
            yield result
    except BrokenProcessPool:
        raise GraftError(
            f"one of {workers} worker processes was killed, probably because memory ran out; "
            "use fewer workers, or none: --workers 1"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, function: Callable[[list[Item]], Result], batch: list[Item]) -> Future[Result]:
    """`pool.submit`, which may start a process, with Ctrl-C held back: a process that still imports must not die of it
    with a traceback. It inherits the mask; here the signal comes when the mask is gone.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        return pool.submit(function, batch)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare_worker() -> None:
    """Ctrl-C reaches every process of a terminal: only the first may act on it. An orphan must not live on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
