"""An optimiser whose rule looks at whole weights, where each process holds a part of them: weights dealt to processes.

Muon, Adafactor, GaLore and others look at rows, columns, blocks or singular vectors. Each weight is dealt to one
process, for good. In a step that process gets all parts of the weight and of its gradient, applies the rule to the
whole, and gives the parts back. So the work is shared, a state exists once, and the numbers are those of one process.

Weights go in rounds, the largest first, one to each process: no process holds more than one whole weight at a time.
What travels is the weight, its gradient, and the weight again. Knows parameters and processes; no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graft.errors import ConfigError
from graft.model.processes.shard import Holders, holders_of, local
from graft.train.updates.optimizers import Group, Together

Make = Callable[[list[Group]], torch.optim.Optimizer]
Round = Sequence[nn.Parameter]
"""At most one weight for each process, in the order of the processes."""


@dataclass(frozen=True, slots=True)
class _Mine:
    """A weight that was dealt to this process."""

    whole: nn.Parameter
    """Empty between two steps."""
    optimizer: torch.optim.Optimizer
    """Of this weight alone."""
    group: Group
    """That of all weights which are treated like it."""


class Dealt(torch.optim.Optimizer):
    """The interface of one optimiser over spread parameters; `state` holds what this process has of each."""

    def __init__(self, make: Make, groups: list[Group], dealt: Sequence[nn.Parameter]) -> None:
        """Deal some of the parameters.

        Args:
            make: the optimiser over some groups.
            groups: all parameters, as `make` would get them in one process.
            dealt: those of them that the rule looks at as a whole. The others are updated part by part.

        Raises:
            ConfigError: they are spread in another way than by rows.
        """
        super().__init__([{"params": group["params"]} for group in groups], {})
        given = {id(p): dict(group) for group in groups for p in group["params"]}
        self.rest = make(groups)
        self.param_groups = [dict(group) for group in self.rest.param_groups]
        self._share_state()
        whole = set(map(id, dealt))
        for group in self.rest.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in whole]
        self.holders = _holders(dealt)
        self.rounds = _rounds(dealt, self.holders.count)
        self.dealt = whole
        self.mine: dict[int, _Mine] = {}
        of = {id(p): group for group in self.param_groups for p in group["params"]}
        own = {id(weight) for weight in self.turns()}
        for weight in dealt:
            began = self.state.pop(weight, {})  # APOLLO gives each weight a seed by its place among all
            if id(weight) in own:
                self._take(weight, make, given[id(weight)], of[id(weight)], began)

    def _share_state(self) -> None:
        """One dictionary for all that this process has, whichever part keeps it."""
        self.state.update(self.rest.state)
        self.rest.state = self.state
        for part in self.rest.parts if isinstance(self.rest, Together) else ():
            part.state = self.state

    def _take(self, weight: nn.Parameter, make: Make, given: Group, group: Group, began: dict[str, Any]) -> None:
        whole = nn.Parameter(local(weight.detach()).new_empty(weight.shape))
        alone = make([given | {"params": [whole]}])
        whole.data = whole.data.new_empty(0)
        state = alone.state[whole]
        state.clear()
        state.update(began)
        self.state[weight] = state
        self.mine[id(weight)] = _Mine(whole, alone, group)

    def turns(self) -> Iterator[nn.Parameter | None]:
        """This process's weight in each round."""
        at = self.holders.number
        for weights in self.rounds:
            yield weights[at] if at < len(weights) else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; all processes must."""
        if closure is not None:
            raise NotImplementedError("a closure would compute the loss again")
        for group, its in zip(self.param_groups, self.rest.param_groups, strict=True):
            _follow(its, group)
        self.rest.step()
        for weights in self.rounds:
            self._update(weights)

    def _update(self, weights: Round) -> None:
        """One round: the copy of the weights that a weight was dealt to updates it, and tells the other copies."""
        holders = self.holders
        size = holders.of_copy
        for copy in range(holders.copies):
            here = weights[copy * size : (copy + 1) * size]
            graded = [weight for weight in here if weight.grad is not None]
            if not graded:
                continue
            if copy == holders.copy:
                self._update_here(here)
            if holders.copies > 1:
                parts = torch.cat([local(weight).reshape(-1) for weight in graded])
                dist.broadcast(parts, group_src=copy, group=holders.between)
                _put(graded, parts)

    def _update_here(self, weights: Round) -> None:
        """Parts of weights and gradients to whoever updates them, and parts of the updated weights back."""
        holders = self.holders
        graded = [weight for weight in weights if weight.grad is not None]
        own = weights[holders.part] if holders.part < len(weights) else None
        if own is not None and own.grad is None:
            own = None
        parts = [_two(weight) for weight in graded]
        sent = [2 * local(w).numel() if w.grad is not None else 0 for w in weights]
        sent += [0] * (holders.of_copy - len(sent))
        rows = _rows_of_parts(own, holders.of_copy) if own is not None else [0] * holders.of_copy
        width = own.numel() // own.shape[0] if own is not None else 0
        got = [2 * count * width for count in rows]
        gathered = _exchange(torch.cat(parts), sent, got, holders.within)
        updated = gathered.new_empty(0)
        if own is not None:
            halves = [part.chunk(2) for part in gathered.split(got) if part.numel()]
            updated = self._apply(own, *(torch.cat(its).view(own.shape) for its in zip(*halves, strict=True)))
        given = [count // 2 for count in got], [count // 2 for count in sent]
        _put(graded, _exchange(updated.reshape(-1), *given, holders.within))

    def _apply(self, weight: nn.Parameter, whole: Tensor, gradient: Tensor) -> Tensor:
        """The whole weight after the rule was applied to it."""
        mine = self.mine[id(weight)]
        (its,) = mine.optimizer.param_groups
        _follow(its, mine.group)
        mine.whole.data, mine.whole.grad = whole, gradient
        mine.optimizer.step()
        updated = mine.whole.data
        mine.whole.data, mine.whole.grad = updated.new_empty(0), None
        return updated

    def to_first(self, entries: Any) -> list[Any]:
        """Something of each process, in the first one; the others get nothing. All must ask."""
        found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(entries, found)  # by pickle, which processes of one run speak among themselves
        return found or []


def _follow(group: Group, other: Group) -> None:
    """Take over what may be set between steps: the rate, and whatever else belongs to a group."""
    group.update({key: value for key, value in other.items() if key != "params"})


def _holders(weights: Sequence[nn.Parameter]) -> Holders:
    found = [holders_of(weight) if isinstance(weight, DTensor) else None for weight in weights]
    first = found[0]
    if first is None or any(one != first for one in found):
        raise ConfigError(
            "this optimizer looks at whole weights, and can put those together that are spread by rows over one group "
            "of processes (shard_ranks); use adamw, lion, sgd or schedule_free_adamw"
        )
    return first


def _rounds(weights: Sequence[nn.Parameter], processes: int) -> list[Round]:
    """Weights of one format and about one size together."""
    found: list[Round] = []
    ordered = sorted(weights, key=lambda weight: (str(weight.dtype), -weight.numel()))
    for _, group in groupby(ordered, key=lambda weight: weight.dtype):
        its = list(group)
        found += [its[at : at + processes] for at in range(0, len(its), processes)]
    return found


def _rows_of_parts(weight: Tensor, parts: int) -> list[int]:
    """How many rows each process has: as many as torch.chunk would give, the last ones fewer or none."""
    rows = weight.shape[0]
    each = -(-rows // parts)
    return [max(0, min(each, rows - part * each)) for part in range(parts)]


def _two(weight: nn.Parameter) -> Tensor:
    """This process's part of a weight, and behind it that of its gradient; flat."""
    assert weight.grad is not None
    return torch.cat([local(weight).reshape(-1), local(weight.grad).to(weight.dtype).reshape(-1)])


def _exchange(sent: Tensor, to_each: Sequence[int], from_each: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """What the others of a group send to this process, in their order."""
    got = sent.new_empty(sum(from_each))
    dist.all_to_all_single(got, sent.contiguous(), list(from_each), list(to_each), group=group)
    return got


def _put(weights: Sequence[nn.Parameter], parts: Tensor) -> None:
    """Copy this process's parts, one behind the other, to where they belong."""
    sizes = [local(weight).numel() for weight in weights]
    for weight, part in zip(weights, parts.split(sizes), strict=True):
        local(weight).copy_(part.view_as(local(weight)))
