"""Token trees: examples that share a prefix share its nodes. Knows ids and numpy; no text, no tensors.

Sorted by their ids, examples with a common prefix stand side by side, and each contributes only what lies beyond its
longest common prefix with the one before it (front coding, Witten, Moffat & Bell, "Managing Gigabytes", 4.1). What
they contribute, in that order, is a forest in depth-first order. For example

    [1 2 3 4]                 nodes   1 2 3 4 7 8 9
    [1 2 7 8]       --->      depth   0 1 2 3 2 3 0
    [9]                       parent -1 0 1 2 1 4 -1
                              end     6 6 4 4 6 6 7

The label shift lives here and nowhere else: node i is predicted from the hidden state of parent[i].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from graft.types import Example, IntArray, Row

SHORTEST_RUN = 16
"""Sharing fewer tokens than this costs more, by an attention call of their own, than computing them again."""
PADDING_RUN = 128
"""Nodes of one path of padding: short, so that its attention costs little, and not one node, of which each would be a
sequence of its own."""


Path = npt.NDArray[np.int64]
"""[L] the nodes of one example, root first."""


def build_rows(examples: Sequence[Example], row_tokens: int, share: bool = True, shortest_run: int = 1) -> list[Row]:
    """Merge examples into trees and cut the forest into rows of at most `row_tokens` nodes.

    An example is never cut: where one does not fit into what is left of a row, the next row begins with it, and what
    it shared with the row before is computed again. With `share` false every row is a single example. A branch less
    than `shortest_run` nodes below another one begins there instead: siblings may then begin with the same tokens,
    which changes no number.

    Raises:
        ValueError: an example is empty or longer than `row_tokens`.
    """
    return [row for row, _ in rows_with_paths(examples, row_tokens, share, shortest_run)]


def rows_with_paths(
    examples: Sequence[Example], row_tokens: int, share: bool = True, shortest_run: int = 1
) -> list[tuple[Row, list[tuple[Example, Path]]]]:
    """The rows of `build_rows`, each with its examples and the nodes that each of them passes through, root first."""
    rows: list[tuple[Row, list[tuple[Example, Path]]]] = []
    forest = _Forest()
    ordered = sorted(examples, key=lexicographic)
    for example, shared in zip(ordered, _shared(ordered, shortest_run), strict=True):
        length = len(example.ids)
        if not 0 < length <= row_tokens:
            raise ValueError(
                f"example of {example.conversation}: {length} tokens do not fit into a row of {row_tokens}"
            )
        full = forest.size + length - shared > row_tokens
        if forest.size and (full or not share):
            rows.append((forest.row(), forest.paths()))
            forest = _Forest()
        forest.add(example, shared if forest.size else 0)
    if forest.size:
        rows.append((forest.row(), forest.paths()))
    return rows


def lexicographic(example: Example) -> tuple[bytes, str, int]:
    """Big-endian bytes compare as the ids do; ties are broken so that the order never depends on the input's."""
    return example.ids.astype(">i4").tobytes(), example.conversation, example.turn


def _shared(ordered: Sequence[Example], shortest_run: int) -> list[int]:
    """How many tokens each example shares with the one before it.

    That is their longest common prefix, except where it ends less than `shortest_run` below the branch above it: then
    it is that branch's depth. Branches are found from the root: the least common prefix within a group of neighbours
    is where the group first branches, and cuts it into groups that branch further down.
    """
    common = [0, *(common_length(a.ids, b.ids) for a, b in itertools.pairwise(ordered))]
    shared = list(common)
    groups = [(1, len(ordered), 0)]  # examples first-1 to last-1, and the depth of the branch above them
    while groups:
        first, last, above = groups.pop()
        if first >= last:
            continue
        depth = min(common[first:last])
        branch = depth if depth - above >= shortest_run else above
        for index in range(first, last):
            if common[index] == depth:
                shared[index] = branch
                groups.append((first, index, branch))
                first = index + 1
        groups.append((first, last, branch))
    for index in range(1, len(ordered)):
        if common[index] == len(ordered[index - 1].ids):  # it goes on where that one ended: no branch
            shared[index] = common[index]
    return shared


def common_length(a: IntArray, b: IntArray) -> int:
    """Length of the longest common prefix."""
    most = min(len(a), len(b))
    differs = np.flatnonzero(a[:most] != b[:most])
    return int(differs[0]) if len(differs) else most


class _Forest:
    """A forest that grows at its right edge; `path` is the way from the root to the last leaf."""

    def __init__(self) -> None:
        self.size = 0
        self.path: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self.added: list[tuple[Example, int, npt.NDArray[np.int64]]] = []

    def add(self, example: Example, shared: int) -> None:
        new = np.arange(self.size, self.size + len(example.ids) - shared)
        self.path = np.concatenate([self.path[:shared], new])
        self.size += len(new)
        self.added.append((example, shared, self.path))

    def paths(self) -> list[tuple[Example, Path]]:
        """What was added, and where it lies."""
        return [(example, path) for example, _, path in self.added]

    def row(self) -> Row:
        """The arrays of what was added."""
        ids, depth, parent = (np.empty(self.size, np.int32) for _ in range(3))
        end = np.full(self.size, self.size, np.int32)
        weight = np.zeros(self.size, np.float32)
        multiplicity = np.zeros(self.size, np.int32)
        previous: npt.NDArray[np.int64] = np.empty(0, np.int64)
        start = 0
        for example, shared, path in self.added:
            end[previous[shared:]] = start  # the branch that this example left behind is complete
            new = path[shared:]
            ids[new] = example.ids[shared:]
            depth[new] = np.arange(shared, len(path), dtype=np.int32)
            if len(new):
                parent[new] = new - 1
                parent[new[0]] = path[shared - 1] if shared else -1
            weight[path] += example.weights
            multiplicity[path] += 1
            previous, start = path, start + len(new)
        names = dict.fromkeys(example.conversation for example, _, _ in self.added)
        return Row(ids, depth, parent, end, weight, multiplicity, tuple(names))


