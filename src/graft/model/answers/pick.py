"""Which token comes next: from logits to ids. Knows tensors and settings; knows no models.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from graft.config.train import Sampling


class Picker:
    """Chooses the next token of each row: the best, or by its own stream of random numbers.

    Rows may come and go; each has its own count of steps, so what is chosen never depends on the others.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], most: int, device: torch.device) -> None:
        """`most` is the largest number of tokens that any row will be given."""
        self._sampling, self._most, self._device = sampling, most, device
        self._drawn = torch.empty(0, most, device=device)  # [B, most] uniform numbers in [0, 1)
        self._step = torch.empty(0, dtype=torch.long, device=device)  # [B] tokens chosen so far
        self._seen: Tensor | None = None  # [B, V] tokens in the prompt or the answer
        self._unseen: list[Sequence[int]] = []  # prompts of the last rows, which `_seen` does not have yet
        self.join(prompts)

    def join(self, prompts: Sequence[Sequence[int]]) -> None:
        """Add rows behind those that are there."""
        if self._sampling.repetition_penalty != 1:
            self._unseen += prompts
        if self._sampling.temperature > 0 and prompts:
            draws = [torch.rand(self._most, generator=seeded(self._sampling.seed, prompt)) for prompt in prompts]
            self._drawn = torch.cat([self._drawn, torch.stack(draws).to(self._device)])
            self._step = torch.cat([self._step, self._step.new_zeros(len(prompts))])

    def pick(self, logits: Tensor, first: int = 0) -> Tensor:
        """logits [B, V] of the rows from `first` on -> token ids [B]."""
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits = self._penalise(logits, first)
        if sampling.temperature > 0:
            drawn = self._drawn[first:].gather(1, self._step[first:, None])[:, 0]
            chosen = _draw(logits / sampling.temperature, drawn, sampling.top_k, sampling.top_p)
            self._step[first:] += 1
        else:
            chosen = logits.argmax(-1)
        if self._seen is not None:
            self._seen[first:].scatter_(1, chosen[:, None], True)
        return chosen

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows only, in this order; rows [B'] indices."""
        if self._sampling.temperature > 0:
            self._drawn, self._step = self._drawn[rows], self._step[rows]
        if self._seen is not None:
            self._seen = self._seen[rows]

    def _penalise(self, logits: Tensor, first: int) -> Tensor:
        """Make tokens that were used already less likely (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
        if self._unseen:
            seen = torch.zeros(len(self._unseen), logits.shape[-1], dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(self._unseen):
                seen[row, torch.tensor(sorted(set(prompt)), device=logits.device)] = True
            self._seen = seen if self._seen is None else torch.cat([self._seen, seen])
            self._unseen = []
        assert self._seen is not None
        penalty = self._sampling.repetition_penalty
        return torch.where(self._seen[first:], torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _draw(logits: Tensor, uniform: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sample by inverting the cumulative distribution. logits [B, V], uniform [B] -> ids [B]."""
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < probs.shape[-1]:
        probs[:, top_k:] = 0
        probs /= probs.sum(-1, keepdim=True)
    if top_p < 1:
        probs[probs.cumsum(-1) - probs >= top_p] = 0  # the token that crosses top_p is the last one kept
    total = probs.cumsum(-1)
    place = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    last = (probs > 0).sum(-1, keepdim=True) - 1
    chosen: Tensor = order.gather(-1, torch.minimum(place, last))[:, 0]
    return chosen


def seeded(seed: int, prompt: Sequence[int]) -> torch.Generator:
    """A generator whose numbers depend on the seed and the prompt alone, not on batch, order or device."""
    text = f"{seed}:" + ",".join(map(str, prompt))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
