"""Weights that are judged and kept in place of those that are updated: a moving average, or a schedule-free one.

Speaks parameters by name. Validation, checkpoints and `final/` see the averaged weights; training goes on with the
live ones, bit for bit, so those are set aside and put back rather than computed back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graft.console import note
from graft.model.processes.shard import like, whole

LIVE = "live/"
"""Prefix of the live weights in a checkpoint's optimizer file, where the folder's weights are others."""
EMA = "ema/"
"""Prefix of the average in the same file."""


class Average:
    """What is trained, and the average of it that is judged; without an average both are one.

    An exponential moving average begins as the weights that training starts from, and after each update moves towards
    the live ones by 1 - decay. It is kept in fp32. A schedule-free optimiser keeps its own (Defazio et al. 2024).
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, decay: float | None, free: bool
    ) -> None:
        self.parameters = parameters
        self.optimizer = optimizer
        self.free = free
        """Whether the optimiser is schedule-free."""
        self.decay = decay
        self.ema: dict[str, Tensor] = {}
        if decay is not None:
            self.ema = {name: p.detach().float().clone() for name, p in parameters.items()}
            extra = sum(value.numel() for value in self.ema.values()) * 4 / 2**20
            note(f"ema {decay:g}: validation and what is saved take the average of the weights ({extra:,.0f} MiB more)")

    @property
    def differs(self) -> bool:
        """Whether other weights are judged than are updated."""
        return self.free or self.decay is not None

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average, after an update."""
        for name, average in self.ema.items():
            average.lerp_(self.parameters[name].float(), 1 - (self.decay or 0.0))

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The model has the averaged weights within."""
        if not self.differs:
            yield
            return
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._show()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in live.items():
                    self.parameters[name].copy_(value)
            if self.free:
                _mode(self.optimizer, train=True)

    def keep(self) -> None:
        """Give the model the averaged weights for good."""
        if self.differs:
            self._show()

    @torch.no_grad()
    def _show(self) -> None:
        if self.free:
            self.optimizer.eval()  # type: ignore[attr-defined]  # its own way from the live weights to the average
        for name, average in self.ema.items():
            self.parameters[name].copy_(average)

    def tensors(self) -> dict[str, Tensor]:
        """The average, as it goes into a checkpoint."""
        return {EMA + name: whole(value).contiguous() for name, value in self.ema.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a saved average back."""
        for name, average in self.ema.items():
            average.copy_(like(average, tensors[EMA + name]))


def _mode(optimizer: torch.optim.Optimizer, train: bool) -> None:
    """Say which weights the parameters hold, without computing them."""
    for group in optimizer.param_groups:
        group["train_mode"] = train


def live_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The weights as training will go on with them, as they go into a checkpoint."""
    return {LIVE + name: whole(p).clone().contiguous() for name, p in parameters.items()}


@torch.no_grad()
def load_live(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put saved live weights back, where there are any."""
    for name, parameter in parameters.items():
        if LIVE + name in tensors:
            parameter.copy_(like(parameter, tensors[LIVE + name]))
