"""Answers that refuse or disclaim: boilerplate of another assistant, which a tuned model would repeat.

Speaks of answers. Only how an answer or a sentence begins counts, and only in the first person: an answer that explains
what language models cannot do is an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from graft.config.clean import Refusal
from graft.data.clean.refusal_words import DISCLAIMERS, REFUSALS
from graft.data.clean.step import Drop, Notes, Result, remove_turns
from graft.types import Conversation

_APOSTROPHE = re.compile("[’‘ʼ`]")
_CONTRACTED = re.compile(r"\bi'm\b", re.IGNORECASE)
_QUOTED = re.compile(
    r"```.*?(?:```|\Z)|\"[^\"\n]*\"|“[^”]*”|「[^」]*」|『[^』]*』|«[^»]*»|^>[^\n]*$", re.DOTALL | re.MULTILINE
)
"""What an answer quotes it does not say: dialogue, code, the sentence to be rewritten."""
_LOOKED_AT = 2000
"""Characters of an answer: boilerplate comes early."""


def drop_refusals(conversation: Conversation, settings: Refusal, notes: Notes) -> Result:
    """The conversation without refusing answers and what goes with them by `drop`."""
    bad: dict[int, str] = {}
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant" and (found := find_boilerplate(message.content, settings.what)):
            kind, words = found
            bad[index] = f"{kind}: {words!r}"
            notes[f"{kind}s"] += 1
    if not bad:
        return conversation
    first = min(bad)
    return remove_turns(conversation, bad, settings.drop) or Drop(f"messages[{first}]", bad[first])


def find_boilerplate(answer: str, kinds: Sequence[str] = ("refusal", "disclaimer")) -> tuple[str, str] | None:
    """The kind of boilerplate that an answer is and the words that say so, or None."""
    text = answer[:_LOOKED_AT]
    if not text.isascii():
        text = _APOSTROPHE.sub("'", text)
    text = _CONTRACTED.sub("I am", _QUOTED.sub(" ", text))
    for kind in kinds:
        if found := _pattern(kind).search(text):
            return kind, found["said"][:100]
    return None


@cache
def _pattern(kind: str) -> re.Pattern[str]:
    words = "|".join((REFUSALS if kind == "refusal" else DISCLAIMERS).values())
    start = r"\A[\s*_#!]*" if kind == "refusal" else r"(?:\A|[.!?。;；]\s*|\n)[\s*_#]*"
    return re.compile(rf"{start}(?P<said>{words})", re.IGNORECASE)
