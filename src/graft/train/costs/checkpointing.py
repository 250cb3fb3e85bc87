"""`checkpointing: auto`: what a short row of the loaded model keeps, held against the memory that is free."""

from __future__ import annotations

import numpy as np
import torch

from graft.console import note
from graft.model.attention.segments import TreeRow
from graft.model.device import Precision, free_bytes
from graft.model.memory.remember import MODES, Mode, kept_bytes, remember
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.processes.shard import local
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import trainable
from graft.types import Example

PROBE_TOKENS = 128
SHARE = 0.8
"""Of the free memory that activations may fill; the rest is for a layer's gradients, a chunk of logits and gaps."""
BYTES_PER_TRAINED = 12
"""Of a trained weight, beside itself: its gradient and AdamW's two moments, in fp32."""


def remember_what_fits(
    lm: TreeLM, precision: Precision, row_tokens: int, every: int, offload: bool, ranks: Ranks = ALONE
) -> Mode:
    """Set and return the first of none, selective and full with which a row of `row_tokens` nodes fits.

    Activations grow with the number of tokens, so those of a row of 128 are measured. `full` is not held against the
    memory: there is nothing behind it but smaller rows. Of several processes the one with least room decides for all.
    """
    free = free_share(lm.device, ranks)
    trained = sum(local(p).numel() for p in trainable(lm.model).values())
    room = ranks.least(SHARE * (free - BYTES_PER_TRAINED * trained))
    for mode in MODES[:-1]:
        remember(lm.model, mode, every, offload, written=ranks.size > 1)
        if lm.context is not None:
            lm.context.asks_again = mode == "none" and not offload
        needed = activation_bytes_per_token(lm, precision) * row_tokens
        said = f"{needed / 2**30:.1f} GiB for a row of {row_tokens} tokens, {room / 2**30:.1f} GiB free for it"
        if needed <= room:
            note(f"checkpointing: {mode} (activations of {said})")
            return mode
    remember(lm.model, "full", every)
    note(f"checkpointing: full (with selective, activations of {said})")
    return "full"


def free_share(device: torch.device, ranks: Ranks) -> float:
    """Memory that this process can still have: the processes of a host share what is not an accelerator's own."""
    return free_bytes(device) / (ranks.on_host if device.type in ("cpu", "mps") else 1)


def activation_bytes_per_token(lm: TreeLM, precision: Precision) -> float:
    """Bytes that the decoder keeps for the backward pass per token of a row, as the model is set now.

    Of a row that is split, what this process keeps; all must ask.
    """
    ids = np.random.default_rng(0).integers(0, next(lm.embedding.parameters()).shape[0], PROBE_TOKENS, dtype=np.int32)
    example = Example("probe", 0, ids, np.ones(PROBE_TOKENS, np.float32), 1)
    (row,) = lm.rows([example], PROBE_TOKENS)
    tree = TreeRow.of(row, lm.device) if lm.context is None else lm.place(row)
    training = lm.model.training
    lm.model.train()
    try:
        with torch.enable_grad(), precision.autocast(lm.device):
            return kept_bytes(lambda: lm.enter(lambda: lm.states(tree))) / len(tree.row)
    finally:
        lm.model.train(training)
