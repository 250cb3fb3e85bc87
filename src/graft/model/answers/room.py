"""What an answer is, and how much room there is for it: in the model's context and in memory. Knows models; no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel

from graft.config.train import Sampling
from graft.errors import InputError
from graft.model.device import free_bytes
from graft.model.long_texts import LongTexts
from graft.model.tuned.adapters import plain

Model = PreTrainedModel | PeftModel

MEMORY_SHARE = 0.5
"""Share of the memory that is free which keys, values and logits of the answers under way may take."""


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. `ids` leaves the stop token out; `stopped` says whether there was one."""

    ids: tuple[int, ...]
    stopped: bool


def context_limit(model: Model) -> int | None:
    """Most tokens of prompt and answer together (`max_position_embeddings`), or None where the model names no limit."""
    # Configurations are one class per family and some have no such field (ALiBi, recurrent models).
    limit = getattr(plain(model).config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def new_tokens_allowed(model: Model, prompt_len: int, wanted: int) -> int:
    """How many of `wanted` new tokens fit behind a prompt; 0 or less: the prompt alone fills the context."""
    limit = context_limit(model)
    return wanted if limit is None else min(wanted, limit - prompt_len)


def check_prompt(model: Model, prompt: Sequence[int], name: str, sampling: Sampling) -> None:
    """Refuse a prompt that cannot be answered.

    Raises:
        InputError: it is empty or leaves no room for one new token.
    """
    if not prompt:
        raise InputError(f"{name} has no tokens; the chat template rendered nothing")
    if new_tokens_allowed(model, len(prompt), sampling.max_new_tokens) < 1:
        raise InputError(
            f"{name} has {len(prompt)} tokens and the model's context is {context_limit(model)}: no room for an "
            "answer; shorten it"
        )


def same_positions_up_to(model: Model) -> int | None:
    """Tokens up to which a position is encoded in the same way whatever else is computed with it; None is always.

    Dynamic NTK and LongRoPE choose their frequencies by the longest text of the batch, Llama 4 counts padding too.
    """
    long_texts = LongTexts.of(plain(model).config.to_dict())
    return min((size for size in (long_texts.turn, long_texts.alone) if size is not None), default=None)


def turns_at(model: Model) -> int | None:
    """Tokens beyond which all positions of a text are encoded otherwise, so that nothing can be kept of what was."""
    return LongTexts.of(plain(model).config.to_dict()).turn


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory for the answers under way."""

    total: float
    """Bytes."""
    per_token: float
    """Bytes of keys and values per token, from above: sliding windows and latent attention could keep less."""
    per_row: float
    """Bytes of logits per answer: in the model's format, in float32, and what choosing from them makes."""

    @classmethod
    def of(cls, model: Model) -> Budget:
        """What is free now on the model's device."""
        module = plain(model)
        config = module.config.get_text_config()
        total = MEMORY_SHARE * free_bytes(module.device)
        per_row = 4.0 * config.vocab_size * 4
        if module._is_stateful:
            return cls(total, 0.0, per_row)  # nothing is kept per token
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_token = 2 * int(config.num_hidden_layers) * int(heads) * int(width) * module.dtype.itemsize
        return cls(total, float(per_token), per_row)

    def rows(self, tokens: int) -> int:
        """How many answers of so many tokens each fit side by side; at least 1."""
        return max(1, int(self.total // (self.per_row + self.per_token * tokens)))
