"""Answers to many prompts on token trees: what prompts share is computed once, and rows come and go.

A group of prompts is in flight together. New prompts join as one row of a token tree, and each answer then grows by one
token per forward pass. An answer that has ended leaves at once: the last row takes its place, and where enough rows are
free, prompts that wait take them. Nothing is padded but the columns that attention reads.

Every answer is what the prompt alone would give: a token attends to its own path and to nothing else, at its own
positions, however the rows are filled. Knows models and tensors; no text, no templates, no files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomForCausalLM

from graft.config.train import Sampling
from graft.console import warn_once
from graft.errors import InputError
from graft.model.answers.kept import Kept, NextRow, PromptRow
from graft.model.answers.pick import Picker
from graft.model.answers.room import Budget, Generated, new_tokens_allowed
from graft.model.attention.row_mask import RowMask
from graft.model.attention.segments import TreeRow
from graft.model.device import out_of_memory
from graft.model.logit_shape import shape_logits
from graft.model.trees import TreeLM
from graft.tokens.prefixes import Group, group_prompts
from graft.tokens.tree import SHORTEST_RUN, rows_with_paths
from graft.types import Example

MOST_ROWS = 256
"""Most answers under way. More rows make larger matrix products, but no faster ones."""
PROMPT_TOKENS = 4096
"""Tokens of new prompts computed in one forward pass, the stem and a longer prompt apart."""


def answer_on_trees(
    lm: TreeLM, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
) -> Iterator[list[tuple[int, Generated]]]:
    """Greedy or sampled answers, as (index of the prompt, answer), given out as they end.

    The model's attention must be `kept.KEPT` meanwhile. Running out of memory halves the answers under way, once or
    several times; those that leave are computed again later, with the same result.

    Raises:
        InputError: memory is too small for one answer alone.
    """
    for group in group_prompts(prompts):
        yield from _Flight(lm, prompts, group, frozenset(stop_ids), sampling).answers()


@dataclass(slots=True)
class _Answer:
    """One answer under way; its row is its place in the list of answers."""

    index: int
    """Of the prompt."""
    prompt_len: int
    room: int
    """Most new tokens."""
    ids: list[int] = field(default_factory=list)
    stopped: bool = False

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.ids) >= self.room

    @property
    def depth(self) -> int:
        """Tokens whose keys and values are kept: all but the last one of the answer, which is fed next."""
        return self.prompt_len + len(self.ids) - 1

    @property
    def widest(self) -> int:
        """Tokens of prompt and answer at most."""
        return self.prompt_len + self.room


class _Flight:
    """One group of prompts, from the first to join to the last to leave."""

    def __init__(
        self,
        lm: TreeLM,
        prompts: Sequence[Sequence[int]],
        group: Group,
        stops: frozenset[int],
        sampling: Sampling,
    ) -> None:
        self.lm, self.prompts, self.stem, self.stops, self.sampling = lm, prompts, group.stem, stops, sampling
        self.waiting = deque(group.order)
        self.most_rows = MOST_ROWS
        self.budget = Budget.of(lm.model)
        self.tried = 0
        """Rows of the forward pass that was tried last."""
        self.most_room = max(self._room(index) for index in group.order)
        self._clear()

    def answers(self) -> Iterator[list[tuple[int, Generated]]]:
        """All answers of the group, as they end."""
        while self.waiting or self.under_way:
            for step in (self._join, self._go_on):
                if ended := self._within_memory(step):
                    yield ended

    def _within_memory(self, step: Callable[[], list[tuple[int, Generated]]]) -> list[tuple[int, Generated]]:
        """Take a step; where memory runs out everything under way waits again, for half as many rows.

        Raises:
            InputError: there was only one row.
        """
        try:
            with torch.inference_mode():
                return step()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        # Outside the handler: the error holds on to the frames of the step, and they to its tensors.
        self.waiting.extendleft(answer.index for answer in reversed(self.under_way))
        self._clear()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        if self.tried == 1:
            index = self.waiting[0]
            raise InputError(
                f"memory is too small for one answer: the prompt has {len(self.prompts[index])} tokens and "
                f"{self._room(index)} may follow; allow fewer new tokens, or take another device or precision"
            )
        self.most_rows = self.tried // 2
        warn_once("memory ran out, so fewer answers are computed side by side")
        return []

    def _clear(self) -> None:
        """Nothing is under way and nothing is kept."""
        self.under_way: list[_Answer] = []
        self.kept = Kept(self.stem)
        self.picker = Picker(self.sampling, [], self.most_room, self.lm.device)

    def _join(self) -> list[tuple[int, Generated]]:
        """Let waiting prompts join where a quarter of the rows is free; returns what ended with its first token."""
        new, have = self._next_prompts(), len(self.under_way)
        if not new or (len(new) * 4 < have and len(new) < len(self.waiting)):
            return []
        self.tried = have + len(new)
        logits = self._read(new)
        for index in new:
            self.waiting.popleft()
            self.under_way.append(_Answer(index, len(self.prompts[index]), self._room(index)))
        self.picker.join([self.prompts[index] for index in new])
        return self._take(self.picker.pick(logits, have), have)

    def _go_on(self) -> list[tuple[int, Generated]]:
        """One more token for each answer under way."""
        if not self.under_way:
            return []
        self.tried = len(self.under_way)
        device = self.lm.device
        ids = torch.tensor([[answer.ids[-1] for answer in self.under_way]], device=device)
        depths = [answer.depth for answer in self.under_way]
        row = NextRow(self.kept, ids, torch.tensor([depths], device=device), max(depths) - self.stem + 1)
        return self._take(self.picker.pick(self._logits(row, None)), 0)

    def _read(self, new: Sequence[int]) -> Tensor:
        """[n, V] logits after each of the new prompts, whose keys and values are kept in the rows after the last."""
        have = len(self.under_way)
        examples = []
        for number, index in enumerate(new):
            ids = np.asarray(self.prompts[index], np.int32)
            examples.append(Example(str(number), 0, ids, np.zeros(len(ids), np.float32), len(ids)))
        longest = max(len(example.ids) for example in examples)
        columns = max(longest, *(answer.depth for answer in self.under_way), 0) - self.stem
        found: list[Tensor] = []
        numbers: list[int] = []
        # Each of these rows begins with the stem.
        for row, paths in rows_with_paths(examples, max(longest, self.stem + PROMPT_TOKENS), True, SHORTEST_RUN):
            skip = self.stem if self.kept.stem_known else 0
            own = [path[self.stem :] for _, path in paths]
            lengths = [len(path) for path in own]
            here = [int(example.conversation) for example, _ in paths]
            prompt_row = PromptRow(
                self.kept,
                TreeRow.of(row, self.lm.device),
                skip,
                nodes=self._tensor(np.concatenate(own)),
                rows=self._tensor(np.repeat(np.array(here) + have, lengths)),
                columns=self._tensor(np.concatenate([np.arange(length) for length in lengths])),
                size=(have + len(new), columns),
            )
            leaves = self._tensor(np.array([path[-1] for path in own]) - skip)
            found.append(self._logits(prompt_row, leaves))
            numbers += here
            self.kept.stem_known = self.stem > 0
        return torch.cat(found)[torch.tensor(numbers, device=self.lm.device).argsort()]

    def _logits(self, row: PromptRow | NextRow, nodes: Tensor | None) -> Tensor:
        """[n, V] in float32, of some nodes of a row or of all."""
        lm = self.lm
        module = lm.base if lm.logit_shape is None else lm.decoder
        if isinstance(lm.base, BloomForCausalLM):
            out = module(input_ids=row.ids, attention_mask=RowMask.of(row), use_cache=False)
        else:
            out = module(input_ids=row.ids, position_ids=row.positions, row=row, use_cache=False)
        found: Tensor = out.logits[0] if lm.logit_shape is None else out.last_hidden_state[0]
        if nodes is not None:
            found = found.index_select(0, nodes)
        return found.float() if lm.logit_shape is None else shape_logits(lm.head(found).float(), lm.logit_shape)

    def _tensor(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(array, device=self.lm.device)

    def _take(self, chosen: Tensor, first: int) -> list[tuple[int, Generated]]:
        """Give the answers from `first` on their next token; those that have ended leave and are returned."""
        for answer, token in zip(self.under_way[first:], chosen.tolist(), strict=True):
            if token in self.stops:
                answer.stopped = True
            else:
                answer.ids.append(token)
        ended = [answer for answer in self.under_way if answer.ended]
        if ended:
            self._leave([place for place, answer in enumerate(self.under_way) if answer.ended])
        return [(answer.index, Generated(tuple(answer.ids), answer.stopped)) for answer in ended]

    def _leave(self, places: Sequence[int]) -> None:
        """Remove rows: those at the end that go on take the places of those before them that have ended."""
        left = len(self.under_way) - len(places)
        gone = set(places)
        to = [place for place in places if place < left]
        source = [place for place in range(left, len(self.under_way)) if place not in gone]
        order = list(range(left))
        for place, last in zip(to, source, strict=True):
            order[place] = last
        device = self.lm.device
        if to and left:
            self.kept.move(torch.tensor(to, device=device), torch.tensor(source, device=device))
        self.picker.keep_rows(torch.tensor(order, dtype=torch.long, device=device))
        self.under_way = [self.under_way[place] for place in order]

    def _next_prompts(self) -> list[int]:
        """The prompts that fit beside what is under way, in the order in which they wait."""
        widest = max((answer.widest for answer in self.under_way), default=0)
        new: list[int] = []
        for index in self.waiting:
            widest = max(widest, len(self.prompts[index]) + self._room(index))
            rows = len(self.under_way) + len(new) + 1
            if rows > min(self.most_rows, self.budget.rows(widest - self.stem)) and rows > 1:
                break
            new.append(index)
        return new

    def _room(self, index: int) -> int:
        return new_tokens_allowed(self.lm.model, len(self.prompts[index]), self.sampling.max_new_tokens)
