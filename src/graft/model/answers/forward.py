"""One forward pass of a model that answers, and the state in which it is made. Knows models and tensors, no prompts.

Shape legend: B rows of a batch, T tokens fed in one forward pass, S tokens seen so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache

from graft.model.answers.room import Model
from graft.model.tuned.adapters import plain

_STANDARD_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class Forward:
    """One forward pass that returns the logits of the last token only, in float32."""

    def __init__(self, model: Model) -> None:
        self._model = plain(model)
        known = inspect.signature(self._model.forward).parameters
        # ALiBi models take no position ids, older remote code computes every logit.
        self._takes_positions = "position_ids" in known
        self._takes_keep = "logits_to_keep" in known

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache | None) -> Tensor:
        """ids [B, T], mask [B, S] (None: nothing is padding), positions [B, T] -> logits [B, V]."""
        extra: dict[str, Tensor | int] = {}
        if self._takes_positions:
            extra["position_ids"] = positions
        if self._takes_keep:
            extra["logits_to_keep"] = 1
        if cache is None:
            out = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
        else:
            out = self._model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        return cast(Tensor, out.logits[:, -1].float())


def new_cache(model: Model) -> DynamicCache | None:
    """Where keys and values are kept; None for a recurrent model, whose tokens are then all read again at each step.

    That is slow, but exact: transformers' own loop feeds RWKV's state twice and gives other answers.
    """
    module = plain(model)
    return None if module._is_stateful else DynamicCache(config=module.config)


@contextmanager
def inference(model: Model, attention: str | None = None) -> Iterator[None]:
    """No gradients, no dropout, and the wanted attention, else one that reads the padding mask; all put back after."""
    module = plain(model)
    training, own = module.training, module.config._attn_implementation
    wanted = attention
    if attention is None and own is not None and own not in _STANDARD_ATTENTION:
        # graft's tree attention takes rows of trees, not padded batches
        wanted = "sdpa" if module._supports_sdpa else "eager"
    if training:
        module.train(False)
    if wanted is not None and own is not None:
        module.set_attn_implementation(wanted)
    try:
        with torch.inference_mode():
            yield
    finally:
        if wanted is not None and own is not None:
            module.set_attn_implementation(own)
        if training:
            module.train()
