"""A row split over processes (context parallelism): what one of them computes, and where it finds all keys and values.

Everything in a decoder but attention treats each node by itself. So each process of a group of neighbours computes some
nodes of the row, and at attention it collects the keys and values of all nodes and computes those of its own queries.
In the backward pass each process has a part of the gradient of every key; they are sent to whoever holds the node and
added up there. Gradients of weights are partial sums over nodes then, as they are over rows: what adds them up between
all processes anyway is enough.

Shapes: P processes of a group, N nodes of a row, n = N / P nodes of a process, K key heads, D head size, F features of
a node's keys and values together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from graft.errors import ConfigError
from graft.model.device import scratch, send
from graft.model.processes.ranks import COLLECTIVE_TIMEOUT, Ranks
from graft.tokens.deal import Prices
from graft.tokens.split_row import BLOCKS, Held, held_by, nodes_of, split_row
from graft.types import Row

all_gather: Any = vars(dist).get("all_gather_single") or dist.all_gather_into_tensor
"""Into one tensor, which takes no copy; torch renamed it in 2.13."""


def refuse_split_rows(size: int, ranks: Ranks) -> None:
    """Find before anything is read that rows cannot be split over so many processes.

    Raises:
        ConfigError: there is one process, or they cannot be divided so.
    """
    if size > 1 and ranks.size == 1:
        raise ConfigError(
            f"context_ranks: a row is to be split over {size} processes, but this run has 1; start it with graft train "
            f"--gpus {size} (or a multiple of {size}), or set context_ranks=1"
        )
    if ranks.size % size:
        raise ConfigError(
            f"context_ranks: {size} processes to a row, but {ranks.size} processes cannot be divided so; choose a "
            f"divisor of {ranks.size}"
        )


class Context:
    """The neighbouring processes that compute every row together, and this one among them."""

    def __init__(self, size: int, index: int, group: Any, asks_again: bool = False) -> None:
        """`index` is this process's among the `size` of its group.

        With `asks_again` no layer keeps the other processes' keys and values until its backward pass, which collects
        them once more. It must be left out where what is kept is governed by others (checkpointing, offloading).
        """
        self.size = size
        self.index = index
        self.group = group
        self.asks_again = asks_again
        self.prices = Prices()
        self.longest: int | None = None
        """Depth of the deepest node of the row at hand; None while rows are whole."""

    @classmethod
    def connect(cls, ranks: Ranks, size: int, asks_again: bool = False) -> Context:
        """Connect each `size` neighbours; all processes must do so at the same time."""
        group, _ = dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)
        return cls(size, ranks.rank % size, group, asks_again)

    @property
    def least(self) -> int:
        """A row's nodes must be a multiple of this."""
        return self.size * BLOCKS

    def share(self, row: Row, device: torch.device) -> Share:
        """What this process computes of a row."""
        return Share(self, row, device)

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process of the run. All must ask."""
        found = torch.tensor(float(flag))
        dist.all_reduce(found)
        return bool(found > 0)


class Share:
    """The nodes of one row that this process computes."""

    def __init__(self, context: Context, row: Row, device: torch.device) -> None:
        self.context = context
        self.size = len(row)
        self.longest = int(row.depth.max())
        owner = split_row(row, context.size, context.prices)
        self.of_all = [held_by(owner, self.size, process) for process in range(context.size)]
        """For each process what it holds."""
        self.nodes = nodes_of(self.held)
        """[n] numbers of the nodes, in order."""
        self.place = np.full(self.size, -1)
        """[N] place of each node among those of this process; -1 where it is another's."""
        self.place[self.nodes] = np.arange(len(self.nodes))
        self.queries = send(self.nodes, device)
        """[n] the same numbers on the device."""
        self.in_order = sorted(
            (piece.first, process, piece) for process, its in enumerate(self.of_all) for piece in its
        )

    @property
    def held(self) -> list[Held]:
        """What this process holds."""
        return self.of_all[self.context.index]

    def attend(self, compute: Callable[[Tensor, Tensor], Tensor], key: Tensor, value: Tensor) -> Tensor:
        """What `compute` makes of the keys and values [1, K, N, D] of all nodes, given this process's [1, K, n, D]."""
        key, value = _in_one_format(key, value)
        kept = _Kept(self, key, value)
        keys: Tensor
        values: Tensor
        keys, values = _Collected.apply(key, value, kept)  # type: ignore[no-untyped-call]
        if not (self.context.asks_again and torch.is_grad_enabled()):
            kept.mine = None
            return compute(keys, values)
        kept.known = [tensor.untyped_storage().data_ptr() for tensor in (keys, values)]
        with saved_tensors_hooks(kept.keep, kept.give_back):
            return compute(keys, values)


