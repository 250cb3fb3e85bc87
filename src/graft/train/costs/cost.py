"""What one row and one update cost: bytes and work, counted on a model without weights. Knows rows, not runs."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graft.config.train import Train
from graft.model.fused.linear import few_pieces
from graft.model.memory.count import Counter, Work
from graft.tokens.tree import segments, targets
from graft.train.costs.hollow import Hollow, NotCountable, countable
from graft.train.loss import PLAIN, Objective, row_loss
from graft.train.tuning import embeddings_of
from graft.train.updates.optim import make_optimizer
from graft.types import Row


@dataclass(frozen=True, slots=True)
class Size:
    """A row, or the mean step, in the quantities with which work grows."""

    nodes: float
    predictors: float
    """Nodes whose logits are computed."""
    pairs: float
    """Of a query and a key that it sees: each node sees its path and itself."""
    runs: float
    """Unbranched runs of nodes: attention calls per layer."""


def size_of(row: Row) -> Size:
    """The row's quantities."""
    pairs = int(np.sum(row.depth, dtype=np.int64)) + len(row)
    return Size(len(row), len(targets(row)), pairs, len(segments(row).sizes))


@dataclass(frozen=True, slots=True)
class RowCost:
    """One row forward and backward, with the gradients of the rows before it in place."""

    size: Size
    peak: Mapping[str, float]
    """Bytes beside weights, gradients and optimizer states at the worst moment, by part of the model."""
    forward: Mapping[str, Work]
    backward: Mapping[str, Work]


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """The optimizer's step."""

    states: int
    """Bytes that stay."""
    passing: int
    """Bytes more at its worst moment."""
    work: Work


@dataclass(slots=True)
class _Run:
    kept: Tally[str]
    """Bytes alive after the forward pass."""
    peak: Tally[str]
    """At the worst moment while layers keep something."""
    after: Tally[str]
    """At the worst moment after that, while a trained embedding gets its gradient."""
    forward: dict[str, Work]
    backward: dict[str, Work]


def count_row(model: Hollow, row: Row, objective: Objective = PLAIN) -> RowCost:
    """Count a row with the last layer alone, then with one more of each kind, and add up for all layers.

    Every layer but one of each kind adds what it keeps for the backward pass to the worst moment.

    Raises:
        NotCountable: the model's operations depend on numbers.
    """
    with _countable(model), model.with_layers():
        last = _run(model, row, objective)
    peak, after, kept = Tally(last.peak), Tally(last.after), Tally[str]()
    works = [dict(last.forward), dict(last.backward)]
    for index, count in model.kinds.items():
        with _countable(model), model.with_layers(index):
            two = _run(model, row, objective)
        per_layer = Tally(two.kept)
        per_layer.subtract(last.kept)
        kept.update({name: size * count for name, size in per_layer.items()})
        without = Tally(two.peak)
        without.subtract(per_layer)
        if without.total() > peak.total():
            peak = without
        for total, ours, its in zip(works, (two.forward, two.backward), (last.forward, last.backward), strict=True):
            for name, work in ours.items():
                total[name] = total.get(name, Work()).plus(work.plus(its.get(name, Work()), -1), count)
    peak.update(kept)
    return RowCost(size_of(row), dict(peak if peak.total() > after.total() else after), *works)


def _run(model: Hollow, row: Row, objective: Objective) -> _Run:
    lm = model.lm
    parameters = [p for p in lm.model.parameters() if p.requires_grad]
    counter = Counter()
    with model.mode, few_pieces():
        tree = lm.place(row)
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        counter.ignore(*lm.model.parameters(), *lm.model.buffers(), *gradients)
        before: list[Tally[str]] = []
        with counter, _below_layers(lm.embedding, lambda: before.append(counter.restart_peak())):
            with model.precision.autocast(model.device):
                loss = row_loss(lm, tree, objective).loss
            if lm.on_trees and not tree.calls:
                raise NotCountable(f"{type(lm.base).__name__} cannot be counted: it has attention code of its own")
            kept, forward = Tally(counter.counted.alive), counter.counted.work
            counter.counted.work = {}
            if loss.requires_grad:
                loss.backward()
    for parameter in parameters:
        parameter.grad = None
    peak, after = (before[0], counter.counted.peak) if before else (counter.counted.peak, Tally[str]())
    return _Run(kept, peak, after, forward, counter.counted.work)


@contextmanager
def _below_layers(embedding: nn.Module, reached: Callable[[], None]) -> Iterator[None]:
    """Say when the backward pass has left the layers, and what they kept is gone; never where it ends before."""

    def watch(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _grad: reached())

    handle = embedding.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def count_update(model: Hollow, settings: Train) -> UpdateCost:
    """Count the optimizer's first step, in which its states come to be.

    Raises:
        NotCountable: the optimizer's operations depend on numbers.
    """
    counter = Counter(scalar=1.0)  # what is asked for is the number of the step
    with countable(f"optimizer={settings.optimizer}"):
        optimizer = make_optimizer(model.trained, embeddings_of(model.lm, settings), settings)
        if hasattr(optimizer, "fill_qmap"):  # bitsandbytes' tables of eight-bit numbers are made of numbers
            optimizer.fill_qmap()
    with countable(f"optimizer={settings.optimizer}"), model.mode:
        for parameter in model.trained.values():
            parameter.grad = torch.empty_like(parameter)
        gradients = [p.grad for p in model.trained.values() if p.grad is not None]
        counter.ignore(*model.trained.values(), *gradients)
        with counter:
            if not settings.optimizer_in_backward:
                torch.nn.utils.get_total_norm(gradients)
            optimizer.step()
    for parameter in model.trained.values():
        parameter.grad = None
    states = counter.counted.alive.total()
    work = Work()
    for of_part in counter.counted.work.values():
        work = work.plus(of_part)
    return UpdateCost(states, max(0, counter.counted.peak.total() - states), work)


def _countable(model: Hollow) -> AbstractContextManager[None]:
    return countable(type(model.lm.base).__name__)
