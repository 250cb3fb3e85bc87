"""Stopping on request: the first signal asks, the second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from graft.console import note

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(threading.Event):
    """Set when a stop was asked for."""

    saves = False
    """Whether there is something to save, so that whoever computes looks at the event and saves. Until then a signal
    raises KeyboardInterrupt where the program happens to be."""


@contextmanager
def stop_requests() -> Iterator[Stop]:
    """A stop that is set by the first SIGINT or SIGTERM; the second ends the process, which is safe at any byte."""
    stop = Stop()

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()
        name = signal.Signals(number).name
        if stop.saves:
            note(f"{name}: saving a checkpoint, then stopping; again to stop at once")
        else:
            note(f"{name}: stopping; this start has computed nothing yet that could be lost")
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
