"""Kernels of liger-kernel for CUDA: RMS norms and gated feed-forward layers as one operation each. Knows modules.

Only instances are changed, never a class or a module of transformers, and each only after the kernel gave the numbers
of the forward that it replaces. Rotary embeddings are left alone: they are a function of a Python module, which cannot
be replaced for one model alone. The loss has its own place (`train/loss.py`).

Shapes: d features, f features inside the feed-forward layer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.errors import ConfigError

Setting = Literal["auto", "liger", "none"]
Forward = Callable[[Any, Tensor], Tensor]


def wants_liger(setting: Setting, device: torch.device, compiled: bool) -> bool:
    """Whether a run uses these kernels. `auto`: on CUDA, where they are installed and no compiler fuses instead.

    Raises:
        ConfigError: they are asked for where they cannot run.
    """
    installed = importlib.util.find_spec("liger_kernel") is not None
    if setting == "liger" and device.type != "cuda":
        raise ConfigError(f"kernels=liger needs a CUDA device, and this run's is {device}; use kernels=auto")
    if setting == "liger" and not installed:
        raise ConfigError("kernels=liger: liger-kernel is not installed; pip install 'graft-llm[liger]'")
    return setting == "liger" or (setting == "auto" and device.type == "cuda" and installed and not compiled)


def use_liger(model: nn.Module) -> dict[str, int]:
    """Replace the forward of what liger-kernel has a kernel for; returns how many norms and feed-forward layers.

    A module whose forward was replaced before, by a fused operation of ours, keeps that.
    """
    done = {"norms": 0, "feed-forward layers": 0}
    for module in model.modules():
        if "forward" in module.__dict__:
            continue
        for kind, make in (("norms", _norm_forwards), ("feed-forward layers", _gated_forwards)):
            for ours in make(module):
                if _same_numbers(module, ours):
                    module.forward = MethodType(ours, module)
                    done[kind] += 1
                    break
    return done


def _norm_forwards(module: nn.Module) -> list[Forward]:
    """The kernel as transformers' families cast and shift: Llama's way, and Gemma's with 1 added to the scale."""
    if not type(module).__name__.endswith("RMSNorm") or [name for name, _ in module.named_parameters()] != ["weight"]:
        return []
    eps = next((e for e in (getattr(module, name, None) for name in ("variance_epsilon", "eps")) if e), None)
    if not isinstance(eps, float):
        return []
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def forward_of(offset: float, casting: str) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            # Not in place: what flows back here may flow elsewhere too, along the residual.
            done: Tensor = LigerRMSNormFunction.apply(x, self.weight, eps, offset, casting, False)
            return done

        return forward

    return [forward_of(0.0, "llama"), forward_of(1.0, "gemma")]


def _gated_forwards(module: nn.Module) -> list[Forward]:
    """down(silu(gate(x)) * up(x)), the middle in one pass."""
    names = {name for name, _ in module.named_children()}
    if not {"gate_proj", "up_proj", "down_proj"} <= names:
        return []
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def forward(self: Any, x: Tensor) -> Tensor:
        done: Tensor = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
        return done

    return [forward]


def _same_numbers(module: nn.Module, ours: Forward) -> bool:
    """Whether both forwards give the same output and the same gradient of the input, within the format's rounding."""
    parameter = next(iter(module.parameters()))
    gate: Any = dict(module.named_children()).get("gate_proj")
    size = parameter.shape[-1] if gate is None else gate.in_features
    generator = torch.Generator(parameter.device).manual_seed(0)
    drawn = torch.randn(1, 8, size, generator=generator, device=parameter.device, dtype=parameter.dtype)
    training = module.training
    module.eval()
    try:
        found = []
        for compute in (module.forward, MethodType(ours, module)):
            x = drawn.clone().requires_grad_()
            y = compute(x)
            (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
            found.append((y.detach(), gradient))
        bound = 1e-4 if parameter.dtype == torch.float32 else 2e-2
        return all(
            float((a.float() - b.float()).norm() / a.float().norm()) < bound for a, b in zip(*found, strict=True)
        )
    except (RuntimeError, TypeError, ValueError):  # it is called otherwise, or the kernel does not take its shape
        return False
    finally:
        module.train(training)
