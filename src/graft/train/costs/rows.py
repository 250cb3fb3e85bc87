"""What the rows of a run are like, and how long they take. Knows the plan and the encoded data; no weights.

The rows are the run's own, of steps taken evenly from the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from graft.model.memory.count import ATTENTION, HEAD, Work
from graft.model.memory.machine import Rates
from graft.model.trees import TreeLM
from graft.train.costs.cost import Size, size_of
from graft.train.prepare import Prepared
from graft.types import Row

MOST_STEPS = 200
"""Steps whose rows are built to learn the rows of all."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a run under one row budget."""

    steps: int
    """Of the whole run."""
    looked_at: int
    """Steps whose rows were built."""
    per_step: float
    size: Size
    """Of the mean step."""
    tokens: float
    """Of the examples of the mean step, each counted as if it were computed alone."""
    heaviest: tuple[Row, ...]
    """The row with the most nodes, and the one with the most pairs where it has twice as many."""

    @property
    def sharing(self) -> float:
        """How many times more one example per row would compute."""
        return self.tokens / self.size.nodes


def look_at_rows(prepared: Prepared, row_tokens: int, lm: TreeLM) -> Rows:
    """Build the rows of some steps and learn what they are like."""
    plan = prepared.plan
    chosen = np.unique(np.linspace(0, plan.total_steps - 1, MOST_STEPS).astype(np.int64))
    sums = np.zeros(6)
    largest: Row | None = None
    deepest: Row | None = None
    most_nodes = most_pairs = 0.0
    for step in chosen:
        examples = prepared.train.examples(plan.step(int(step)))
        rows = lm.rows(examples, row_tokens)
        sums[:2] += len(rows), sum(len(example.ids) for example in examples)
        for row in rows:
            size = size_of(row)
            sums[2:] += size.nodes, size.predictors, size.pairs, size.runs
            if size.nodes > most_nodes:
                largest, most_nodes = row, size.nodes
            if size.pairs > most_pairs:
                deepest, most_pairs = row, size.pairs
    assert largest is not None
    assert deepest is not None
    heaviest = (largest,) if 2 * size_of(largest).pairs > most_pairs else (largest, deepest)
    count, tokens, *mean = (sums / len(chosen)).tolist()
    return Rows(plan.total_steps, len(chosen), count, Size(*mean), tokens, heaviest)


def seconds_of(work: Work, rates: Rates, attention: bool = False) -> float:
    """Time of some work at measured speeds."""
    speed = rates.attention if attention else rates.products
    return work.products / speed + work.moved / rates.moved + work.operations * rates.operation


def seconds_for(works: Mapping[str, Work], counted: Size, wanted: Size, rates: Rates) -> float:
    """Time of rows of the `wanted` size, from the work of a counted one.

    Layers grow with nodes, the head with predictors, attention's products with pairs and its calls with runs.
    """
    total = 0.0
    nodes = wanted.nodes / counted.nodes
    for name, work in works.items():
        times = (nodes, nodes, nodes)
        if name == ATTENTION:
            times = (wanted.pairs / counted.pairs, nodes, wanted.runs / counted.runs)
        elif name == HEAD:
            times = (wanted.predictors / max(1, counted.predictors),) * 3
        scaled = Work(work.products * times[0], work.moved * times[1], work.operations * times[2])
        total += seconds_of(scaled, rates, attention=name == ATTENTION)
    return total
