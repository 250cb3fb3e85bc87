"""Products of linear layers with LoRA, and their gradients, in few passes over memory. Knows tensors, not modules.

On a CPU the low-rank part of a layer costs little arithmetic and much memory traffic: every skinny product reads a
tensor as large as the layer's input or output. Two things save most of it. Where a layer sees many tokens at once, the
update is added to a copy of the weight, W + s B A, and one product computes both. And the skinny products of the
gradient go through their large operands piece by piece, so that each piece is read into the cache once for all of them.

Shapes: T tokens, i and o features in and out, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from graft.model.fused.product import times, times_transposed

PIECE_BYTES = 2**19
"""Of one tensor's piece, for each thread, so that a few of them fit a core's cache."""
FEW = 16
"""Pieces of a tensor where the operations are only counted."""

_few: ContextVar[bool] = ContextVar("few pieces", default=False)


@contextmanager
def few_pieces() -> Iterator[None]:
    """Compute in few pieces: where operations are only counted, they would be most of what there is to count."""
    token = _few.set(True)
    try:
        yield
    finally:
        _few.reset(token)


def piece_rows(rows: int, wanted: int) -> int:
    """How many of a tensor's rows make a piece where `wanted` of them fit the cache."""
    return max(wanted, -(-rows // FEW)) if _few.get() else wanted


@dataclass(frozen=True, slots=True)
class Weights:
    """What a linear layer computes with: y = x W^T + b + s (x A^T) B^T."""

    weight: Tensor
    """W [o, i]."""
    bias: Tensor | None = None
    """b [o]."""
    down: Tensor | None = None
    """A [r, i]; None without LoRA."""
    up: Tensor | None = None
    """B [o, r]."""
    scaling: float = 1.0
    """s."""

    def to(self, dtype: torch.dtype) -> Weights:
        """The same in the number format of the products."""
        bias, down, up = (None if tensor is None else tensor.to(dtype) for tensor in (self.bias, self.down, self.up))
        return Weights(self.weight.to(dtype), bias, down, up, self.scaling)

    def for_tokens(self, tokens: int) -> Weights:
        """The same as one weight without LoRA, W + s B A, where that is cheaper and no less exact.

        It costs a pass over the weight and spares one over an output of as many rows as there are tokens. In 16 bits a
        small update would round to nothing.
        """
        if self.down is None or self.up is None or tokens < self.down.shape[1] or self.weight.dtype != torch.float32:
            return self
        return Weights(torch.addmm(self.weight, self.up, self.down, alpha=self.scaling), self.bias)


def product(x: Tensor, layer: Weights) -> Tensor:
    """[T, i] -> [T, o]; all in one number format."""
    layer = layer.for_tokens(len(x))
    y = times(x, layer.weight, layer.bias)
    if layer.down is not None and layer.up is not None:
        y.addmm_(x @ layer.down.T, layer.up.T, alpha=layer.scaling)
    return y


def pull(grad: Tensor, layer: Weights, onto: Tensor | None = None) -> Tensor:
    """Gradient of the input [T, i] for the output's [T, o]; added to `onto`, in place, where that is given."""
    layer = layer.for_tokens(len(grad))
    dx = times_transposed(grad, layer.weight, onto)
    if layer.down is not None and layer.up is not None:
        dx.addmm_(grad @ layer.up, layer.down, alpha=layer.scaling)
    return dx


class SmallGradients:
    """Gradients of the bias and of LoRA's factors, summed over pieces of the tokens in fp32.

    With U = G B [T, r]: dA = s U^T x, dB = s G^T (x A^T), db = sum of G over tokens.
    """

    def __init__(self, layer: Weights, bias: bool, factors: bool) -> None:
        """`bias` and `factors` say which of them are wanted."""
        self.layer = layer
        zeros = partial(torch.zeros, dtype=torch.float32, device=layer.weight.device)
        self.bias = zeros(layer.weight.shape[0]) if bias else None
        self.down = self._up_t = None
        if factors and layer.down is not None and layer.up is not None:
            self.down, self._up_t = zeros(layer.down.shape), zeros(layer.up.T.shape)

    def add(self, grad: Tensor, x: Tensor) -> None:
        """Take in a piece: the output's gradient [t, o] and the input [t, i]."""
        layer = self.layer
        if self.bias is not None:
            self.bias += grad.sum(0)
        if self.down is None or self._up_t is None or layer.down is None or layer.up is None:
            return
        raised, lowered = (grad @ layer.up).T, (x @ layer.down.T).T
        if grad.dtype == torch.float32:
            self.down.addmm_(raised, x, alpha=layer.scaling)
            self._up_t.addmm_(lowered, grad, alpha=layer.scaling)
        else:
            self.down.add_(raised @ x, alpha=layer.scaling)
            self._up_t.add_(lowered @ grad, alpha=layer.scaling)

    @property
    def up(self) -> Tensor | None:
        """dB [o, r]."""
        return None if self._up_t is None else self._up_t.T


def pieces(of: Tensor) -> Iterator[slice]:
    """Slices of the rows of a tensor [T, n] such that a piece fits the cache; all of it at once but on a CPU."""
    tokens, width = of.shape
    size = tokens
    if of.device.type == "cpu":
        size = piece_rows(tokens, max(16, PIECE_BYTES * torch.get_num_threads() // (width * of.element_size())))
    for start in range(0, tokens, size):
        yield slice(start, start + size)
