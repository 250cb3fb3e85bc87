"""One save at a time, here or in a thread of its own. Knows nothing of what is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs jobs one after the other; with `apart` the caller goes on meanwhile.

    A job that fails in its thread raises its error at the next call of `check`, `wait` or `do`.
    """

    def __init__(self, apart: bool) -> None:
        self.apart = apart
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def do(self, job: Callable[[], None]) -> None:
        """Run a job when the one before it is done."""
        self.wait()
        if not self.apart:
            job()
            return
        # No daemon: a process that ends in an orderly way finishes the save that is in flight.
        self._thread = threading.Thread(target=self._run, args=(job,), name="save")
        self._thread.start()

    def check(self) -> None:
        """Raise what the last job raised, if it is over."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until no job is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
