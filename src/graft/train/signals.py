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


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that is set by the first SIGINT or SIGTERM; the second ends the process, which is safe at any byte."""
    asked = threading.Event()

    def ask(number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            os._exit(128 + number)
        asked.set()
        note(f"{signal.Signals(number).name}: saving a checkpoint, then stopping; again to stop at once")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