def _in_one_format(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """In the format in which they will be multiplied: fewer bytes travel, and both in one message."""
    kind = key.device.type
    wanted = torch.promote_types(key.dtype, value.dtype)
    if torch.is_autocast_enabled(kind):
        wanted = torch.get_autocast_dtype(kind)
    return key.to(wanted), value.to(wanted)


class _Kept:
    """One layer's keys and values of this process, and those of all as long as they are wanted."""

    def __init__(self, share: Share, key: Tensor, value: Tensor) -> None:
        self.share = share
        self.forms = [(tensor.shape[1], tensor.shape[3]) for tensor in (key, value)]
        self.mine: Tensor | None = torch.cat([_by_node(tensor.detach()) for tensor in (key, value)], dim=1)
        """[n, F]; None once they are asked for no more."""
        self.known: list[int] = []
        """Where the whole keys and values lie while the forward pass uses them."""
        self.again: list[Tensor] = []
        """The whole ones, collected again for the backward pass."""

    def collect(self) -> list[Tensor]:
        """Keys and values [1, K, N, D] of all nodes."""
        assert self.mine is not None
        found = _room(self.share.size, self.mine.shape[1], self.mine).view(self.share.context.size, *self.mine.shape)
        all_gather(found.flatten(0, 1), self.mine, group=self.share.context.group)
        whole, start = [], 0
        for heads, size in self.forms:
            features = slice(start, start := start + heads * size)
            rows = _room(self.share.size, heads * size, self.mine)
            for first, process, piece in self.share.in_order:
                rows[first : piece.end] = found[process, piece.at : piece.at + piece.end - first, features]
            whole.append(rows.view(-1, heads, size).transpose(0, 1)[None])
        return whole

    def keep(self, tensor: Tensor) -> Any:
        """What the backward pass holds instead of a tensor: where it lies in the whole ones, or the tensor itself."""
        storage = tensor.untyped_storage().data_ptr()
        if storage in self.known:
            return self.known.index(storage), tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor if tensor.is_leaf else tensor.detach()

    def give_back(self, held: Any) -> Tensor:
        """The tensor that `keep` was given."""
        if isinstance(held, Tensor):
            return held
        if not self.again:
            self.again = self.collect()
        which, *view = held
        found: Tensor = self.again[which].as_strided(*view)
        return found

    def parts_of(self, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The gradient of this process's keys and values, from each process's gradients of all."""
        width_of_both = sum(heads * width for heads, width in self.forms)
        sent, got = (
            _room(self.share.size, width_of_both, grads[0]).view(self.share.context.size, -1, width_of_both)
            for _ in range(2)
        )
        start = 0
        for grad, (heads, width) in zip(grads, self.forms, strict=True):
            features = slice(start, start := start + heads * width)
            rows = _by_node(grad)
            for first, process, piece in self.share.in_order:
                sent[process, piece.at : piece.at + piece.end - first, features] = rows[first : piece.end]
        dist.all_to_all_single(got, sent, group=self.share.context.group)
        # As a lone process would: added up in fp32, rounded once.
        total = got.sum(0, dtype=torch.promote_types(got.dtype, torch.float32)).to(got.dtype)
        found = total.split([heads * width for heads, width in self.forms], dim=1)
        return [
            part.reshape(-1, heads, width).transpose(0, 1)[None]
            for part, (heads, width) in zip(found, self.forms, strict=True)
        ]


def _room(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] without values, for a short while: of one layer, so that the heap must not grow around it."""
    return scratch(rows, columns, like) if like.dtype == torch.float32 else like.new_empty(rows, columns)


def _by_node(tensor: Tensor) -> Tensor:
    """[1, K, n, D] as [n, K * D]."""
    return tensor[0].transpose(0, 1).flatten(1)


class _Collected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _key: Tensor, _value: Tensor, kept: _Kept) -> tuple[Tensor, ...]:
        ctx.kept = kept
        return tuple(kept.collect())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.kept.again = []
        key, value = ctx.kept.parts_of(grads)
        return key, value, None


def tell_longest(model: nn.Module, context: Context) -> None:
    """Let rotary positions that turn otherwise in long sequences decide by the whole row's largest position.

    Their modules take the largest position of what they are given; so they are given the row's beside this process's.
    """

    def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if context.longest is None:
            return None
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": _with(kwargs["position_ids"], context.longest)}
        return (args[0], _with(args[1], context.longest), *args[2:]), kwargs

    def drop(_module: nn.Module, _args: Any, _kwargs: Any, found: tuple[Tensor, ...]) -> Any:
        return found if context.longest is None else tuple(tensor[..., :-1, :] for tensor in found)

    for module in model.modules():
        kinds = vars(module).get("rope_type", "")
        if any(
            "dynamic" in kind or kind == "longrope" for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])
        ):
            module.register_forward_pre_hook(add, with_kwargs=True)
            module.register_forward_hook(drop, with_kwargs=True)


def _with(positions: Tensor, longest: int) -> Tensor:
    return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), longest)], dim=-1)


def counts_tokens(config: Mapping[str, Any]) -> str | None:
    """The setting by which an architecture goes by a token's index in what it is given; None for nearly all.

    No short row shows it: Llama 4 scales its queries anew every `floor_scale` tokens.
    """
    inner = (counts_tokens(value) for value in config.values() if isinstance(value, Mapping))
    own = "attn_temperature_tuning" if config.get("attn_temperature_tuning") and "floor_scale" in config else None
    return own or next((found for found in inner if found), None)
