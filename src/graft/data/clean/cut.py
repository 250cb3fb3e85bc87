"""Long conversations in several, at turn boundaries, by a budget of tokens.

Speaks of exchanges: a question with everything up to the next one. Knows no tokenizer: it is given what counts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graft.config.clean import Cut
from graft.data.clean.step import Drop, Notes, exchanges
from graft.errors import GraftError, InputError, first_line
from graft.types import Conversation, Message

Count = Callable[[Sequence[Message], Sequence[Mapping[str, Any]]], int]
"""Tokens of a conversation as the chat template writes it: messages and tools to a number. Picklable."""


def cut_long(
    conversation: Conversation, settings: Cut, notes: Notes, count: Count
) -> Conversation | Drop | list[Conversation]:
    """The conversation, or its parts: as many exchanges each as fit, every part with the system turn and the tools.

    Ids of parts end in /1, /2, ... An exchange that is too long alone is dropped or stays a part by itself, as
    `too_long` says. Raw text is left whole: training cuts it where it must.
    """
    if conversation.text is not None:
        return conversation
    try:
        if count(conversation.messages, conversation.tools) <= settings.max_tokens:
            return conversation
        parts = _parts(conversation, settings, notes, count)
    except InputError:  # the template or the tokenizer itself, whatever the turns
        raise
    except GraftError as error:  # a template that refuses these turns would refuse to train on them
        return Drop("messages", f"the chat template refuses it: {first_line(error)}")
    if not parts:
        return Drop("messages", f"too long: no question with its answer fits into max_tokens {settings.max_tokens}")
    if len(parts) == 1:
        return replace(conversation, messages=parts[0])
    return [
        replace(conversation, id=f"{conversation.id}/{number}", messages=part)
        for number, part in enumerate(parts, start=1)
    ]


def _parts(conversation: Conversation, settings: Cut, notes: Notes, count: Count) -> list[tuple[Message, ...]]:
    """The turns of each part that has an answer."""
    head, asked = exchanges(conversation.messages)
    system = [message for message in head if message.role == "system"]
    parts: list[tuple[Message, ...]] = []
    start = 0
    while start < len(asked):
        before = system if start else head  # a greeting stands before the first part only

        def turns(end: int, before: list[Message] = before, start: int = start) -> tuple[Message, ...]:
            return (*before, *(message for exchange in asked[start:end] for message in exchange))

        def tokens(end: int, turns: Callable[[int], tuple[Message, ...]] = turns) -> int:
            return count(turns(end), conversation.tools)

        end = bisect_right(range(start + 1, len(asked) + 1), settings.max_tokens, key=tokens) + start
        fits = end > start
        end = max(end, start + 1)
        if not fits:
            notes[f"questions with answers over max_tokens, {_WHAT[settings.too_long]}"] += 1
        if fits or settings.too_long == "keep":
            parts.append(turns(end))
        start = end
    return [part for part in parts if any(message.role == "assistant" for message in part)]


_WHAT = {"drop": "dropped", "keep": "kept"}
