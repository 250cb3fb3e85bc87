"""What layers that are cut over processes are made of: sums between processes, and weights as they are computed with.

Knows tensors, modules and groups of processes; no plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

Use = Callable[[DTensor], Tensor]
"""What a forward pass computes with, of a weight as it is kept."""
Change = Callable[[Tensor], Tensor]


def as_kept(weight: DTensor) -> Tensor:
    """This process's part; or all of it, where all processes compute the same."""
    mine: Tensor = weight.to_local()
    return mine


def summed(weight: DTensor) -> Tensor:
    """All of a weight that is kept whole; its gradient is the sum of all processes'."""
    mine: Tensor = weight.to_local(grad_placements=[Partial()])
    return mine


def share(weight: DTensor) -> Tensor:
    """What each process adds of a bias, where what they add is summed."""
    return summed(weight) / weight.device_mesh.size()


def gathered(weight: DTensor) -> Tensor:
    """All of a weight, whatever of it is kept; its gradient is the sum of all processes'."""
    found: Tensor = weight.full_tensor(grad_placements=[Partial()])
    return found


@dataclass(frozen=True, slots=True)
class Slot:
    """A weight in its module, and how it is used."""

    module: nn.Module
    name: str
    use: Use


@dataclass(frozen=True, slots=True)
class InPlace:
    """What stands in a module in the place of a weight."""

    module: nn.Module
    name: str
    tensor: Tensor


@contextmanager
def in_use(slots: Sequence[Slot]) -> Iterator[list[InPlace]]:
    """Modules have what they compute with in the place of what is kept; tied weights are gathered once."""
    made: dict[int, Tensor] = {}
    found = []
    for slot in slots:
        kept: Any = slot.module._parameters[slot.name]
        if id(kept) not in made:
            made[id(kept)] = slot.use(kept)
        found.append(InPlace(slot.module, slot.name, made[id(kept)]))
    with put_in_place(found):
        yield found


@contextmanager
def put_in_place(tensors: Sequence[InPlace]) -> Iterator[None]:
    """Modules have these tensors within, and afterwards what they had before."""
    before = [one.module._parameters[one.name] for one in tensors]
    for one in tensors:
        one.module._parameters[one.name] = one.tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        for one, kept in zip(tensors, before, strict=True):
            one.module._parameters[one.name] = kept


def meet_around(region: nn.Module, group: dist.ProcessGroup) -> None:
    """Let a module that computes a part take what is whole, and give what is whole."""

    def met(value: Any) -> Any:
        trained = isinstance(value, Tensor) and value.requires_grad  # hidden states, and the weights of experts
        return gradients_meet(value, group) if trained else value

    def before(_region: nn.Module, args: Any, kwargs: Any) -> Any:
        return tuple(map(met, args)), {name: met(value) for name, value in kwargs.items()}

    def after(_region: nn.Module, _args: Any, output: Any) -> Any:
        return with_output(output, lambda x: sum_up(x, group))

    region.register_forward_pre_hook(before, with_kwargs=True)
    region.register_forward_hook(after)


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], change: Change) -> tuple[Any, dict[str, Any]]:
    """The arguments of a call with other hidden states: the first one, or those that are named so."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def with_output(output: Any, change: Change) -> Any:
    """What a module returns with other hidden states: the first of a tuple, or all there is."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


class PartOfDropout(nn.Dropout):
    """Dropout on a process's part of the last dimension, with the numbers that one process draws for all of it."""

    def __init__(self, p: float, part: int, parts: int) -> None:
        super().__init__(p)
        self.part, self.parts = part, parts

    def forward(self, x: Tensor) -> Tensor:
        """[..., features / parts] -> the same."""
        if not self.training:
            return x
        factors = F.dropout(x.new_ones(*x.shape[:-1], x.shape[-1] * self.parts), self.p)
        return x * factors.chunk(self.parts, -1)[self.part]


def norm_over(norm: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """Norms of rows of which each process has some columns; without a gradient, as DoRA takes them."""

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            mine = norm(*args, **kwargs)
            squares = mine.float().square()
            dist.all_reduce(squares, group=group)
            return squares.sqrt().to(mine.dtype)

    return whole


def gradients_meet(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward as it is; backward the sum of all processes' gradients."""
    found: Tensor = _Meet.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def sum_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Forward the sum of all processes' tensors; backward as it is."""
    found: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return found


def share_gradient(x: Tensor, processes: int) -> Tensor:
    """Forward as it is; backward a process's share of a gradient that all have, so that their sum is it."""
    found: Tensor = _Share.apply(x, processes)  # type: ignore[no-untyped-call]
    return found


class _Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _sum(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: int) -> Tensor:
        ctx.processes = processes
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad / ctx.processes, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    summed_up = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed_up, group=group)
    return summed_up
