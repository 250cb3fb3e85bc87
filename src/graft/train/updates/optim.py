"""The optimiser over named parameters, and its state by those names (so that it survives in safetensors).

A state holds tensors (moments, eight-bit blocks with their scales), numbers (steps, sums of weights) and, for the
optimisers that project gradients, an object with both. Tensors go into a safetensors file as `KEY/PARAMETER`, numbers
into JSON under the same names; what belongs to a group goes by the group's index.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from graft.config.train import Train
from graft.errors import ConfigError
from graft.model.processes.shard import like, whole
from graft.train.updates.dealt import Dealt
from graft.train.updates.optimizers import OPTIMIZERS, Group, Together

PROJECTOR = "projector"
"""Where GaLore and APOLLO keep the object that projects a gradient."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], embeddings: set[int], settings: Train
) -> torch.optim.Optimizer:
    """The optimiser of the settings; decay only on weight matrices.

    `embeddings` holds the `id` of the parameters that are embeddings or output heads. With `optimizer_in_backward`
    each parameter has an optimiser of its own, since each is updated at its own time.

    Raises:
        ConfigError: a pattern of `lr_patterns` is in no parameter's name.
    """
    groups = parameter_groups(parameters, embeddings, settings)
    kind = OPTIMIZERS[settings.optimizer]
    if settings.optimizer_in_backward:
        each = [group | {"params": [p]} for group in groups for p in group["params"]]
        # The place is for what is drawn by chance: it must be another for each weight.
        return Together([kind.make([group | {"place": place}], settings) for place, group in enumerate(each)])
    spread = [p for group in groups if kind.whole(group) for p in group["params"]]
    if spread and isinstance(spread[0], DTensor):
        return Dealt(lambda its: kind.make(its, settings), groups, spread)
    return kind.make(groups, settings)


def parameter_groups(parameters: Mapping[str, nn.Parameter], embeddings: set[int], settings: Train) -> list[Group]:
    """Parameters that are treated alike: by decay, learning rate and what they are; decayed ones first."""
    groups: dict[tuple[bool, float, str], Group] = {}
    for name, ratio in _ratios(parameters, settings).items():
        parameter = parameters[name]
        weights = "embedding" if id(parameter) in embeddings else "hidden" if parameter.dim() == 2 else "other"
        decayed = parameter.dim() >= 2 and weights != "embedding"
        # Only some optimisers ask what a group holds; for the others more groups would only be more calls.
        key = (decayed, ratio, weights if settings.optimizer in ("muon", "galore", "apollo") else "")
        decay = settings.weight_decay if decayed else 0.0
        new: Group = {"params": [], "weight_decay": decay, "weights": weights, "lr_ratio": ratio}
        groups.setdefault(key, new)["params"].append(parameter)
    return [group for _, group in sorted(groups.items(), key=lambda item: not item[0][0])]


def _ratios(parameters: Mapping[str, nn.Parameter], settings: Train) -> dict[str, float]:
    """Each parameter's learning rate, over the peak rate.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) lets the second matrix, which begins at zero, learn faster.
    """
    plus = (settings.lora.loraplus_ratio if settings.method == "lora" else None) or 1.0
    ratios = {name: plus if ".lora_B." in name else 1.0 for name in parameters}
    unused = dict.fromkeys(settings.lr_patterns)
    for name in parameters:
        pattern = next((pattern for pattern in settings.lr_patterns if re.search(pattern, name)), None)
        if pattern is not None:
            unused.pop(pattern, None)
            ratios[name] = settings.lr_patterns[pattern] / settings.peak_lr
    if unused:
        names = ", ".join(list(parameters)[:3])
        raise ConfigError(
            f"lr_patterns: {next(iter(unused))!r} is in no trained parameter's name; there are {names} ..."
        )
    return ratios


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, as a share of it where the group has one of its own."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's tensors as `KEY/PARAMETER`, for example `exp_avg/model.layers.0...`."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _entries(optimizer, parameters):
        if isinstance(value, Tensor):
            mine = whole(value).contiguous()
            # Eight-bit states share one table of what their numbers mean; a safetensors file shares nothing.
            tensors[name] = mine.clone() if mine.data_ptr() in seen else mine
            seen.add(mine.data_ptr())
    return tensors | _of_dealt(optimizer, parameters, tensors=True)


