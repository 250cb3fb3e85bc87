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
    """Chooses the next token of each row: the best, or by its own stream of random numbers."""

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], most: int, device: torch.device) -> None:
        self._sampling = sampling
        self._prompts: Sequence[Sequence[int]] | None = prompts if sampling.repetition_penalty != 1 else None
        self._seen: Tensor | None = None  # [B, V] tokens in the prompt or the answer
        self._drawn: Tensor | None = None  # [B, steps] uniform numbers in [0, 1)
        self._step = 0
        if sampling.temperature > 0:
            draws = [torch.rand(most, generator=seeded(sampling.seed, prompt)) for prompt in prompts]
            self._drawn = torch.stack(draws).to(device)

    def pick(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> token ids [B]."""
        sampling = self._sampling
        if self._prompts is not None:
            logits = self._penalise(logits, self._prompts)
        if self._drawn is None:
            chosen = logits.argmax(-1)
        else:
            chosen = _draw(logits / sampling.temperature, self._drawn[:, self._step], sampling.top_k, sampling.top_p)
        self._step += 1
        if self._seen is not None:
            self._seen[torch.arange(len(chosen), device=chosen.device), chosen] = True
        return chosen

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows only; rows [B'] indices."""
        if self._drawn is not None:
            self._drawn = self._drawn[rows]
        if self._seen is not None:
            self._seen = self._seen[rows]

    def _penalise(self, logits: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Make tokens that were used already less likely (Keskar et al. 2019, arXiv:1909.05858, section 4.1)."""
        if self._seen is None:
            self._seen = torch.zeros_like(logits, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(sorted(set(prompt)), device=logits.device)] = True
        penalty = self._sampling.repetition_penalty
        return torch.where(self._seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


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
