"""Which attention backend a run uses, and for which of its rows and layers. Knows devices and tensors.

`auto` is decided in two places: once per run by the device (here, `pick_attention`), and then for each row and layer by
what a kernel can compute (`first_that_can`): a flash kernel for rows without branches, FlexAttention for others,
segments for whatever neither takes. The order on CUDA has not been measured yet.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graft.console import warn_once
from graft.errors import ConfigError
from graft.model.attention.attend import Shape
from graft.model.attention.segments import BACKENDS, DENSE, SEGMENTS, Compute, TreeRow, register, segment_attention

Setting = Literal["auto", "segments", "flex", "varlen", "dense"]

LEAST_CAPABILITY = (8, 0)
"""CUDA devices that `auto` gives these kernels to: the flash kernel's least. Not yet measured."""
STEP = 128
"""Rows are padded to multiples of this, FlexAttention's block, at least."""
ROW_LENGTHS = 8
"""Most lengths of rows within one run where each costs a compilation."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The choice for a run."""

    backend: str
    """Name under which the backend is registered."""
    why: str
    """The rule's result in words, for the log."""
    padded: bool
    """Whether rows are padded to few lengths, since every length is compiled for."""


def pick_attention(setting: Setting, device: torch.device) -> Attention:
    """The backend of a run.

    Raises:
        ConfigError: the device or this installation cannot run what was asked for.
    """
    if setting == "segments" or (setting == "auto" and device.type != "cuda"):
        return Attention(SEGMENTS, f"segments on {device}", padded=False)
    if setting == "dense":
        return Attention(DENSE, "dense: the N x N mask written out, for checks only", padded=False)
    missing = _missing(device)
    if setting == "auto":
        if missing is None and (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            has, wants = (".".join(map(str, version)) for version in (capability, LEAST_CAPABILITY))
            missing = f"the device's compute capability is {has}, below {wants}"
        if missing is not None:
            return Attention(SEGMENTS, f"segments, since {missing}", padded=False)
    elif missing is not None:
        raise ConfigError(f"attention={setting} cannot be used: {missing}; use attention=auto")
    order = {"auto": ("varlen", "flex"), "flex": ("flex",), "varlen": ("varlen",)}[setting]
    words = {"varlen": "varlen where a row's trees are paths", "flex": "flex where they branch"}
    said = ", ".join(words[name] for name in order)
    return Attention(prefer(order), f"{said}, segments for the rest", padded="flex" in order)


def _missing(device: torch.device) -> str | None:
    """What FlexAttention and the flash kernel lack here; None if nothing."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and this run's is {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} is older than 2.10"
    return None


def row_step(row_budget: int) -> int:
    """Rows are padded to multiples of so many nodes, to have at most `ROW_LENGTHS` lengths within a budget."""
    return -(-row_budget // (ROW_LENGTHS * STEP)) * STEP


def prefer(order: tuple[str, ...]) -> str:
    """Register, and name, the backend that takes for each row and layer the first of `order` that can compute it."""
    name = f"graft_{'_or_'.join(order)}"
    if name not in BACKENDS:
        register(name, first_that_can(order))
    return name


def first_that_can(order: tuple[str, ...]) -> Compute:
    """Attention by the first of the named kernels that can compute it, by segments where none can."""
    from graft.model.attention.flex import flex_refuses, flex_tree_attention  # they load torch's compiler
    from graft.model.attention.varlen import varlen_attention, varlen_refuses

    def compute(query: Tensor, key: Tensor, value: Tensor, tree: TreeRow, shape: Shape) -> Tensor:
        refused = []
        for kernel in order:
            if kernel == "varlen":
                reason = varlen_refuses(query, tree, shape)
                if reason is None:
                    return varlen_attention(query, key, value, tree, shape)
            else:
                reason = flex_refuses(query, shape)
                if reason is None:
                    return flex_tree_attention(query, key, value, tree, shape)
            refused.append(f"{kernel}: {reason}")
        warn_once(f"attention by segments, which is slower ({'; '.join(refused)})")
        return segment_attention(query, key, value, tree, shape)

    return compute
