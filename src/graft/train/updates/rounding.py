"""Training weights that are kept in bf16: each update is rounded up or down by chance, so that none is lost.

A bf16 number has 8 bits of precision: an update below 2^-9 of its weight rounds to nothing, every time, and at a
learning rate of 1e-5 most are. Rounded by chance, up with a probability of how far up the value lies between its
neighbours, the sum of many updates is right in the mean (Gupta et al. 2015, arXiv:1502.02551; for bf16 weights Zamirai
et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from graft.model.processes.shard import first_of, local


def draws(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """[count] int32 of 16 random bits each: those of the numbers first, first + 1, ... of a weight.

    A hash of the seed and of the number's place, four to each (SplitMix64: Steele, Lea & Flood 2014,
    doi 10.1145/2660193.2660195): a part of a weight is rounded as it would be within the whole.
    """
    begin = first // 4
    state = torch.arange(begin, (first + count + 3) // 4, dtype=torch.int64, device=device)
    state = state * _signed(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return state.view(torch.int16)[first - 4 * begin :][:count].to(torch.int32) & 0xFFFF


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def round_by_chance(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 of any shape, and as many random bits, -> bf16: one of two neighbours, whose mean is the value itself.

    What is not finite stays as it is.
    """
    # bf16 is the upper half of an fp32: a random number below it carries over with the lower half's probability.
    upper = ((values.view(torch.int32) + bits.view_as(values)) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), upper, values).to(torch.bfloat16)


class RoundingAdamW(torch.optim.AdamW):
    """AdamW over bf16 weights: moments and arithmetic in fp32, one tensor at a time, the result rounded by chance.

    12 bytes per trained weight (2 weight, 2 gradient, 8 moments) instead of 16 with weights and gradients in fp32. What
    is drawn follows from `seed`, the weight's place among all and its updates so far: a resumed run rounds as the
    unbroken one, and several processes, which have parts of a weight, as one.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int = 0, **options: Any) -> None:
        super().__init__(groups, **options)
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise NotImplementedError("a closure would compute the loss again")
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place + group.get("place", 0))

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
        seed = hash((self.seed, place, int(state["step"])))
        beta1, beta2 = group["betas"]
        mine = local(parameter)
        weight = mine.float()
        adamw(
            [weight], [local(parameter.grad).float()], [local(state["exp_avg"])], [local(state["exp_avg_sq"])], [],
            [state["step"]], foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        if mine.dtype == torch.bfloat16:
            weight = round_by_chance(weight, draws(seed, first_of(parameter), weight.numel(), weight.device))
        mine.copy_(weight)
