"""Tokens and money: what was used, what is in flight, and whether the next request still fits.

Speaks of tokens and prices. Knows no requests and no network. Only for one event loop.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from graft.config.synth import Limits, Prices
from graft.errors import Interrupted

PER_MESSAGE = 8
"""Tokens that a chat template adds to each message, with room to spare."""
PER_PROMPT = 64
"""Tokens of a system text that some templates add by themselves."""
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt: int
    completion: int
    estimated: bool = False
    """The endpoint did not say; see `estimate_tokens`."""


class BudgetReached(Interrupted):
    """The next request could exceed the budget."""


def estimate_tokens(text: str) -> int:
    """Tokens that a text probably has: four for five wide characters, one for four others.

    Measured on 200 answers: in Chinese 1.4 times what Qwen2.5 makes, 1.1 times Llama 3.1, 0.5 times Llama 2; in English
    1.1 to 1.2 times what any of them makes.
    """
    wide = len(_WIDE.findall(text))
    return math.ceil(wide * 0.8 + (len(text) - wide) / 4)


def most_tokens(texts: Sequence[str]) -> int:
    """Tokens that a prompt of these messages can have at most: byte-level tokenizers make one of a byte, or fewer."""
    return sum(len(text.encode()) + PER_MESSAGE for text in texts) + PER_PROMPT


class Hold:
    """What one request in flight may use up; `settle` puts what it did use in its place."""

    def __init__(self, most: Usage) -> None:
        self.most = most
        self.used: Usage | None = None

    def settle(self, used: Usage) -> None:
        """The request is over and was, or may have been, paid."""
        self.used = used


class Budget:
    """Counts tokens over all starts of a run, and lets a request begin only where everything in flight, and it, fit."""

    def __init__(self, limits: Limits, prices: Prices | None) -> None:
        self._limits = limits
        self.prices = prices
        self.prompt = 0
        self.completion = 0
        self._held: list[Hold] = []
        self._freed = asyncio.Condition()

    def count(self, used: Usage) -> None:
        """Add what was used, in this start or an earlier one."""
        self.prompt += used.prompt
        self.completion += used.completion

    def cost(self, prompt: int | None = None, completion: int | None = None) -> float | None:
        """Money for so many tokens, by default for all that were counted; None without prices."""
        if self.prices is None:
            return None
        tokens_in = self.prompt if prompt is None else prompt
        tokens_out = self.completion if completion is None else completion
        return (tokens_in * self.prices.input + tokens_out * self.prices.output) / 1_000_000

    def said(self) -> str:
        """What was used so far, in few words."""
        if self.prices is None:
            return f"{self.prompt + self.completion:,} tokens"
        return f"{self.cost() or 0:.4f} {self.prices.currency}"

    @asynccontextmanager
    async def hold(self, most: Usage) -> AsyncIterator[Hold]:
        """Reserve for one request, waiting for those in flight where it does not fit beside them.

        Raises:
            BudgetReached: it does not fit even when nothing is in flight.
        """
        async with self._freed:
            while (why := self._exceeds(most)) is not None:
                if not self._held:
                    raise BudgetReached(why)
                await self._freed.wait()
            hold = Hold(most)
            self._held.append(hold)
        try:
            yield hold
        finally:
            self._held.remove(hold)
            if hold.used is not None:
                self.count(hold.used)
            async with self._freed:
                self._freed.notify_all()

    def _exceeds(self, most: Usage) -> str | None:
        """Why a request may not begin now."""
        prompt = self.prompt + most.prompt + sum(hold.most.prompt for hold in self._held)
        completion = self.completion + most.completion + sum(hold.most.completion for hold in self._held)
        tokens, used = self._limits.tokens, self.prompt + self.completion
        if tokens is not None and prompt + completion > tokens:
            return (
                f"the next request could exceed the budget: {used:,} tokens are used, it takes up to "
                f"{most.prompt + most.completion:,}, budget.tokens is {tokens:,}"
            )
        money, cost = self._limits.money, self.cost(prompt, completion)
        if money is not None and self.prices is not None and cost is not None and cost > money:
            return (
                f"the next request could exceed the budget: {self.cost() or 0:.4f} {self.prices.currency} are spent, "
                f"it takes up to {self.cost(most.prompt, most.completion) or 0:.4f}, budget.money is {money:g}"
            )
        return None
