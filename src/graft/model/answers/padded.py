"""Answers in padded batches, for models that cannot answer on trees, and for beams. Knows models and ids, no text.

Prompts are left-padded here, with their own attention mask and position ids, so nothing depends on a tokenizer's
padding side or on which id it calls padding.

Shape legend: B rows of a batch, T tokens fed in one forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from graft.config.train import Sampling
from graft.console import warn_once
from graft.errors import InputError
from graft.model.answers.forward import Forward, inference, new_cache
from graft.model.answers.pick import Picker, seeded
from graft.model.answers.room import (
    Budget,
    Generated,
    Model,
    context_limit,
    new_tokens_allowed,
    same_positions_up_to,
    turns_at,
)
from graft.model.device import out_of_memory
from graft.model.tuned.adapters import plain

BATCH_ROWS = 64
"""Most prompts of one padded batch."""


def in_padded_batches(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, pad_id: int
) -> Iterator[list[tuple[int, Generated]]]:
    """Batch by batch, longest prompts first; where memory runs out, batches of half as many rows from there on."""
    answer = _by_beams if sampling.num_beams > 1 else _by_steps
    waiting = list(_batches(model, [len(prompt) for prompt in prompts], sampling))[::-1]
    while waiting:
        chosen = waiting.pop()
        generated = None
        try:
            with inference(model):
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


def _by_steps(
    model: Model, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling, pad_id: int
) -> list[Generated]:
    """Greedy or sampled answers of one batch; rows that have ended leave the batch."""
    device = plain(model).device
    ids, mask, positions = _left_pad(prompts, pad_id, device)
    room = [new_tokens_allowed(model, len(prompt), sampling.max_new_tokens) for prompt in prompts]
    picker = Picker(sampling, prompts, max(room), device)
    forward, cache = Forward(model), new_cache(model)
    padded, stops = not bool(mask.all()), frozenset(stop_ids)
    last_position, turn = (context_limit(model) or 2**31) - 1, turns_at(model)
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
        if cache is not None and len(prompts) == 1 and len(prompts[0]) + len(answers[0]) - 1 == turn:
            # LongRoPE's frequencies are others from here on, and keys that were kept have the old ones.
            cache = new_cache(model)
            ids, mask, positions = _left_pad([[*prompts[0], *answers[0]]], pad_id, device)
        gone = sum(row in ended for row in rows)
        if gone * 4 >= len(rows):  # cutting copies the cache once; a quarter fewer rows pays for it at once
            kept = torch.tensor([place for place, row in enumerate(rows) if row not in ended], device=device)
            rows = [row for row in rows if row not in ended]
            ids, positions, mask = ids[kept], positions[kept], mask[kept]
            picker.keep_rows(kept)
            if cache is not None:
                cache.batch_select_indices(kept)


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
    budget, limit = Budget.of(model), same_positions_up_to(model)
    room = [new_tokens_allowed(model, length, sampling.max_new_tokens) for length in lengths]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        first = lengths[batch[0]] if batch else lengths[index]
        most = min(BATCH_ROWS, budget.rows(first + room[index]) // sampling.num_beams)
        fits = len(batch) < most and together and not alone(limit, first, sampling)
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


def alone(limit: int | None, prompt_len: int, sampling: Sampling) -> bool:
    """Whether an answer may come to change how positions are encoded, for all that is computed with it.

    `limit` is the model's (`same_positions_up_to`).
    """
    return limit is not None and prompt_len + sampling.max_new_tokens > limit
