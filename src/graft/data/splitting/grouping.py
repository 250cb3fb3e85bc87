"""What must stay together in a split: rows are told one by one, and every row gets a place and a group.

Speaks of conversations, keys and groups. Knows no files and no parts.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.data.alike.dedup import Groups, conversation_text, group_sketches
from graft.data.alike.sketch import Collector, Index, Sketches, bands_for, sketch
from graft.data.splitting.split import hash64, split_text, unit
from graft.data.splitting.strata import value_of
from graft.types import Conversation


@dataclass(frozen=True, slots=True)
class Grouped:
    """The n rows of a split."""

    places: npt.NDArray[np.float64]
    """[n] a number in [0, 1) from the row's key."""
    groups: Index
    """[n] index of the first row of the row's group."""
    prompts: npt.NDArray[np.uint64]
    """[n] hash of the normalised first prompt."""


class Grouping:
    """Gathers the keys of rows. `how` is exact (first prompts), near, none (ids) or the name of a column."""

    def __init__(self, how: str, threshold: float) -> None:
        self.how = how
        self.bands = bands_for(threshold)
        self.without_value = 0
        """Rows that lack the column; they are grouped by their first prompt."""
        self._threshold = threshold
        self._keys, self._prompts = array("Q"), array("Q")
        self._near = [Collector(self.bands), Collector(self.bands)]

    def add(self, conversation: Conversation) -> tuple[str, str]:
        """Take note of one row. Returns the texts whose sketches are wanted if rows are grouped by likeness."""
        text = split_text(conversation)
        prompt = hash64(text)
        self._prompts.append(prompt)
        self._keys.append(self._key(conversation, prompt))
        return first_prompt(conversation), conversation_text(conversation)

    def add_sketches(self, prompts: Sketches, wholes: Sketches) -> None:
        """The sketches of the next rows."""
        self._near[0].add(prompts)
        self._near[1].add(wholes)

    def grouped(self) -> Grouped:
        """All rows told so far, once: the sketches, gigabytes for a million rows, are let go as they are used."""
        keys = np.frombuffer(self._keys, np.uint64)
        groups = _equal(keys)
        if self.how == "near":
            joined = Groups(len(keys))
            joined.join_all(groups)
            while self._near:
                joined.join_all(group_sketches(self._near.pop(0).sketches(), self._threshold))
            groups = joined.roots(np.arange(len(keys)))
        places = np.fromiter((unit(key) for key in self._keys), np.float64, len(keys))
        return Grouped(places, groups, np.frombuffer(self._prompts, np.uint64))

    def _key(self, conversation: Conversation, prompt: int) -> int:
        if self.how in ("exact", "near"):
            return prompt
        if self.how == "none":
            return hash64(conversation.id)
        value = value_of(conversation, self.how)
        if value is None:
            self.without_value += 1
            return prompt
        return hash64(f"{self.how}={value}")


def sketch_pairs(pairs: list[tuple[str, str]], bands: int) -> tuple[Sketches, Sketches]:
    """Sketches of the first prompts and of the whole texts of a batch."""
    return sketch([prompt for prompt, _ in pairs], bands), sketch([whole for _, whole in pairs], bands)


def first_prompt(conversation: Conversation) -> str:
    """The first user turn; where there is none, all that is said."""
    said = (message.content for message in conversation.messages if message.role == "user")
    return next((content for content in said if content.strip()), "") or conversation_text(conversation)


def _equal(keys: npt.NDArray[np.uint64]) -> Index:
    """[n] the index of the first row with the same key."""
    _, first, member = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[member], np.int64)
