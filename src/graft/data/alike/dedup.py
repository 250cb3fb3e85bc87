"""Which conversations say the same: exactly, after normalisation, or nearly, by the shingles they share.

Speaks of texts, sketches and groups. Knows no files, and nothing of what becomes of a duplicate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial

import numpy as np

from graft.data.alike.sketch import Index, Sketches, bands_for, collect, pairs_in_buckets, similar, sketch
from graft.data.alike.text import digest, normalise
from graft.data.parallel import map_batches
from graft.types import Conversation

NEAR = 0.8
"""Jaccard similarity from which two texts count as near-duplicates."""
SKETCHED_AT_ONCE = 256
"""Texts of a batch: enough to be fast in numpy, few enough to stay in the processor's cache."""


def exact_key(conversation: Conversation) -> bytes:
    """16 bytes that are equal where roles, texts (normalised), reasoning and tool calls are; tools and meta are not
    looked at.
    """
    if conversation.text is not None:
        return digest("text", normalise(conversation.text))
    parts: list[str] = []
    for message in conversation.messages:
        calls = json.dumps(message.tool_calls, sort_keys=True, ensure_ascii=False) if message.tool_calls else ""
        parts += (message.role, normalise(message.content), normalise(message.reasoning or ""), calls)
    return digest("chat", *parts)


def conversation_text(conversation: Conversation) -> str:
    """What near-duplicates are found by: all that is said except by the system, turn after turn; raw text as it is."""
    if conversation.text is not None:
        return conversation.text
    return "\n".join(message.content for message in conversation.messages if message.role != "system")


def near_groups(texts: Iterable[str], threshold: float = NEAR, workers: int = 1) -> Index:
    """[n] for each text the index of the first text of its group: its own where nothing earlier is near it.

    Two texts are near where their shingles have a Jaccard similarity of at least `threshold`, and what is near to
    near is of one group. Candidates come from MinHash bands, which miss 1 % of the pairs right at the threshold and
    hardly any that are more similar; each candidate is then compared (see `sketch` for the precision). Where more
    than BUCKET texts fall into one bucket, each is compared with that many of the later ones. The result depends
    on the texts and their order alone.
    """
    bands = bands_for(threshold)
    batches = map_batches(partial(sketch, bands=bands), texts, workers, SKETCHED_AT_ONCE)
    return group_sketches(collect(batches, bands), threshold)


def group_sketches(sketches: Sketches, threshold: float) -> Index:
    """The groups of `near_groups`, from sketches that have bands for this threshold."""
    # Equal sets first: a row repeated a thousand times is looked at once.
    _, first, member = np.unique(sketches.identity, return_index=True, return_inverse=True)
    distinct = np.sort(first)
    groups = Groups(len(sketches))
    for band in range(sketches.bands.shape[1]):
        for a, b in pairs_in_buckets(sketches.bands[distinct, band]):
            left, right = distinct[a], distinct[b]
            apart = groups.roots(left) != groups.roots(right)
            left, right = left[apart], right[apart]
            near = similar(sketches, left, sketches, right, threshold) >= threshold
            groups.join(left[near], right[near])
    return groups.roots(first[member])


class Groups:
    """Groups of the numbers 0 to n - 1, joined pair by pair; each is named after its smallest number."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def join(self, left: Index, right: Index) -> None:
        """Make one group of the groups of left[i] and right[i], for every i."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            one, other = self._root(a), self._root(b)
            self._parent[max(one, other)] = min(one, other)

    def join_all(self, first: Index) -> None:
        """Join every number to first[number], where that is another one."""
        others = np.flatnonzero(first != np.arange(len(first)))
        self.join(first[others], others)

    def roots(self, of: Index) -> Index:
        """The smallest number of each one's group."""
        found = self._parent[of]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[of] = found  # the shortest way for those who come later
                return found
            found = above

    def _root(self, item: int) -> int:
        parent = self._parent
        while (above := int(parent[item])) != item:
            parent[item] = parent[above]  # halve the way for those who come later
            item = above
        return item
