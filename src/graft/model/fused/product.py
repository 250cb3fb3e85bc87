"""Large matrix products by the faster of torch's two libraries for CPUs. Knows tensors, not layers.

torch multiplies fp32 matrices by MKL, which has its best kernels for Intel's processors alone. On AMD's, oneDNN, which
torch carries too, is faster by 5 to 15 % for products of many rows (Zen 4, one thread: 101 GF/s against 91), and
computes in fp32 just as exactly. Which one is used depends on the processor and on nothing else, so that a resumed run
computes as the unbroken one would have done.

Shapes: T tokens, i and o features in and out.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

FEWEST_ROWS = 64
"""Below so many tokens, and features, MKL is as fast or faster."""


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[T, i] -> [T, o]: x W^T + b with weight [o, i]."""
    if _by_onednn(x, weight):
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return made
    return F.linear(x, weight, bias)


def times_transposed(grad: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """[T, o] -> [T, i]: G W with weight [o, i]; added to `onto`, in place, where that is given."""
    if not _by_onednn(grad, weight):
        return grad @ weight if onto is None else onto.addmm_(grad, weight)
    pulled = times(grad, weight.T)
    return pulled if onto is None else onto.add_(pulled)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        min(*x.shape, *weight.shape) >= FEWEST_ROWS
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not isinstance(x, FakeTensor)  # where operations are only counted, those that the count knows
        and on_amd()
    )


@cache
def on_amd() -> bool:
    """Whether this is a processor by AMD whose torch has oneDNN's product, with the same numbers as its own."""
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"):
            return False
        probe, weight = torch.linspace(-1, 1, 64 * 64).view(64, 64), torch.linspace(-2, 3, 64 * 80).view(80, 64)
        made = torch.ops.mkldnn._linear_pointwise(probe, weight, weight[:, 0].contiguous(), "none", [], "")
    except (OSError, AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(made, F.linear(probe, weight, weight[:, 0]), rtol=1e-5, atol=1e-4)
