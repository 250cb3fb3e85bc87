"""Training weights that are kept in bf16: each update is rounded up or down by chance, so that none is lost.

A bf16 number has 8 bits of precision: an update below 2^-9 of its weight rounds to nothing, every time, and at a
learning rate of 1e-5 most are. Rounded by chance, up with a probability of how far up the value lies between its
neighbours, the sum of many updates is right in the mean (Gupta et al. 2015, arXiv:1502.02551; for bf16 weights Zamirai
et al. 2020, arXiv:2010.06192).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def round_by_chance(values: Tensor) -> Tensor:
    """fp32 of any shape -> bf16: one of the two neighbours, whose mean over the draws is the value itself.

    Draws from torch's generator of the device. What is not finite stays as it is.
    """
    bits = values.view(torch.int32)
    # bf16 is the upper half of an fp32: a random number below it carries over with the lower half's probability.
    noise = torch.randint(0, 2**16, bits.shape, dtype=torch.int32, device=bits.device)
    upper = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), upper, values).to(torch.bfloat16)


class RoundingAdamW(torch.optim.AdamW):
    """AdamW over bf16 weights: moments and arithmetic in fp32, one tensor at a time, the result rounded by chance.

    12 bytes per trained weight (2 weight, 2 gradient, 8 moments) instead of 16 with weights and gradients in fp32. The
    generator is seeded anew for each row of a step (train/step.py), so that a resumed run rounds as the unbroken one.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise NotImplementedError("a closure would compute the loss again")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.zeros_like(parameter, dtype=torch.float32)
                weight = parameter.float()
                adamw(
                    [weight], [parameter.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    foreach=False, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip
                parameter.copy_(round_by_chance(weight) if parameter.dtype == torch.bfloat16 else weight)
