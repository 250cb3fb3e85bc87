"""Which weights `target_modules: all-linear` must leave alone, and which it does not reach. Knows modules only.

PEFT's `all-linear` means every `torch.nn.Linear`. Some of them are linear in name alone, and the experts of a mixture
are no modules at all: transformers keeps them as one parameter of three dimensions, experts x out x in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def not_plainly_linear(model: nn.Module) -> list[str]:
    """Names, as short as they can be, of layers that are `nn.Linear` but are not computed as one.

    Routers that return several tensors and grouped products, which an adapter would break; and the output projection
    of Mamba's mixers, whose fused kernel reads the weight past the layer, so that an adapter on it would do nothing.
    """
    odd = set(_odd(model))
    kept = {_last(name) for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in odd}
    return sorted({_last(name) if _last(name) not in kept else name for name in odd})


def _odd(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        own_class = type(module).__module__.startswith("transformers.models.")
        if isinstance(module, nn.Linear) and own_class and not _is_linear(module):
            yield name
        children = dict(module.named_children())
        if "conv1d" in children and isinstance(children.get("out_proj"), nn.Linear):
            yield f"{name}.out_proj"


def _is_linear(layer: nn.Linear) -> bool:
    """Whether an architecture's own subclass computes what its name says (Falcon's does) from inputs of one batch."""
    if type(layer).forward is nn.Linear.forward:
        return True
    x = torch.ones(1, 2, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    with torch.no_grad():
        try:
            out: Any = layer(x)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return isinstance(out, Tensor) and torch.allclose(out, F.linear(x, layer.weight, layer.bias), rtol=1e-2)


def stacked_experts(model: nn.Module) -> dict[str, int]:
    """Frozen parameters of three dimensions, by the name that all layers share, with the number of their elements."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not parameter.requires_grad and "experts" in name.split("."):
            short = ".".join(name.split(".")[-2:])
            found[short] = found.get(short, 0) + parameter.numel()
    return found


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
