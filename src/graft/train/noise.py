"""NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914). Knows rows of trees.

Each number gets uniform noise of at most alpha / sqrt(L * d): d the embedding's width, L the tokens of the sequence.
On a tree a token that several examples share is embedded once and so has one draw of noise, as it has one of dropout;
its L is that of the longest example through it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graft.types import Row


@contextmanager
def noisy_embedding(embedding: nn.Module, row: Row, alpha: float | None) -> Iterator[None]:
    """Within, the embedding of this row is noisy; its numbers come from torch's own generator."""
    if alpha is None:
        yield
        return
    lengths = torch.from_numpy(longest_path(row).astype(np.float32))

    def add_noise(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        width = output.shape[-1]
        most = (alpha / (lengths * width).sqrt()).to(output)[:, None]  # [N, 1], for output [1, N, d]
        return output + torch.empty_like(output).uniform_(-1, 1) * most

    hook = embedding.register_forward_hook(add_noise)
    try:
        yield
    finally:
        hook.remove()


def longest_path(row: Row) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[N] tokens of the longest example that goes through each node."""
    longest = row.depth.astype(np.int64) + 1
    for node in range(len(row) - 1, 0, -1):  # a node's children come after it, so each is final when it is passed on
        parent = row.parent[node]
        if parent >= 0 and longest[parent] < longest[node]:
            longest[parent] = longest[node]
    return longest
