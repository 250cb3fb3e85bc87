"""From prompts to answers, as ids. Knows models and tensors; knows no text, no templates and no files.

A model that is exact on token trees answers on them (`flight`). All others, and beams, are answered in padded batches
(`padded`). Every setting of the generation is passed in: what a model folder's generation_config.json says (a
temperature, an end of sequence id, a suppressed token) is never consulted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from graft.config.train import Sampling
from graft.errors import InputError
from graft.model.answers.flight import answer_on_trees
from graft.model.answers.forward import inference
from graft.model.answers.kept import KEPT
from graft.model.answers.padded import alone, in_padded_batches
from graft.model.answers.room import Generated, Model, check_prompt, same_positions_up_to
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import plain


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
        limit = same_positions_up_to(model)
        here = [place for place in places if not alone(limit, len(different[place]), sampling)]
        places = sorted(set(places) - set(here))
        work.append((here, _on_trees(lm, [different[place] for place in here], stop_ids, sampling)))
    apart = [different[place] for place in places]
    work.append((places, in_padded_batches(model, apart, stop_ids, sampling, pad_id)))
    for places, batches in work:
        for batch in batches:
            yield [(index, answer) for place, answer in batch for index in equal[different[places[place]]]]


def _on_trees(
    lm: TreeLM, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
) -> Iterator[list[tuple[int, Generated]]]:
    """The answers of a model that is exact on trees; its attention is as it was whenever some are given out."""
    answers = answer_on_trees(lm, prompts, stop_ids, sampling)
    while True:
        with inference(lm.model, KEPT):
            ended = next(answers, None)
        if ended is None:
            return
        yield ended
