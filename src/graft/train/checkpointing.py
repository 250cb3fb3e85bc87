"""`checkpointing: auto`: what a short row of the loaded model keeps, held against the memory that is free."""

from __future__ import annotations

import numpy as np
import torch

from graft.console import note
from graft.model.adapters import trainable
from graft.model.attention import TreeRow
from graft.model.device import Precision, free_bytes
from graft.model.remember import Mode, kept_bytes, remember
from graft.model.trees import TreeLM
from graft.types import Example

PROBE_TOKENS = 128
SHARE = 0.8
"""Of the free memory that activations may fill; the rest is for a layer's gradients, a chunk of logits and gaps."""
BYTES_PER_TRAINED = 12
"""Of a trained weight, beside itself: its gradient and AdamW's two moments, in fp32."""


def remember_what_fits(lm: TreeLM, precision: Precision, row_tokens: int, every: int, offload: bool) -> Mode:
    """Set and return the first of none, selective and full with which a row of `row_tokens` nodes fits.

    Activations grow with the number of tokens, so those of a row of 128 are measured. `full` is not held against the
    memory: there is nothing behind it but smaller rows.
    """
    free = free_bytes(lm.device)
    room = SHARE * (free - BYTES_PER_TRAINED * sum(p.numel() for p in trainable(lm.model).values()))
    modes: tuple[Mode, ...] = ("none", "selective")
    for mode in modes:
        remember(lm.model, mode, every, offload)
        needed = activation_bytes_per_token(lm, precision) * row_tokens
        said = f"{needed / 2**30:.1f} GiB for a row of {row_tokens} tokens, {room / 2**30:.1f} GiB free for it"
        if needed <= room:
            note(f"checkpointing: {mode} (activations of {said})")
            return mode
    remember(lm.model, "full", every)
    note(f"checkpointing: full (with selective, activations of {said})")
    return "full"


def activation_bytes_per_token(lm: TreeLM, precision: Precision) -> float:
    """Bytes that the decoder keeps for the backward pass per token of a row, as the model is set now."""
    ids = np.random.default_rng(0).integers(0, next(lm.embedding.parameters()).shape[0], PROBE_TOKENS, dtype=np.int32)
    example = Example("probe", 0, ids, np.ones(PROBE_TOKENS, np.float32), 1)
    (row,) = lm.rows([example], PROBE_TOKENS)
    tree = TreeRow.of(row, lm.device)
    training = lm.model.training
    lm.model.train()
    try:
        with torch.enable_grad(), precision.autocast(lm.device):
            return kept_bytes(lambda: lm.enter(lambda: lm.states(tree))) / PROBE_TOKENS
    finally:
        lm.model.train(training)
