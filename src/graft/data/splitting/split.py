"""Which conversations are trained on, validated on and tested on: a pure function of each one's first prompt.

Speaks of conversations and shares. Knows no files and no order: no other row has a say in where a row goes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graft.data.alike.text import normalise
from graft.types import Conversation

Part = Literal["train", "val", "test"]
_KEY = b"graft split 1"
"""Changing it would move every row of every project: never."""
_HELD_OUT_KEY = b"graft hold out 1"
"""What training holds out of its data is another choice than the files' parts: of a file that is the training part of a
split, the same choice would find nothing."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts, each in the order of the data."""

    train: list[Conversation]
    val: list[Conversation]
    test: list[Conversation]
    notes: tuple[str, ...] = ()
    """One sentence for each part that was wanted and came out empty."""


def split(conversations: Sequence[Conversation], val: float, test: float) -> Parts:
    """What training holds out: by a hash of the normalised first prompt, shares of about `val`, `test` and the rest.

    Appending rows moves none, and equal prompts stay together whatever their system text, case, width, blanks and
    punctuation. Nothing more is promised: the shares are met on average (val 0.05 of 100 rows usually gives 1
    to 10), and where many rows share one prompt they go one way together.
    """
    parts: dict[Part, list[Conversation]] = {"train": [], "val": [], "test": []}
    for conversation in conversations:
        parts[_part_at(unit(hash64(split_text(conversation), _HELD_OUT_KEY)), val, test)].append(conversation)
    shares: dict[Part, float] = {"train": 1 - val - test, "val": val, "test": test}
    notes = tuple(
        f"the {part} part is empty: {share:.1%} of {len(conversations)} rows, by a hash of their first prompts, "
        f"met none; raise its share, add rows, or give a file for it"
        for part, share in shares.items()
        if share > 0 and not parts[part]
    )
    return Parts(parts["train"], parts["val"], parts["test"], notes)


def part_of(conversation: Conversation, val: float, test: float) -> Part:
    """Where one conversation goes when files are divided."""
    return _part_at(bucket(conversation), val, test)


def _part_at(place: float, val: float, test: float) -> Part:
    """Test lies lowest, so that changing `val` leaves the test part as it is."""
    if place < test:
        return "test"
    return "val" if place < test + val else "train"


def bucket(conversation: Conversation) -> float:
    """A number in [0, 1) that depends on the normalised first prompt alone."""
    return unit(hash64(split_text(conversation)))


def hash64(text: str, key: bytes = _KEY) -> int:
    """64 bits that depend on text and key alone, on every machine the same."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def unit(number: int) -> float:
    """64 bits as a number in [0, 1)."""
    return (number >> 11) / 2**53  # 53 bits: what a float holds exactly, so never 1.0


def split_text(conversation: Conversation) -> str:
    """The text that decides: the first user turn, normalised; raw text itself; without a prompt, all that is said."""
    if conversation.text is not None:
        return normalise(conversation.text)
    first = next((message.content for message in conversation.messages if message.role == "user"), "")
    said = (message.content for message in conversation.messages if message.role != "system")
    return normalise(first) or normalise("".join(said))
