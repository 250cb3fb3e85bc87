"""The trees of one optimizer step for the eye: which tokens are shared, and by how many examples.

Speaks rows, examples and text. Knows no files and no options.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.text import Text

from graft.tokens.renderer import Renderer
from graft.tokens.show import STYLES, Piece, kind_of, pieces_of, visible
from graft.tokens.tree import SHORTEST_RUN, Sharing, build_rows, lexicographic, segments, sharing
from graft.types import Example, Row

_DEEPEST = 16
"""Levels that are indented; deeper ones stand where the last of them stands."""
_HEAD, _TAIL = 40, 16
"""Pieces shown of a long branch in the terminal."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A run of nodes that the same examples pass through."""

    start: int
    """First node of the run in its row."""
    stop: int
    """Exclusive."""
    depth: int
    """Position id of its first token."""
    level: int
    """Number of forks between it and its root."""
    examples: int
    conversations: tuple[str, ...]
    """Ids of those that the examples belong to, in order."""
    ends: tuple[tuple[str, int], ...]
    """Conversation and turn of the examples that end with its last token."""
    targets: int
    """Nodes that are trained on."""


@dataclass(frozen=True, slots=True)
class Trees:
    """A row and what passes through it."""

    row: Row
    branches: tuple[Branch, ...]
    """In depth-first order; their sizes add up to the row."""


@dataclass(frozen=True, slots=True)
class Step:
    """All rows of one optimizer step."""

    trees: tuple[Trees, ...]
    sharing: Sharing
    examples: int


def step_trees(examples: Sequence[Example], row_tokens: int) -> Step:
    """The rows that training makes of a step's examples, cut into branches.

    Raises:
        ValueError: an example is longer than `row_tokens`.
    """
    rows = build_rows(examples, row_tokens, shortest_run=SHORTEST_RUN)
    return Step(tuple(_trees_of(rows, examples)), sharing(examples, rows), len(examples))


def _trees_of(rows: Sequence[Row], examples: Sequence[Example]) -> list[Trees]:
    """Rows take the sorted examples in turn: the first that has no path in a row begins the next one."""
    waiting = sorted(examples, key=lexicographic)
    found: list[Trees] = []
    done = 0
    for row in rows:
        child: dict[tuple[int, int], list[int]] = {}
        for node, key in enumerate(zip(row.parent.tolist(), row.ids.tolist(), strict=True)):
            child.setdefault(key, []).append(node)
        through: list[list[Example]] = [[] for _ in range(len(row))]
        while done < len(waiting) and (path := _path(waiting[done], child)) is not None:
            for node in path:
                through[node].append(waiting[done])
            done += 1
        found.append(Trees(row, _branches(row, through)))
    assert done == len(waiting), "every example lies in one row"
    return found


def _path(example: Example, child: dict[tuple[int, int], list[int]]) -> list[int] | None:
    """The nodes of an example, root first, or None where the row does not have it. Siblings may begin alike."""
    ids = example.ids.tolist()
    path: list[int] = []
    waiting = [(0, node) for node in reversed(child.get((-1, ids[0]), []))]
    while waiting:
        depth, node = waiting.pop()
        path[depth:] = [node]
        if depth + 1 == len(ids):
            return path
        waiting += [(depth + 1, following) for following in reversed(child.get((node, ids[depth + 1]), []))]
    return None


def _branches(row: Row, through: Sequence[Sequence[Example]]) -> tuple[Branch, ...]:
    """Cut a row where it forks, where a tree ends, and where an example ends."""
    counts = np.array([len(examples) for examples in through])
    forks = np.cumsum([0, *segments(row).sizes])[:-1]
    begins: npt.NDArray[Any] = np.union1d(forks, np.flatnonzero(np.diff(counts)) + 1)
    children = np.bincount(row.parent[row.parent >= 0], minlength=len(row))
    level = np.zeros(len(row), np.int64)  # filled at the ends of branches: what a child continues from
    found: list[Branch] = []
    for start, stop in zip(begins.tolist(), [*begins.tolist()[1:], len(row)], strict=True):
        parent = int(row.parent[start])
        deeper = 0 if parent < 0 else int(level[parent]) + int(children[parent] > 1)
        level[start:stop] = deeper
        here = through[start]
        after = {id(example) for node in np.flatnonzero(row.parent == stop - 1).tolist() for example in through[node]}
        found.append(
            Branch(
                start,
                stop,
                int(row.depth[start]),
                deeper,
                len(here),
                tuple(dict.fromkeys(example.conversation for example in here)),
                tuple((example.conversation, example.turn) for example in here if id(example) not in after),
                int(np.count_nonzero(row.weight[start:stop])),
            )
        )
    return tuple(found)


def branch_pieces(row: Row, branch: Branch, renderer: Renderer) -> list[Piece]:
    """A branch's tokens as text; `start` and `stop` of a piece are positions in its examples."""
    path: list[int] = []
    node = branch.start
    while (node := int(row.parent[node])) >= 0:
        path.append(node)
    path = path[::-1] + list(range(branch.start, branch.stop))
    ids = row.ids[path].tolist()
    kinds = [
        kind_of(float(weight), token in renderer.stop_ids) for weight, token in zip(row.weight[path], ids, strict=True)
    ]
    return pieces_of(ids, kinds, branch.depth, renderer)


def said_of(branch: Branch) -> str:
    """A branch in a few words."""
    size = branch.stop - branch.start
    shared = f"{branch.examples} examples" if branch.examples > 1 else "1 example"
    if len(branch.conversations) > 1:
        shared += f" of {len(branch.conversations)} conversations"
    return f"{size} token{'s' if size > 1 else ''} × {shared}"


def draw_step(step: Step, renderer: Renderer) -> RenderableType:
    """The trees of a step, indented at every fork; long runs are shown by their beginning and end."""
    parts: list[RenderableType] = []
    for number, trees in enumerate(step.trees, start=1):
        roots = sum(branch.depth == 0 for branch in trees.branches)
        title = f"row {number} of {len(step.trees)}: {len(trees.row)} tokens in {roots} tree{'s' if roots > 1 else ''}"
        parts.append(Text(title, style="bold"))
        for branch in trees.branches:
            lead = "│ " * min(branch.level, _DEEPEST)
            ends = f", ends {ends_of(branch)}" if branch.ends else ""
            parts.append(Text(f"{lead}├ {said_of(branch)}{visible(ends)}", style="cyan"))
            parts.append(_indented(branch_pieces(trees.row, branch, renderer), f"{lead}│   "))
        parts.append(Text())
    return Group(*parts)


def ends_of(branch: Branch, most: int = 3) -> str:
    """The examples that end with a branch, the first few of them."""
    said = [f"{name} turn {turn}" for name, turn in branch.ends[:most]]
    more = len(branch.ends) - most
    return ", ".join(said) + (f" and {more} more" if more > 0 else "")


def _indented(found: Sequence[Piece], lead: str) -> Text:
    text = Text(lead, style="dim")
    left_out = len(found) - _HEAD - _TAIL
    shown = [*found[:_HEAD], None, *found[-_TAIL:]] if left_out > 0 else list(found)
    for index, piece in enumerate(shown, start=1):
        if piece is None:
            text.append(f" … {left_out} more … ", style="italic cyan")
            continue
        said = visible(piece.text)
        said = said.removesuffix("\n") if index == len(shown) else said
        text.append(said.replace("\n", "\n" + lead), style=STYLES[piece.kind])
    return text
