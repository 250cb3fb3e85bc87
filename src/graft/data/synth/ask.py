"""Asking: a request's answer from the journal, or from the endpoint, with retries, within the budget, and noted down.

Speaks of requests and replies. Knows neither what is asked nor what becomes of the answers.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from graft.config.synth import Endpoint
from graft.data.synth.budget import Budget, Usage
from graft.data.synth.client import Client, EndpointClosed, Reply, Request, TryAgain, Unanswerable
from graft.data.synth.journal import Entry, Journal
from graft.errors import GraftError, InputError

T = TypeVar("T")


class Stopped(Exception):
    """Nothing more is asked: `Desk.halted` says why. What was in flight is still answered and noted."""


class Desk:
    """Where all requests pass. Only for one event loop."""

    def __init__(self, endpoint: Endpoint, client: Client, journal: Journal, budget: Budget) -> None:
        self._endpoint = endpoint
        self._client = client
        self._journal = journal
        self.budget = budget
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._not_before = 0.0
        """Monotonic time before which nobody asks: the endpoint said so to one, and means all."""
        self._doubtful: list[tuple[str, str]] = []
        """Requests given up since the last answer: was it they, or the endpoint?"""
        self._wake = asyncio.Event()
        self.halted: GraftError | None = None
        self.in_flight = 0
        self.asked: Counter[str] = Counter()
        """Answers fetched in this start, by stage."""
        self.known: Counter[str] = Counter()
        """Answers found in the journal, by stage."""
        self.retried: Counter[str] = Counter()
        """Attempts that failed, by why."""
        self.over = 0
        """Answers of this start that took more than was reserved."""

    def halt(self, why: GraftError) -> None:
        """Ask nothing more. The first reason stands."""
        if self.halted is None:
            self.halted = why
        self._wake.set()

    async def ask(self, request: Request) -> Entry:
        """How the request ended, now or in an earlier start.

        Raises:
            Stopped: it was not asked, and no longer will be.
        """
        key = request.key(self._endpoint)
        if (known := self._journal.entries.get(key)) is not None:
            self.known[request.stage] += 1
            return known
        async with self._slots:
            return await self._fetch(request, key)

    def settle_doubts(self) -> None:
        """Note the requests given up as failed: the endpoint answers others, so it was they."""
        for key, why in self._doubtful:
            self._journal.failed(key, why)
        self._doubtful.clear()

    async def _fetch(self, request: Request, key: str) -> Entry:
        why, not_before = "", 0.0
        for attempt in range(self._endpoint.retries + 1):
            await self._wait(not_before)
            try:
                async with self.budget.hold(request.most()) as hold:
                    if self.halted:
                        raise Stopped
                    self._journal.asked(key, request.stage, request.likely(request.max_tokens))
                    self.in_flight += 1
                    try:
                        reply = await self._client.attempt(request)
                        return await self._answered(request, key, reply, hold.settle)
                    except TryAgain as error:
                        why = str(error)
                        self._not_answered(key, error, hold.settle)
                        not_before = self._back_off(key, attempt, error)
                    finally:
                        self.in_flight -= 1
            except Unanswerable as error:
                self._journal.free(key, str(error))
                return self._give_up(key, str(error))
            except EndpointClosed as error:
                self._journal.free(key, self._client.clean(str(error)))
                self.halt(error)
                raise Stopped from None
            except GraftError as error:  # the budget is reached, the journal cannot be written
                self.halt(error)
                raise Stopped from None
        return self._give_up(key, f"{why}; {self._endpoint.retries + 1} attempts")

    async def _answered(self, request: Request, key: str, reply: Reply, settle: Callable[[Usage], None]) -> Entry:
        settle(reply.usage)
        self.settle_doubts()
        self.asked[request.stage] += 1
        most = request.most()
        self.over += reply.usage.prompt > most.prompt or reply.usage.completion > most.completion
        entry = self._journal.answer(key, request.stage, reply)
        await self._journal.on_disk()
        return entry

    def _not_answered(self, key: str, error: TryAgain, settle: Callable[[Usage], None]) -> None:
        self.retried[str(error)] += 1
        if error.lost is None:
            self._journal.free(key, str(error))
        else:
            settle(error.lost)
            self._journal.lost(key, str(error), error.lost)

    def _give_up(self, key: str, why: str) -> Entry:
        """The request failed. It is noted so only when another one is answered: until then it may be the endpoint."""
        self._doubtful.append((key, why))
        if len(self._doubtful) >= self._endpoint.failures_in_a_row:
            self.halt(
                InputError(
                    f"endpoint {self._endpoint.base_url}: {len(self._doubtful)} requests in a row failed, the last "
                    f"with: {why}; see to it and start again: what was answered is kept"
                )
            )
        if self.halted:
            raise Stopped
        return Entry(None, why)

    async def _wait(self, own: float) -> None:
        """Until the monotonic time `own`, and the one set for all, have come, or the run is halted."""
        while not self.halted and (seconds := max(own, self._not_before) - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._wake.wait(), seconds)
            except TimeoutError:
                continue
        if self.halted:
            raise Stopped

    def _back_off(self, key: str, attempt: int, error: TryAgain) -> float:
        """The monotonic time before which this request is not sent again; where the endpoint is busy, nor any other."""
        longest = self._endpoint.longest_wait
        if error.wait is not None and error.wait > longest:
            self.halt(
                InputError(
                    f"endpoint {self._endpoint.base_url}: asks to wait {error.wait:.0f} s, endpoint.longest_wait is "
                    f"{longest:g}; start again later: what was answered is kept"
                )
            )
        spread = 0.75 + int(key[:4], 16) / 0x1FFFF  # 0.75 to 1.25, so that not all come back at once
        seconds = min(longest, self._endpoint.backoff * 2.0**attempt * spread) if error.wait is None else error.wait
        until = time.monotonic() + seconds
        if error.busy:
            self._not_before = max(self._not_before, until)
        return until


async def in_order(work: Iterator[Coroutine[Any, Any, T]], width: int) -> AsyncIterator[T]:
    """Results in the order of the work, of which up to `width` is under way. Stops at the first that is not to be had.

    What is under way then is still finished: it may have been paid.
    """
    tasks: deque[asyncio.Task[T]] = deque()
    more = True
    while more or tasks:
        while more and len(tasks) < width:
            coroutine = next(work, None)
            if coroutine is None:
                more = False
            else:
                tasks.append(asyncio.create_task(coroutine))
        if not tasks:
            return
        try:
            result = await tasks.popleft()
        except Stopped:
            await asyncio.gather(*tasks, return_exceptions=True)
            return
        yield result
