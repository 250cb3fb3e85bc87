"""How many tokens a conversation has, for those who know no tokenizer. Speaks of messages and numbers."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from graft.types import Message

if TYPE_CHECKING:
    from graft.tokens.renderer import Renderer


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """A function of messages and tools that can be sent to another process: each loads the tokenizer once, on use."""

    model: str
    template: str | None = None
    date: str | None = None
    """The day that the template tells, YYYY-MM-DD; a fixed one makes equal counts on every day."""
    trust_remote_code: bool = False

    def __call__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> int:
        """Tokens of the whole conversation as the chat template writes it, without a prompt for the next turn.

        Raises:
            TemplateRefused: the template raises on these messages.
            InputError: there is no such model, or it has no tokenizer.
        """
        renderer = _renderer(self)
        return len(renderer.ids([renderer.render(messages, tools, generation_prompt=False)])[0])

    def check(self) -> None:
        """Load the tokenizer now.

        Raises:
            InputError: there is no such model, or it has no tokenizer.
            ConfigError: the template is not known.
        """
        _renderer(self)


@cache
def _renderer(counter: TokenCounter) -> Renderer:
    from graft.tokens.load import load_renderer

    day = counter.date or datetime.date.today().isoformat()
    return load_renderer(counter.model, counter.template, day, counter.trust_remote_code)
