"""From prompts to answers, as ids. Knows models and tensors; knows no text, no templates and no files.

A model that is exact on token trees answers on them (`flight`). All others, and beams, are answered here, in padded
batches. Two things that go wrong elsewhere cannot happen: prompts are left-padded in this file, with their own
attention mask and position ids, so nothing depends on a tokenizer's padding side or on which id it calls padding. And
every setting of the generation is passed in: what a model folder's generation_config.json says (a temperature, an end
of sequence id, a suppressed token) is never consulted.

Shape legend: B rows of a batch, T tokens fed in one forward pass, S tokens seen so far, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from graft.config.train import Sampling
from graft.console import warn_once
from graft.errors import InputError
from graft.model.adapters import plain
from graft.model.device import out_of_memory
from graft.model.flight import answer_on_trees
from graft.model.kept import KEPT
from graft.model.pick import Picker, seeded
from graft.model.room import (
    Budget,
    Generated,
    Model,
    check_prompt,
    context_limit,
    new_tokens_allowed,
    same_positions_up_to,
)
from graft.model.trees import TreeLM

BATCH_ROWS = 64
"""Most prompts of one padded batch."""
_STANDARD_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


@dataclass(slots=True)
class PromptMemory:
    """Keys and values of what a conversation has computed so far, so that the next turn computes only what is new."""

    ids: list[int] = field(default_factory=list)
    """The tokens whose keys and values `cache` holds."""
    cache: DynamicCache | None = None

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


def generate_batch(
    model: Model | TreeLM,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    pad_id: int = 0,
) -> list[Generated]:
    """Answer all prompts; the results are in the order of the prompts. See `generate_in_batches`."""
    results: list[Generated | None] = [None] * len(prompts)
    for batch in generate_in_batches(model, prompts, stop_ids, sampling, pad_id):
        for index, generated in batch:
            results[index] = generated
    return cast("list[Generated]", results)


def generate_in_batches(
    model: Model | TreeLM,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    sampling: Sampling,
    pad_id: int = 0,
) -> Iterator[list[tuple[int, Generated]]]:
    """Answer prompts side by side and give out (index of the prompt, answer), some at a time, as they end.

    A `TreeLM` that is exact on trees computes once what prompts share; anything else, and beams, go through padded
    batches of prompts of like length. Equal prompts are answered once.

    An answer does not depend on what it is computed with: greedy answers in fp32 are those of single runs, and each
    sampled row draws from its own generator, seeded by `sampling.seed` and its prompt. An answer ends with a stop id,
    after `max_new_tokens`, or where the model's context is full (`stopped` is then false).

    Raises:
        InputError: a prompt is empty or leaves no room for one new token, beams are asked of a recurrent model, or
            memory is too small for one answer.
    """
    lm, model = (model, model.model) if isinstance(model, TreeLM) else (None, model)
    for index, prompt in enumerate(prompts):
        check_prompt(model, prompt, f"prompt {index}", sampling)
    if sampling.num_beams > 1 and plain(model)._is_stateful:
        raise InputError(
            f"num_beams {sampling.num_beams}: a recurrent model cannot be searched by beams; use num_beams 1"
        )
    equal: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(index)
    different = list(equal)
    places = list(range(len(different)))
    work: list[tuple[list[int], Iterator[list[tuple[int, Generated]]]]] = []
    if lm is not None and lm.on_trees and not lm.row_in_masks and sampling.num_beams == 1:
        here = [place for place in places if not _alone(model, len(different[place]), sampling)]
        places = sorted(set(places) - set(here))
        work.append((here, _on_trees(lm, [different[place] for place in here], stop_ids, sampling)))
    apart = [different[place] for place in places]
    work.append((places, _in_padded_batches(model, apart, stop_ids, sampling, pad_id)))
    for places, batches in work:
        for batch in batches:
            yield [(index, answer) for place, answer in batch for index in equal[different[places[place]]]]


def _on_trees(
    lm: TreeLM, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
) -> Iterator[list[tuple[int, Generated]]]:
    """The answers of a model that is exact on trees; its attention is as it was whenever some are given out."""
    answers = answer_on_trees(lm, prompts, stop_ids, sampling)
    while True:
        with _inference(lm.model, KEPT):
            ended = next(answers, None)
        if ended is None:
            return
        yield ended


def _in_padded_batches(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, pad_id: int
) -> Iterator[list[tuple[int, Generated]]]:
    """Batch by batch, longest prompts first; where memory runs out, batches of half as many rows from there on."""
    answer = _by_beams if sampling.num_beams > 1 else _by_steps
    waiting = list(_batches(model, [len(prompt) for prompt in prompts], sampling))[::-1]
    while waiting:
        chosen = waiting.pop()
        generated = None
        try:
            with _inference(model):
                generated = answer(model, [prompts[index] for index in chosen], stop_ids, sampling, pad_id)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        if generated is not None:
            yield list(zip(chosen, generated, strict=True))
            continue
        if len(chosen) == 1:
            raise InputError(
                f"memory is too small for one answer: the prompt has {len(prompts[chosen[0]])} tokens and "
                f"{sampling.max_new_tokens} may follow; allow fewer new tokens, or take another device or precision"
            )
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        warn_once("memory ran out, so fewer answers are computed side by side")
        most = len(chosen) // 2
        whole = [*waiting, chosen]
        waiting = [batch[start : start + most] for batch in whole for start in reversed(range(0, len(batch), most))]


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
        self._picker = Picker(sampling, [prompt], self._room, plain(model).device)
        self._memory = memory if memory is not None else PromptMemory()
        self._memory.keep_prefix_of(prompt)

    def __next__(self) -> int:
        if self.stopped or self._answer_len >= self._room:
            raise StopIteration
        with _inference(self._model):
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
        forward = _Forward(self._model)
        device = plain(self._model).device
        memory = self._memory
        done = len(memory.ids)
        cache = memory.cache or _new_cache(self._model)
        memory.forget()  # an interrupt inside the forward pass leaves some layers ahead of others
        new = self._ids[done:]
        positions = torch.arange(done, len(self._ids), device=device)[None]
        logits = forward(torch.tensor([new], device=device), None, positions, cache)
        if cache is not None:
            memory.ids, memory.cache = list(self._ids), cache
        return logits


class _Forward:
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


def _by_steps(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, pad_id: int
) -> list[Generated]:
    """Greedy or sampled answers of one batch; rows that have ended leave the batch."""
    device = plain(model).device
    ids, mask, positions = _left_pad(prompts, pad_id, device)
    room = [new_tokens_allowed(model, len(prompt), sampling.max_new_tokens) for prompt in prompts]
    picker = Picker(sampling, prompts, max(room), device)
    forward, cache = _Forward(model), _new_cache(model)
    padded, stops = not bool(mask.all()), frozenset(stop_ids)
    last_position = (context_limit(model) or 2**31) - 1
    answers: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    rows = list(range(len(prompts)))  # which prompt each row of the batch is
    ended: set[int] = set()
    while True:
        chosen = picker.pick(forward(ids, mask if padded else None, positions, cache))
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row in ended:
                continue
            if token in stops:
                stopped[row] = True
            else:
                answers[row].append(token)
            if stopped[row] or len(answers[row]) >= room[row]:
                ended.add(row)
        if len(ended) == len(prompts):
            return [Generated(tuple(answer), stop) for answer, stop in zip(answers, stopped, strict=True)]
        # Rows that have ended stay for a while: they must not run past the table of a model with learned positions.
        following = (positions[:, -1:] + 1).clamp(max=last_position)
        if cache is None:
            ids, positions = torch.cat([ids, chosen[:, None]], dim=1), torch.cat([positions, following], dim=1)
        else:
            ids, positions = chosen[:, None], following
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        gone = sum(row in ended for row in rows)
        if gone * 4 >= len(rows):  # cutting copies the cache once; a quarter fewer rows pays for it at once
            kept = torch.tensor([place for place, row in enumerate(rows) if row not in ended], device=device)
            rows = [row for row in rows if row not in ended]
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            picker.keep_rows(kept)
            if cache is not None:
                cache.batch_select_indices(kept)


def _new_cache(model: Model) -> DynamicCache | None:
    """Where keys and values are kept; None for a recurrent model, whose tokens are then all read again at each step.

    That is slow, but exact: transformers' own loop feeds RWKV's state twice and gives other answers.
    """
    module = plain(model)
    return None if module._is_stateful else DynamicCache(config=module.config)


def _by_beams(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, pad_id: int
) -> list[Generated]:
    """The best of `num_beams` partial answers, by transformers' own `generate`."""
    module, device = plain(model), plain(model).device
    ids, mask, _ = _left_pad(prompts, pad_id, device)
    room = new_tokens_allowed(model, len(prompts[0]), sampling.max_new_tokens)  # `_batches` made it the same for all
    settings = GenerationConfig(
        max_new_tokens=room,
        num_beams=sampling.num_beams,
        do_sample=sampling.temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
    )
    if sampling.temperature > 0:
        settings.temperature, settings.top_p, settings.top_k = sampling.temperature, sampling.top_p, sampling.top_k
    # transformers fills whatever is unset from the model's own, so that is put aside.
    own, module.generation_config = module.generation_config, GenerationConfig()
    try:
        with torch.random.fork_rng(enabled=sampling.temperature > 0):
            torch.manual_seed(seeded(sampling.seed, prompts[0]).initial_seed())
            out = module.generate(ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    finally:
        module.generation_config = own
    stops = frozenset(stop_ids)
    return [_cut_at_stop(row, stops, room) for row in cast(Tensor, out)[:, ids.shape[1] :].tolist()]


def _cut_at_stop(ids: list[int], stops: frozenset[int], room: int) -> Generated:
    place = next((index for index, token in enumerate(ids) if token in stops), None)
    return Generated(tuple(ids[: room if place is None else place]), place is not None)


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask, positions, each [B, T]; padding is on the left, masked, and has position 0."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(longest, device=device)[None] - (longest - lengths)[:, None]
    return ids, (positions >= 0).long(), positions.clamp(min=0)


def _batches(model: Model, lengths: Sequence[int], sampling: Sampling) -> Iterator[list[int]]:
    """Indices of the prompts answered together, longest first: the largest batch comes at the start, not at the end."""
    together = not (sampling.temperature > 0 and sampling.num_beams > 1)  # transformers draws for the batch as a whole
    budget = Budget.of(model)
    room = [new_tokens_allowed(model, length, sampling.max_new_tokens) for length in lengths]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = lengths[batch[0]] if batch else lengths[index]
        most = min(BATCH_ROWS, budget.rows(first + room[index]) // sampling.num_beams)
        fits = len(batch) < most and together and not _alone(model, first, sampling)
        if plain(model)._is_stateful:  # a recurrent state has no mask for padding
            fits = fits and lengths[index] == first
        elif sampling.num_beams > 1:  # one number of new tokens for the whole batch
            fits = fits and room[index] == room[batch[0] if batch else index]
        if batch and not fits:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _alone(model: Model, prompt_len: int, sampling: Sampling) -> bool:
    """Whether an answer may come to change how positions are encoded, for all that is computed with it."""
    limit = same_positions_up_to(model)
    return limit is not None and prompt_len + sampling.max_new_tokens > limit


@contextmanager
def _inference(model: Model, attention: str | None = None) -> Iterator[None]:
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
