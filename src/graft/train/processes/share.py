"""Which rows of a step this process computes. Knows models, examples and processes; computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from graft.errors import ConfigError
from graft.model.processes.ranks import Ranks
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import decoder_layers
from graft.tokens.deal import Prices, deal
from graft.types import Example, Row


@dataclass(frozen=True, slots=True)
class MyRows:
    """What one process computes of a step."""

    rows: list[Row]
    idle: list[Row]
    """Rows to compute for nothing, as often as another process has one row more than this one."""
    nodes: int
    """Nodes of all processes together, without the idle ones."""
    number: int = 0
    """Of the first row among those of the step; the next one's is `stride` more. Processes that compute rows together
    have the same numbers."""
    stride: int = 1

    def number_of(self, index: int) -> int:
        """A number for a row that no other row of the step has, in any process."""
        return self.number + index * self.stride


def rows_of_step(lm: TreeLM, examples: Sequence[Example], row_tokens: int, ranks: Ranks) -> MyRows:
    """This process's rows of some examples. Every process must ask at the same time where there are several."""
    return beside_others(lm, rows_of_rank(lm, examples, row_tokens, ranks, ranks.rank), examples, row_tokens, ranks)


def beside_others(lm: TreeLM, rows: list[Row], examples: Sequence[Example], row_tokens: int, ranks: Ranks) -> MyRows:
    """This process's rows of some examples, with what the number of the others' asks of it. All must ask together."""
    if ranks.size == 1:
        return MyRows(rows, [], sum(map(len, rows)))
    counts = ranks.counts(len(rows), sum(map(len, rows)))[:: lm.row_ranks]  # one of those that have the same rows
    missing = max(count for count, _ in counts) - len(rows)
    idle = lm.rows([shortest(examples[0])], row_tokens) * missing
    nodes = sum(nodes for _, nodes in counts)
    return MyRows(rows, idle, nodes, ranks.rank // lm.row_ranks, ranks.size // lm.row_ranks)


def rows_of_rank(lm: TreeLM, examples: Sequence[Example], row_tokens: int, ranks: Ranks, rank: int) -> list[Row]:
    """The rows of some examples that a process computes, alone or with others, as every process can tell."""
    groups = ranks.size // lm.row_ranks
    dealt = deal(examples, groups, prices_of(lm), lm.merges) if groups > 1 else [examples]
    return lm.rows(dealt[rank // lm.row_ranks], row_tokens)


def shortest(example: Example) -> Example:
    """An example's first two tokens, the second of them a target: the least that runs through a whole model."""
    return replace(example, ids=example.ids[:2], weights=np.array([0, 1], np.float32)[: len(example.ids)])


_known: WeakKeyDictionary[TreeLM, Prices] = WeakKeyDictionary()


def prices_of(lm: TreeLM) -> Prices:
    """Operations by the model's shape: two for each weight of its layers, four for each feature of a pair's heads."""
    if lm not in _known:  # a walk through all modules
        _known[lm] = _prices_of(lm)
    return _known[lm]


def _prices_of(lm: TreeLM) -> Prices:
    config = lm.base.config.get_text_config()
    head = sum(p.numel() for p in lm.head.parameters() if p.dim() == 2) if lm.base.get_output_embeddings() else 0
    try:
        layers = decoder_layers(lm.base)[1]
    except ConfigError:
        layers = [lm.decoder]
    weights = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() >= 2)
    return Prices(2.0 * weights, 4.0 * len(layers) * config.hidden_size, 2.0 * head)
