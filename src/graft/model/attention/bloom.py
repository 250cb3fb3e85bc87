"""Token trees for Bloom, which builds its positions (ALiBi) from the index and looks no attention function up.

What differs from transformers' own forward: scores get slope * depth of the key instead of slope * index, and only
the path of a query is attended to. Everything else runs through the model's own modules.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomForCausalLM, dropout_add

from graft.model.answers.kept import NextRow, PromptRow
from graft.model.attention.attend import Shape
from graft.model.attention.row_mask import RowMask
from graft.model.attention.segments import BACKENDS, TreeRow
from graft.model.memory.count import ATTENTION, part


def alibi_slopes(heads: int) -> Tensor:
    """[H] slopes of ALiBi: a geometric sequence, filled up from the next finer one where H is no power of two.

    Press, Smith & Lewis, "Train short, test long", arXiv:2108.12409, section 3, and its reference code for other H.
    """

    def powers(count: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / count) for i in range(count)]

    whole = 2 ** math.floor(math.log2(heads))
    return torch.tensor(powers(whole) + powers(2 * whole)[0::2][: heads - whole], dtype=torch.float32)


def install(model: BloomForCausalLM, backend: str) -> None:
    """Teach a Bloom model to read a `RowMask`; without one it computes as before (generation does)."""
    own_alibi = model.transformer.build_alibi_tensor

    def build_alibi(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Any:
        if isinstance(attention_mask, RowMask):
            return attention_mask.row
        return own_alibi(attention_mask, num_heads, dtype)

    model.transformer.build_alibi_tensor = build_alibi  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, BloomAttention):
            _install_attention(module, backend)


def _install_attention(module: BloomAttention, backend: str) -> None:
    own_forward = module.forward
    compute = BACKENDS[backend]

    def forward(hidden_states: Tensor, residual: Tensor, alibi: Any, attention_mask: Tensor, **others: Any) -> Any:
        if not isinstance(alibi, TreeRow | PromptRow | NextRow):
            return own_forward(hidden_states, residual, alibi=alibi, attention_mask=attention_mask, **others)
        query, key, value = module._reshape(module.query_key_value(hidden_states))  # each [1, H, N, D]
        slopes = alibi_slopes(module.num_heads).to(query.device)
        dropout = module.attention_dropout.p if module.training else 0.0
        shape = Shape(module.inv_norm_factor, slopes=slopes, dropout=dropout)
        if isinstance(alibi, TreeRow):
            alibi.calls += 1
            with part(ATTENTION):
                context = compute(query, key, value, alibi, shape)
        else:  # generation
            context = alibi.attend(query, key, value, shape)
        output = module.dense(context.transpose(1, 2).flatten(2))
        return dropout_add(output, residual, module.hidden_dropout, module.training), None

    module.forward = forward  # type: ignore[method-assign, assignment]
