"""A model's weights spread over the processes of a run (FSDP2), and single tensors made whole again.

Every process keeps a part of each weight; a decoder layer's weights are whole only while that layer computes, the
embedding's and the head's while a row does (Zhao et al. 2023, arXiv:2304.11277). Gradients are added up, not averaged:
the loss is divided by the weight of the whole step already. Knows modules and processes; no rows and no steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel

from graft.errors import ConfigError
from graft.model.processes.packed import make_divisible
from graft.model.processes.ranks import Ranks
from graft.model.tuned.adapters import decoder_layers, plain

T = TypeVar("T")
Enter = Callable[[Callable[[], T]], T]


def mesh_of(ranks: Ranks, device: torch.device, holders: int, tensor: int = 1) -> DeviceMesh:
    """The processes as a grid: `tensor` neighbours compute each layer between them, `holders` such groups hold one copy
    of the weights between them, the rest are copies.

    Raises:
        ConfigError: see `refuse_holders`.
    """
    refuse_holders(ranks, holders, tensor)
    groups = ranks.size // tensor
    wanted = {"copy": groups // holders, "shard": holders, "tensor": tensor}
    sizes = {name: size for name, size in wanted.items() if size > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def refuse_holders(ranks: Ranks, holders: int, tensor: int) -> None:
    """Find before anything is read that the processes cannot be divided so.

    Raises:
        ConfigError: they cannot; names both numbers.
    """
    groups = ranks.size // tensor
    if groups % holders:
        raise ConfigError(
            f"shard_ranks: {holders} processes to a copy of the weights, but {groups} processes cannot be divided "
            f"so; choose a divisor of {groups}, all, or host"
        )


def shard(
    model: PreTrainedModel | PeftModel,
    mesh: DeviceMesh,
    compute: torch.dtype | None = None,
    offload: bool = False,
    prepare: Callable[[nn.Module], None] = lambda _module: None,
) -> Enter[Any]:
    """Spread a model over a mesh, in place; returns what must surround whatever computes with its weights.

    Quantised weights of a format that model/processes/packed.py does not know stay whole in every process. `compute` is
    the format in which trained weights travel and compute, None as they are kept; gradients always travel in fp32.
    `offload` keeps the parts in the host's memory between uses. `prepare` is called with each layer, and then with the
    model, right before its weights are spread.
    """
    how: dict[str, Any] = {
        "mesh": mesh[tuple(name for name in mesh.mesh_dim_names or () if name != "tensor")],
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
        ),
        # Pinned for the copies to an accelerator; there is nothing to copy to on a CPU.
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy(),
    }
    try:
        layers = list(decoder_layers(plain(model))[1])
    except ConfigError:  # no list of layers: the model is one piece, whole while it computes
        layers = []
    for module in (*layers, model):
        prepare(module)
        packed = make_divisible(module)
        whole = {p for p in module.parameters() if p not in packed and not _divisible(p)}
        fully_shard(module, ignored_params=whole, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    root: Any = model
    root.compute_inside = MethodType(lambda _self, run: run(), model)
    register_fsdp_forward_method(model, "compute_inside")

    def enter(run: Callable[[], Any]) -> Any:
        found = root.compute_inside(run)
        if not torch.is_grad_enabled():
            give_back(model)
        return found

    return enter


def give_back(model: nn.Module) -> None:
    """Leave each process its part after a forward pass that no backward pass follows.

    That would do it; else the weights outside of the layers stay whole, and a change of them would be lost on those.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def sum_gradients(model: nn.Module, last: bool, few: bool) -> None:
    """Say whether the next backward pass is the last one of a step, after which gradients are whole.

    Before it the sum between copies waits in any case: a process keeps the gradients of its own part, as it would
    anyway. Where `few` weights are trained no gradient leaves its process before: each then holds all of them.
    """
    if isinstance(model, FSDPModule):
        if few:
            model.set_requires_gradient_sync(last)
        else:
            model.set_requires_all_reduce(last)


def _divisible(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) or (type(parameter) is nn.Parameter and parameter.is_floating_point())


def everywhere(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, where it is, in every process. All must ask, in the same order."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    found: Tensor = tensor.full_tensor().detach()
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts, on the host: to be written by the first process, the others get nothing of it.

    All must ask, in the same order.
    """
    found = everywhere(tensor)
    return found.new_empty(0) if isinstance(tensor, DTensor) and dist.get_rank() else found.cpu()


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor as the parameter is kept: on its device, and of it the parts that this process holds.

    `value` must be the same in every process.
    """
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    made = distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
    return made.to(parameter.device)  # from the mesh's device, which is another where parts are kept on the host


def computed_on(tensor: Tensor) -> torch.device:
    """The device that computes with a tensor, wherever this process keeps its part of it."""
    kind = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device.type
    if kind == tensor.device.type:
        return tensor.device
    return torch.device(kind, torch.accelerator.current_device_index())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class Holders:
    """Where this process stands among those that hold a spread tensor: its part of it, and which of the copies."""

    part: int
    of_copy: int
    """Parts of a copy."""
    within: dist.ProcessGroup
    """The processes of this copy."""
    copy: int = 0
    copies: int = 1
    between: dist.ProcessGroup | None = None
    """The processes that hold the same part; None where there is one copy."""

    @property
    def number(self) -> int:
        """Of this process among all, those of the first copy first."""
        return self.copy * self.of_copy + self.part

    @property
    def count(self) -> int:
        """Of all processes."""
        return self.copies * self.of_copy


def holders_of(tensor: DTensor) -> Holders | None:
    """Who holds a tensor that is spread by its rows over one group of processes; None for other ways."""
    mesh, placements = tensor.device_mesh, tensor.placements
    by_rows = [dim for dim, placement in enumerate(placements) if placement == Shard(0)]
    copied = [dim for dim, placement in enumerate(placements) if placement.is_replicate()]
    if len(by_rows) != 1 or len(copied) > 1 or len(by_rows) + len(copied) != len(placements):
        return None
    (row,) = by_rows
    found = Holders(mesh.get_local_rank(row), mesh.size(row), mesh.get_group(row))
    for dim in copied:
        found = replace(found, copy=mesh.get_local_rank(dim), copies=mesh.size(dim), between=mesh.get_group(dim))
    return found


def first_of(tensor: Tensor) -> int:
    """Place of the first number that this process has among all numbers of a tensor, row by row.

    Raises:
        ConfigError: it is spread in another way than by rows.
    """
    if not isinstance(tensor, DTensor):
        return 0
    holders = holders_of(tensor)
    if holders is None:
        raise ConfigError("master_weights=stochastic wants weights that are spread by rows (shard_ranks); use fp32")
    rows = -(-tensor.shape[0] // holders.of_copy)
    return min(holders.part * rows, tensor.shape[0]) * (tensor.numel() // tensor.shape[0])


def copies_of(tensor: Tensor) -> int:
    """How many processes have each number of a tensor."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


def gathered(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a spread model by name, as `whole` gives them."""
    tied = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    made: dict[int, Tensor] = {}  # one tensor under both names, so that what saves it sees that they are one
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        of = tied.get(name, id(value))
        if of not in made:
            made[of] = whole(value)
        state[name] = made[of]
    return state


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are spread over processes."""
    return isinstance(model, FSDPModule)


def unspread_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's own class: a spread one has another, made for it, which cannot be copied."""
    return type(model).__bases__[1] if is_sharded(model) else type(model)


@torch.no_grad()
def put(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into the spread ones of the same names."""
    for name, value in values.items():
        if name in targets:
            targets[name].copy_(like(targets[name], value))
