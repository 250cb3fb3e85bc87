"""The steps that compare conversations: of those that are equal, or nearly, the first one stays.

Speaks of a stream of conversations, keys and groups. What is equal and what is near is decided in `dedup`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator

from graft.config.clean import Near
from graft.data.alike.dedup import conversation_text, exact_key, near_groups
from graft.data.alike.text import digest
from graft.data.clean.report import Dropped, StepReport
from graft.data.clean.spool import Spool
from graft.data.clean.step import Drop
from graft.types import Conversation, Origin


def equality_key(conversation: Conversation) -> bytes:
    """Equal where `exact_key` is and the tools on offer are the same: with other tools another answer is right."""
    key = exact_key(conversation)
    if not conversation.tools:
        return key
    return digest("tools", key.hex(), json.dumps(conversation.tools, sort_keys=True, ensure_ascii=False))


class Places:
    """Origins of many conversations in 8 bytes each: number of the file and line."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def number(self, origin: Origin) -> int:
        return self._files.setdefault(origin.file, len(self._files)) << 40 | origin.line

    def name(self, number: int) -> str:
        return f"{list(self._files)[number >> 40]}:{number & ((1 << 40) - 1)}"


def drop_equal(
    batches: Iterator[tuple[Conversation | Dropped, bytes]], own: StepReport, examples: int
) -> Iterator[Conversation | Dropped]:
    """Drop every conversation whose key was met before; about 200 bytes are held for each that is kept."""
    places, first = Places(), dict[bytes, int]()
    for item, key in batches:
        if isinstance(item, Dropped):
            yield item
            continue
        own.entered += 1
        if key in first:
            yield own.count_drop(item, Drop("messages", f"equal to {places.name(first[key])}"), examples)
        else:
            first[key] = places.number(item.origin)
            yield item


def drop_near(
    stream: Iterator[Conversation | Dropped], settings: Near, own: StepReport, examples: int, spool: Spool, workers: int
) -> Iterator[Conversation | Dropped]:
    """Drop every conversation that has a near-duplicate before it; the stream lies on disk until all are known."""
    places, at = Places(), array("q")

    def said() -> Iterator[str]:
        for item in stream:
            spool.write(item)
            if isinstance(item, Conversation):
                at.append(places.number(item.origin))
                yield conversation_text(item)

    groups = near_groups(said(), settings.threshold, workers)
    index = 0
    for item in spool.read():
        if isinstance(item, Dropped):
            yield item
            continue
        own.entered += 1
        first = int(groups[index])
        if first == index:
            yield item
        else:
            drop = Drop("messages", f"nearly equal to {places.name(at[first])} or to one that is")
            yield own.count_drop(item, drop, examples)
        index += 1
