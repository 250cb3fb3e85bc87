"""One call of attention: some queries, some keys, and what a layer adds to the scores. Knows tensors, no rows.

Shapes: B = 1 row, H query heads, K key heads (H is a multiple of K), n queries, m keys, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FASTER_IN_16_BITS = 300
"""Queries from which torch's CPU kernel and its gradient are as fast in 16 bits as in fp32: 128 take 4.3 ms, not 1.4,
400 take as long (8 heads of 64, one core with matrix units for bf16)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layer adds to plain scaled dot-product attention."""

    scaling: float | None = None
    """Factor on the scores; None is 1 / sqrt(D)."""
    window: int | None = None
    """A query sees keys less than this many depths above it."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap) (Gemma 2)."""
    sinks: Tensor | None = None
    """[H] one extra score per head in the softmax's denominator (gpt-oss)."""
    slopes: Tensor | None = None
    """[H] ALiBi: slope * depth of the key is added to each score (Press et al. 2021, arXiv:2108.12409)."""
    dropout: float = 0.0
    chunk: int | None = None
    """A query sees keys of its own chunk of so many depths (Llama 4)."""

    @property
    def plain(self) -> bool:
        """Whether the fused kernel computes it."""
        return self.softcap is None and self.sinks is None


def attend(query: Tensor, key: Tensor, value: Tensor, shape: Shape, causal: bool, added: Tensor | None) -> Tensor:
    """[B, H, n, D] attention of queries [B, H, n, D] to keys and values [B, K, m, D].

    `added` is added to the scores, [H or 1, n, m] with -inf where a key is not seen; without it every key is seen, or
    with `causal` (n = m) those that are not later.
    """
    if query.device.type == "cpu" and query.element_size() == 2 and query.shape[2] < FASTER_IN_16_BITS:
        return attend(query.float(), key.float(), value.float(), shape, causal, added).to(query.dtype)
    if not shape.plain:
        if causal:
            added = added_to_scores(query.shape[2], key.shape[2], shape, query)
        return _attend_written_out(query, key, value, shape, added)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if added is None else added[None].to(query.dtype),
        is_causal=causal,
        dropout_p=shape.dropout,
        scale=shape.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_written_out(query: Tensor, key: Tensor, value: Tensor, shape: Shape, added: Tensor | None) -> Tensor:
    """Attention with soft-capped scores or sinks, which no fused kernel of torch computes."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scaling = shape.scaling if shape.scaling is not None else query.shape[-1] ** -0.5
    scores = query @ key.transpose(-1, -2) * scaling
    if shape.softcap is not None:
        scores = shape.softcap * torch.tanh(scores / shape.softcap)
    if added is not None:
        scores = scores + added
    if shape.sinks is not None:
        sinks = shape.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1).to(scores.dtype)
        scores = torch.cat([scores, sinks], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    shares = scores.softmax(dim=-1, dtype=exact).to(query.dtype)
    if shape.sinks is not None:
        shares = shares[..., :-1]
    return F.dropout(shares, shape.dropout) @ value


def added_to_scores(n: int, m: int, shape: Shape, like: Tensor, first: int = 0) -> Tensor:
    """[H or 1, n, m] for n queries at the end of a path of m keys, the first of which is at depth `first`.

    -inf where a key is later than the query or outside its window or chunk, else 0, or the ALiBi bias.
    """
    query, key = (torch.arange(start, m, device=like.device) for start in (m - n, 0))
    distance = query[:, None] - key[None, :]
    unseen = distance < 0 if shape.window is None else (distance < 0) | (distance >= shape.window)
    if shape.chunk is not None:
        unseen |= ((query + first) // shape.chunk)[:, None] != ((key + first) // shape.chunk)[None, :]
    if shape.slopes is None:
        return torch.zeros(1, n, m, dtype=like.dtype, device=like.device).masked_fill_(unseen, -torch.inf)
    bias = shape.slopes[:, None, None].to(like.device) * (key + first)
    return bias.expand(-1, n, -1).to(like.dtype).masked_fill(unseen, -torch.inf)
