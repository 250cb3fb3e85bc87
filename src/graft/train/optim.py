"""The optimiser over named parameters, and its state by those names (so that it survives in safetensors)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graft.config.train import Train


def make_optimizer(parameters: Mapping[str, nn.Parameter], embeddings: set[int], settings: Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); decay only on weight matrices.

    `embeddings` holds the `id` of the parameters that are embeddings: they, biases and norms are not decayed.
    """
    decayed = [p for p in parameters.values() if p.dim() >= 2 and id(p) not in embeddings]
    decayed_ids = {id(p) for p in decayed}
    others = [p for p in parameters.values() if id(p) not in decayed_ids]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.peak_lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimiser's tensors as `KEY/PARAMETER`, for example `exp_avg/model.layers.0...`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put saved tensors back; the inverse of `optimizer_state`."""
    for tensor_name, value in tensors.items():
        key, name = tensor_name.split("/", 1)
        parameter = parameters[name]
        optimizer.state[parameter][key] = value.to(parameter.device) if value.dim() else value.clone()
