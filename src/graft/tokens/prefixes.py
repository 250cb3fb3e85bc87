"""Which prompts are answered together, so that what they begin with is computed once. Knows ids and numpy.

A group is answered side by side. Its stem, the tokens with which all of its prompts begin, is kept once in memory; what
some of them share beyond it is computed once where they come in together, which is why such prompts stand in line.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graft.tokens.tree import SHORTEST_RUN, common_length
from graft.types import IntArray

LEAST_STEM = 64
"""A stem longer by fewer tokens than this is not worth a group of its own."""
LEAST_PROMPTS = 16
"""Fewer prompts than this are not worth a group of their own: too few rows for one forward pass."""


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that are answered side by side."""

    stem: int
    """How many tokens all of them begin with; 0 where they are too few to matter. Less than the shortest prompt."""
    order: tuple[int, ...]
    """Indices of the prompts: those that share more stand together, the longest of them first."""


def group_prompts(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Cut prompts into groups; every prompt is in one of them."""
    if not prompts:
        return []
    ids = [np.asarray(prompt, np.int32) for prompt in prompts]
    # Big-endian bytes compare as the ids do.
    order = sorted(range(len(ids)), key=lambda index: ids[index].astype(">i4").tobytes())
    common = [0, *(common_length(ids[a], ids[b]) for a, b in itertools.pairwise(order))]
    found: list[Group] = []
    waiting = [(0, len(order))]
    while waiting:
        first, last = waiting.pop()
        stem = min(common[first + 1 : last], default=0)
        cuts = [first, *(index for index in range(first + 1, last) if common[index] == stem), last]
        left: list[int] = []  # places in the order
        for start, stop in itertools.pairwise(cuts):
            longer = min(common[start + 1 : stop], default=0) - stem
            if stop - start >= LEAST_PROMPTS and longer >= LEAST_STEM:
                waiting.append((start, stop))
            else:
                left += range(start, stop)
        if left:
            found.append(_group(left, order, common, ids))
    return found


def _group(places: Sequence[int], order: Sequence[int], common: Sequence[int], ids: Sequence[IntArray]) -> Group:
    """One group of the prompts at some places of the sorted order."""
    members = [order[place] for place in places]
    stem = 0
    if len(members) > 1:
        stem = min(common_length(ids[members[0]], ids[members[-1]]), min(len(ids[index]) for index in members) - 1)
    stem = stem if stem >= SHORTEST_RUN else 0
    blocks: list[list[int]] = []
    previous = -2
    for place in places:
        if place != previous + 1 or common[place] - stem < SHORTEST_RUN:
            blocks.append([])
        blocks[-1].append(order[place])
        previous = place
    blocks.sort(key=lambda block: -max(len(ids[index]) for index in block))
    return Group(stem, tuple(index for block in blocks for index in block))
