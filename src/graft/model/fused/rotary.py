"""Rotary positions for the CPU as one operation. Knows tensors and the functions of transformers' modules, not trees.

transformers rotates by two products, a sum and a concatenation, for queries and for keys; with their gradients that is
thirty passes over memory. Here each half is written once, piece by piece.

Shapes: B batch, H heads, N nodes, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graft.model.fused.linear import PIECE_BYTES, piece_rows

NAME = "apply_rotary_pos_emb"
Rotate = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> int:
    """Replace the rotary function of the model's own modules by one operation; returns how many functions that were.

    The function belongs to transformers' module, so every model of that architecture in the process gets the new one:
    it has the same numbers, which is proved on a probe first, and hands over to the old one elsewhere than on a CPU.
    """
    fused = 0
    for name in sorted({type(module).__module__ for module in model.modules()}):
        file = sys.modules[name]
        theirs = vars(file).get(NAME)
        if theirs is None or isinstance(theirs, _Rotary) or not name.startswith("transformers."):
            continue
        ours = _Rotary(theirs)
        if ours.has_their_numbers():
            setattr(file, NAME, ours)
            fused += 1
    return fused


class _Rotary:
    """A rotary function of transformers, replaced where the tensors are on a CPU and in one number format."""

    def __init__(self, theirs: Rotate) -> None:
        self.theirs = theirs

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] == k.shape[-1]
        if plain and all(t.device.type == "cpu" and t.dtype == q.dtype for t in (q, k, cos, sin)):
            return rotate(q, cos, sin), rotate(k, cos, sin)
        return self.theirs(q, k, cos, sin, *args, **kwargs)

    def has_their_numbers(self) -> bool:
        """Whether both functions turn a probe alike."""
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, heads, 5, 8, generator=generator) for heads in (4, 2))
        cos, sin = (torch.randn(1, 5, 4, generator=generator).repeat(1, 1, 2) for _ in "cs")
        try:
            pairs = zip(self(q, k, cos, sin), self.theirs(q, k, cos, sin), strict=True)
            return all(torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6) for ours, wanted in pairs)
        except (TypeError, ValueError, RuntimeError, IndexError):  # it is called otherwise
            return False


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, H, N, D] turned by cos and sin [B, N, D]: with halves a and b, (a cos - b sin, b cos + a sin).

    Su et al. 2021, arXiv:2104.09864, in the order of halves that transformers uses.
    """
    rotated: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        first, second = sin[..., :half], sin[..., half:]
        return _turn(x, cos, -first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        first, second = sin[..., :half], sin[..., half:]
        return _turn(grad, cos, second, -first), None, None


def _turn(x: Tensor, cos: Tensor, into_first: Tensor, into_second: Tensor) -> Tensor:
    """(a c1 + b into_first, b c2 + a into_second), in memory as [B, N, H, D]: as layers write and read it."""
    nodes = x.transpose(1, 2)
    out = torch.empty(nodes.shape, dtype=x.dtype, device=x.device)
    half = x.shape[-1] // 2
    size = max(1, PIECE_BYTES * torch.get_num_threads() // (nodes.shape[2] * nodes.shape[3] * x.element_size()))
    size = piece_rows(nodes.shape[1], size)
    for start in range(0, nodes.shape[1], size):
        part = slice(start, start + size)
        a, b = nodes[:, part, :, :half], nodes[:, part, :, half:]
        c, s, t = (factor[:, part, None, :] for factor in (cos, into_first, into_second))
        torch.mul(a, c[..., :half], out=out[:, part, :, :half]).addcmul_(b, s)
        torch.mul(b, c[..., half:], out=out[:, part, :, half:]).addcmul_(a, t)
    return out.transpose(1, 2)
