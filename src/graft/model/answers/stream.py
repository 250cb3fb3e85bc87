"""One answer as a stream of ids, and what a conversation remembers between its answers. Knows models; knows no text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from graft.config.train import Sampling
from graft.errors import InputError
from graft.model.answers.forward import Forward, inference, new_cache
from graft.model.answers.pick import Picker
from graft.model.answers.room import Model, check_prompt, new_tokens_allowed, turns_at
from graft.model.tuned.adapters import plain


@dataclass(slots=True)
class PromptMemory:
    """Keys and values of what a conversation has computed so far, so that the next turn computes only what is new."""

    ids: list[int] = field(default_factory=list)
    """The tokens whose keys and values `cache` holds."""
    cache: DynamicCache | None = None
    turned: bool = False
    """Whether they were computed with LongRoPE's other frequencies, those of long texts."""

    def forget(self) -> None:
        """Start from nothing, as after a change of the model."""
        self.ids, self.cache = [], None

    def keep_prefix_of(self, prompt: Sequence[int]) -> int:
        """Cut the memory to what it shares with `prompt` and return its length, always less than the prompt's.

        The last token of a prompt is computed anew: its logits choose the first token of the answer. Sliding-window
        layers have dropped what a cut would need back, so a memory with such layers can only grow.
        """
        shared = 0
        for known, wanted in zip(self.ids, prompt[:-1], strict=False):
            if known != wanted:
                break
            shared += 1
        surplus = len(self.ids) - shared
        if (
            self.cache is None
            or shared == 0
            or (surplus and any(type(layer) is not DynamicLayer for layer in self.cache.layers))
        ):
            self.forget()
            return 0
        if surplus:
            self.cache.crop(-surplus)
            del self.ids[shared:]
        return shared


class Stream(Iterator[int]):
    """Token ids of one answer as they are computed, without the stop token; `stopped` is known at the end.

    Equal to `generate_batch` of the one prompt. Each step's work is done when its id is asked for, so a reader that
    stops asking stops the model, and `memory` stays good for the next turn.

    Raises:
        InputError: the prompt is empty or leaves no room for one new token.
    """

    def __init__(
        self,
        model: Model,
        prompt: Sequence[int],
        stop_ids: Sequence[int],
        sampling: Sampling,
        memory: PromptMemory | None = None,
    ) -> None:
        if sampling.num_beams > 1:
            raise InputError(
                f"num_beams {sampling.num_beams}: beams are known only at the end; stream with num_beams 1"
            )
        check_prompt(model, prompt, "the conversation", sampling)
        self.stopped = False
        self._model, self._stop_ids, self._sampling = model, frozenset(stop_ids), sampling
        self._room = new_tokens_allowed(model, len(prompt), sampling.max_new_tokens)
        self._ids = list(prompt)
        self._answer_len = 0
        self._turn = turns_at(model)
        self._picker = Picker(sampling, [prompt], self._room, plain(model).device)
        self._memory = memory if memory is not None else PromptMemory()
        self._memory.keep_prefix_of(prompt)

    def __next__(self) -> int:
        if self.stopped or self._answer_len >= self._room:
            raise StopIteration
        with inference(self._model):
            logits = self._logits()
            token = int(self._picker.pick(logits).item())
        if token in self._stop_ids:
            self.stopped = True
            raise StopIteration
        self._ids.append(token)
        self._answer_len += 1
        return token

    def _logits(self) -> Tensor:
        """[1, V] after the last token; computes what the memory does not hold yet."""
        forward = Forward(self._model)
        device = plain(self._model).device
        memory = self._memory
        turned = self._turn is not None and len(self._ids) > self._turn
        if turned != memory.turned:  # what is kept has the other frequencies
            memory.forget()
            memory.turned = turned
        done = len(memory.ids)
        cache = memory.cache or new_cache(self._model)
        memory.forget()  # an interrupt inside the forward pass leaves some layers ahead of others
        new = self._ids[done:]
        positions = torch.arange(done, len(self._ids), device=device)[None]
        logits = forward(torch.tensor([new], device=device), None, positions, cache)
        if cache is not None:
            memory.ids, memory.cache = list(self._ids), cache
        return logits
