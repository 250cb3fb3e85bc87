"""A model's weights spread over the processes of a run (FSDP2), and single tensors made whole again.

Every process keeps a part of each weight; a decoder layer's weights are whole only while that layer computes, the
embedding's and the head's while a row does (Zhao et al. 2023, arXiv:2304.11277). Gradients are added up, not averaged:
the loss is divided by the weight of the whole step already. Knows modules and processes; no rows and no steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from graft.errors import ConfigError
from graft.model.adapters import decoder_layers, plain
from graft.model.ranks import Ranks
from graft.model.shard_packed import make_divisible

T = TypeVar("T")
Enter = Callable[[Callable[[], T]], T]


def mesh_of(ranks: Ranks, device: torch.device, holders: int) -> DeviceMesh:
    """The processes as a grid: `holders` neighbours hold one copy of the weights between them, the rest are copies.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    if ranks.size % holders:
        raise ConfigError(
            f"shard_ranks: {holders} processes to a copy of the weights, but {ranks.size} processes cannot be divided "
            f"so; choose a divisor of {ranks.size}, all, or host"
        )
    if holders == ranks.size:
        return init_device_mesh(device.type, (holders,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (ranks.size // holders, holders), mesh_dim_names=("copy", "shard"))


def shard(
    model: PreTrainedModel | PeftModel,
    mesh: DeviceMesh,
    compute: torch.dtype | None = None,
    offload: bool = False,
    fill: Callable[[nn.Module], None] = lambda _module: None,
) -> Enter[Any]:
    """Spread a model over a mesh, in place; returns what must surround whatever computes with its weights.

    Quantised weights of a format that model/shard_packed.py does not know stay whole in every process. `compute` is
    the format in which trained weights travel and compute, None as they are kept; gradients always travel in fp32.
    `offload` keeps the parts in the host's memory between uses. `fill` is called for each layer, and for the rest,
    right before its weights are spread.
    """
    how: dict[str, Any] = {
        "mesh": mesh,
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
        fill(module)
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
    enter: Enter[Any] = root.compute_inside
    return enter


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
    return made.to(
        parameter.device
    )  # it is on the mesh's device, which is another one where parts are kept on the host


def computed_on(tensor: Tensor) -> torch.device:
    """The device that computes with a tensor, wherever this process keeps its part of it."""
    kind = tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device.type
    if kind == tensor.device.type:
        return tensor.device
    return torch.device(kind, torch.accelerator.current_device_index())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