@dataclass(frozen=True, slots=True)
class Segments:
    """A row's maximal unbranched runs of nodes, in order: attention is computed once for each.

    Every node of a run has the same ancestors outside it, and the path from the root to a node has one node for each
    depth 0, 1, 2, ...: a run's queries see the keys of its ancestors' runs, in order, and then causally its own.
    """

    sizes: tuple[int, ...]
    """Number of nodes of each run; they add up to N."""
    ancestors: tuple[tuple[int, ...], ...]
    """For each run, the indices of the runs on the way from the root to it, itself left out."""
    offsets: tuple[int, ...]
    """Depth of each run's first node: the number of keys that its ancestors have."""


def segments(row: Row) -> Segments:
    """Cut a row where a branch begins or a tree ends."""
    index = np.arange(len(row))
    begins = row.parent != index - 1
    begins[1:] |= row.end[1:] != row.end[:-1]  # the node before has other children too
    begins[0] = True
    starts = np.flatnonzero(begins)
    of_node = np.cumsum(begins) - 1
    ancestors: list[tuple[int, ...]] = []
    for start in starts:
        parent = row.parent[start]
        above = int(of_node[parent]) if parent >= 0 else -1
        ancestors.append((*ancestors[above], above) if above >= 0 else ())
    sizes = np.diff(np.append(starts, len(row)))
    return Segments(tuple(sizes.tolist()), tuple(ancestors), tuple(row.depth[starts].tolist()))


def padded(row: Row, size: int) -> Row:
    """The row followed by as many nodes of no meaning as make it `size` long, for kernels that want few shapes.

    They are paths of their own, of at most `PADDING_RUN` nodes, of token 0 and weight 0: no other node sees them and
    nothing is learnt from them.

    Raises:
        ValueError: the row is longer than `size`.
    """
    missing = size - len(row)
    if missing < 0:
        raise ValueError(f"a row of {len(row)} nodes cannot be padded to {size}")
    if missing == 0:
        return row
    index = np.arange(missing, dtype=np.int32)
    depth = index % PADDING_RUN
    parent = np.where(depth == 0, -1, index - 1 + len(row)).astype(np.int32)
    end = np.minimum(index - depth + PADDING_RUN, missing) + len(row)
    return Row(
        ids=np.concatenate([row.ids, np.zeros(missing, np.int32)]),
        depth=np.concatenate([row.depth, depth]),
        parent=np.concatenate([row.parent, parent]),
        end=np.concatenate([row.end, end.astype(np.int32)]),
        weight=np.concatenate([row.weight, np.zeros(missing, np.float32)]),
        multiplicity=np.concatenate([row.multiplicity, np.zeros(missing, np.int32)]),
        conversations=row.conversations,
    )


def path_starts(row: Row) -> npt.NDArray[np.int64] | None:
    """First node of each tree where every tree of the row is an unbranched path; None where one branches."""
    index = np.arange(len(row))
    root = row.parent < 0
    if not bool(np.all(root | (row.parent == index - 1))):
        return None
    return np.flatnonzero(root)


def visible(row: Row) -> npt.NDArray[np.bool_]:
    """[N, N] which key (column) each query (row) sees, written out: the reference for tests, never for speed."""
    index = np.arange(len(row))
    seen: npt.NDArray[np.bool_] = (index[None, :] <= index[:, None]) & (index[:, None] < row.end[None, :])
    return seen


def targets(row: Row) -> npt.NDArray[np.int64]:
    """Indices of the nodes that are trained on: weight > 0 and something to be predicted from."""
    return np.flatnonzero((row.weight != 0) & (row.parent >= 0))


@dataclass(frozen=True, slots=True)
class Sharing:
    """What merging saved."""

    tokens: int
    """Tokens of all examples, each counted as if it were computed alone."""
    nodes: int
    """Nodes that are computed."""

    @property
    def ratio(self) -> float:
        """How many times more one example per row would compute; 1 is no sharing."""
        return self.tokens / self.nodes if self.nodes else 1.0


def sharing(examples: Iterable[Example], rows: Iterable[Row]) -> Sharing:
    """Compare the examples' lengths with the nodes they became."""
    return Sharing(sum(len(example.ids) for example in examples), sum(len(row) for row in rows))


def total_weight(examples: Iterable[Example]) -> float:
    """The denominator of the loss: the sum of all target weights, in float64."""
    return float(sum(float(np.sum(example.weights, dtype=np.float64)) for example in examples))
