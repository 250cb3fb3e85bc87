"""From the output layer's product to logits, in the forms that architectures have. Knows configurations and tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What an architecture does to its output layer's product: cap * tanh(scale * product / cap)."""

    scale: float = 1.0
    softcap: float | None = None


def shape_logits(product: Tensor, shape: LogitShape) -> Tensor:
    """Logits from the output layer's product."""
    if shape.scale != 1.0:
        product = product * shape.scale
    if shape.softcap is not None:
        product = shape.softcap * torch.tanh(product / shape.softcap)
    return product


def declared_logit_shape(config: PreTrainedConfig) -> LogitShape:
    """What a model's configuration says of it."""
    found = config.to_dict()
    divisor = found.get("logits_scaling") or 1.0  # Granite
    scale = (found.get("logit_scale") or 1.0) / divisor  # Cohere
    return LogitShape(scale, found.get("final_logit_softcapping"))  # Gemma 2
