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

from graft.model.attention.segments import TreeRow
from graft.types import Row


@contextmanager
def noisy_embedding(embedding: nn.Module, tree: TreeRow, alpha: float | None, seed: int = 0) -> Iterator[None]:
    """Within, the embedding of this row is noisy; its numbers come from torch's own generator.

    The processes that compute a split row together draw those of the whole row, from the seed, and each takes its own.
    """
    if alpha is None:
        yield
        return
    share = tree.share
    longest = longest_path(tree.row)
    lengths = torch.from_numpy((longest if share is None else longest[share.nodes]).astype(np.float32))

    def add_noise(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        width = output.shape[-1]
        most = (alpha / (lengths * width).sqrt()).to(output)[:, None]  # [N, 1], for output [1, N, d]
        if share is None:
            return output + torch.empty_like(output).uniform_(-1, 1) * most
        generator = torch.Generator(output.device).manual_seed(seed)
        drawn = output.new_empty(1, share.size, width).uniform_(-1, 1, generator=generator)
        return output + drawn[:, share.queries] * most

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