def optimizer_numbers(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimiser's numbers by the same names, and its groups' as `KEY/INDEX`; JSON keeps all of them exactly."""
    numbers = {name: value for name, value in _entries(optimizer, parameters) if not isinstance(value, Tensor)}
    numbers |= _of_dealt(optimizer, parameters, tensors=False)
    for index, group in enumerate(optimizer.param_groups):
        numbers |= {f"{key}/{index}": value for key, value in group.items() if isinstance(value, bool | int | float)}
    return numbers


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Put a saved state back; the inverse of `optimizer_state` and `optimizer_numbers`."""
    of_group = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for entry, value in (*tensors.items(), *numbers.items()):
        key, name = entry.split("/", 1)
        if name.isdigit():
            optimizer.param_groups[int(name)][key] = value
            continue
        parameter = parameters[name]
        dealt = isinstance(optimizer, Dealt) and id(parameter) in optimizer.dealt
        if isinstance(optimizer, Dealt) and dealt and id(parameter) not in optimizer.mine:
            continue  # another process has it
        state = optimizer.state[parameter]
        put = value
        if isinstance(value, Tensor):
            whole_here = value.to(parameter.device) if dealt else like(parameter, value)
            put = whole_here if value.dim() else value.clone()
        holder, _, attribute = key.partition(".")
        if holder == PROJECTOR:
            if PROJECTOR not in state:
                state[PROJECTOR] = _make_projector(optimizer, of_group[id(parameter)], state)
            setattr(state[PROJECTOR], attribute, put)
        else:
            state[key] = put


def _of_dealt(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: bool
) -> dict[str, Any]:
    """The states of weights that were dealt to processes, in the first of them: the tensors, or the numbers."""
    found: dict[str, Any] = {}
    if isinstance(optimizer, Dealt):
        names = {id(parameter): name for name, parameter in parameters.items()}
        for weight in optimizer.turns():
            own = {} if weight is None else dict(_entries_of(optimizer, names[id(weight)], weight))
            sent = {
                name: value.cpu() if isinstance(value, Tensor) else value
                for name, value in own.items()
                if isinstance(value, Tensor) == tensors
            }
            for its in optimizer.to_first(sent):
                found |= its
    return found


def _entries(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterable[tuple[str, Any]]:
    """Every tensor and number of the state, with its name; without weights that were dealt to processes."""
    dealt = optimizer.dealt if isinstance(optimizer, Dealt) else ()
    for name, parameter in parameters.items():
        if id(parameter) not in dealt:
            yield from _entries_of(optimizer, name, parameter)


def _entries_of(optimizer: torch.optim.Optimizer, name: str, parameter: nn.Parameter) -> Iterable[tuple[str, Any]]:
    for key, value in optimizer.state.get(parameter, {}).items():
        if key != PROJECTOR:
            yield f"{key}/{name}", value
            continue
        for attribute, inner in vars(value).items():
            if isinstance(inner, Tensor | int | float):
                yield f"{key}.{attribute}/{name}", inner


def _make_projector(optimizer: torch.optim.Optimizer, group: Group, state: Mapping[str, Any]) -> Any:
    """A projector without its matrix, as the optimiser itself makes it at its first step."""
    optimizer = optimizer.rest if isinstance(optimizer, Dealt) else optimizer
    from apollo_torch import APOLLOAdamW

    if isinstance(optimizer, APOLLOAdamW):
        return optimizer._initialize_projector(group, state)
    from galore_torch.galore_projector import GaLoreProjector

    return GaLoreProjector(
        group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"], proj_type=group["proj_type"]
    )
