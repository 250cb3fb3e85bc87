"""Rows for the benchmarks: real ones over and over, each time a little different, so that no two are the same text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from graft.config.data import Source
from graft.data.load import load_sources
from graft.types import Conversation

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared" / "material"


def real_conversations(files: Sequence[str]) -> list[Conversation]:
    """The conversations of some files of the material's data."""
    return load_sources([Source(path=str(MATERIAL / "data" / name)) for name in files]).conversations


def mutated(conversations: Sequence[Conversation], rows: int, seed: int = 0) -> Iterator[Conversation]:
    """Of each question and answer two words change places, and the row's number is added."""
    chance = random.Random(seed)
    for number in range(rows):
        conversation = conversations[number % len(conversations)]
        messages = tuple(
            replace(message, content=_mutated_text(message.content, number, chance))
            if message.role in ("user", "assistant") and message.content.strip()
            else message
            for message in conversation.messages
        )
        yield replace(conversation, id=f"row{number}", messages=messages)


def _mutated_text(text: str, number: int, chance: random.Random) -> str:
    words = text.split(" ")
    if len(words) > 2:
        a, b = chance.randrange(len(words)), chance.randrange(len(words))
        words[a], words[b] = words[b], words[a]
    return " ".join([*words, str(number)])
