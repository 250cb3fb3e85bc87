"""The optimisers, one table entry each: what makes it, what options it takes, and what its package is called.

Speaks parameter groups and settings; knows no model. Each entry takes the groups of `optim.parameter_groups`, whose
`weights` says what a group holds: `hidden` matrices, `embedding` (with the output head) or `other` (vectors, and
stacks of matrices). A package is imported when its optimiser is asked for: one of them takes seconds.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graft.config.base import did_you_mean
from graft.config.train import Train
from graft.errors import ConfigError, first_line
from graft.train.updates.rounding import RoundingAdamW

Group = dict[str, Any]
Maker = Callable[[list[Group], Train], torch.optim.Optimizer]


def _none(_group: Group) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Kind:
    """One optimiser."""

    make: Maker
    options: Callable[[], Sequence[str]]
    """Names that `optimizer_options` may have."""
    package: str | None = None
    """What to install, where it is not part of torch."""
    whole: Callable[[Group], bool] = _none
    """Whether it looks at the rows, columns, blocks or all of a group's weights, and not at each number by itself."""


class Together(torch.optim.Optimizer):
    """Several optimisers, each for its own parameters, behind the interface of one."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for part in parts for group in part.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.parts = parts
        self.param_groups = groups  # the parts' own, so that a rate set here is theirs
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """Update every part's parameters that have a gradient."""
        for part in self.parts:
            part.step(closure)


def _all(_group: Group) -> bool:
    return True


def _hidden(group: Group) -> bool:
    return bool(group["weights"] == "hidden")


def _names(taken_by_settings: Sequence[str], *classes: Callable[..., Any]) -> Sequence[str]:
    known = {name for cls in classes for name in inspect.signature(cls).parameters}
    return sorted(known - {"self", "params", "lr", "weight_decay", "closure", *taken_by_settings})


ADAM = ("betas", "eps")
"""What the settings beta1, beta2 and eps give."""


def _adam(settings: Train) -> dict[str, Any]:
    return {"lr": settings.peak_lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}


def _adamw(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
    if settings.master_weights == "stochastic":
        return RoundingAdamW(groups, settings.seed, **_adam(settings), **settings.optimizer_options)
    return torch.optim.AdamW(groups, **{"fused": True, **_adam(settings), **settings.optimizer_options})


def _adamw_8bit(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Moments in blocks of 256 eight-bit numbers (Dettmers et al. 2022, arXiv:2110.02861)."""
    return _package("bitsandbytes").optim.AdamW8bit(groups, **_adam(settings), **settings.optimizer_options)  # type: ignore[no-any-return]


def _adafactor(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Shazeer & Stern 2018, arXiv:1804.04235; its rate is relative to the size of the weights."""
    options = _tuples(settings.optimizer_options)
    return torch.optim.Adafactor(groups, lr=settings.peak_lr, **options)


def _muon(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Orthogonalised momentum for hidden matrices (Jordan et al. 2024), AdamW for all else.

    The update is scaled to the size of AdamW's (`match_rms_adamw`, arXiv:2502.16982), so that one rate serves both.
    """
    hidden = [group for group in groups if group["weights"] == "hidden"]
    others = [group for group in groups if group["weights"] != "hidden"]
    options = {"adjust_lr_fn": "match_rms_adamw", **_tuples(settings.optimizer_options)}
    parts: list[torch.optim.Optimizer] = []
    if hidden:
        parts.append(torch.optim.Muon(hidden, lr=settings.peak_lr, **options))
    if others:
        parts.append(torch.optim.AdamW(others, fused=True, **_adam(settings)))
    return Together(parts)


def _lion(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Chen et al. 2023, arXiv:2302.06675."""
    options = _tuples(settings.optimizer_options)
    return _package("lion_pytorch").Lion(groups, lr=settings.peak_lr, **options)  # type: ignore[no-any-return]


def _schedule_free(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """Defazio et al. 2024, arXiv:2405.15682."""
    made: torch.optim.Optimizer = _package("schedulefree").AdamWScheduleFree(
        groups, **_adam(settings), **settings.optimizer_options
    )
    made.train()  # type: ignore[attr-defined]
    return made


def _galore(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """AdamW whose moments live in a subspace of each matrix's gradient (Zhao et al. 2024, arXiv:2403.03507)."""
    projected = _projected(groups, settings, {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"})
    return _package("galore_torch").GaLoreAdamW(projected, no_deprecation_warning=True, **_adam(settings))  # type: ignore[no-any-return]


def _apollo(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    """AdamW's scale of each channel, found in a random subspace of the gradient (Zhu et al. 2024, arXiv:2412.05270)."""
    usual = {
        "rank": 256, "update_proj_gap": 200, "scale": 1.0, "proj": "random", "proj_type": "std", "scale_type": "channel"
    }  # fmt: skip
    return _package("apollo_torch").APOLLOAdamW(_projected(groups, settings, usual), **_adam(settings))  # type: ignore[no-any-return]


def _sgd(groups: list[Group], settings: Train) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=settings.peak_lr, **settings.optimizer_options)


def _projected(groups: list[Group], settings: Train, usual: Mapping[str, Any]) -> list[Group]:
    """Hidden matrices are projected; everything else is AdamW's as it is."""
    options = {**usual, **settings.optimizer_options}
    return [group | options if group["weights"] == "hidden" else group for group in groups]


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """YAML has lists where Python's signatures have tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, lambda: _names(ADAM, torch.optim.AdamW)),
    "adamw_8bit": Kind(
        _adamw_8bit,
        lambda: _names(ADAM, _package("bitsandbytes").optim.AdamW8bit),
        package="bitsandbytes",
        whole=_all,
    ),
    "adafactor": Kind(_adafactor, lambda: _names((), torch.optim.Adafactor), whole=_all),
    "muon": Kind(_muon, lambda: _names((), torch.optim.Muon), whole=_hidden),
    "lion": Kind(_lion, lambda: _names((), _package("lion_pytorch").Lion), package="lion-pytorch"),
    "schedule_free_adamw": Kind(
        _schedule_free, lambda: _names(ADAM, _package("schedulefree").AdamWScheduleFree), package="schedulefree"
    ),
    "galore": Kind(
        _galore,
        lambda: ("proj_type", "rank", "scale", "update_proj_gap"),
        package="galore-torch",
        whole=_hidden,
    ),
    "apollo": Kind(
        _apollo,
        lambda: ("proj", "proj_type", "rank", "scale", "scale_type", "update_proj_gap"),
        package="apollo-torch",
        whole=_hidden,
    ),
    "sgd": Kind(_sgd, lambda: _names((), torch.optim.SGD)),
}
BY_NUMBER = tuple(name for name, kind in OPTIMIZERS.items() if kind.whole is _none)
"""Those that treat each number of a weight by itself, so that a part of it is treated as the whole one is."""


def check_optimizer(settings: Train) -> None:
    """Find out before any weight is loaded whether the optimiser is installed and takes its options.

    Raises:
        ConfigError: its package is missing, or an option is unknown or has a value that it refuses.
    """
    kind = OPTIMIZERS[settings.optimizer]
    try:
        known = kind.options()
    except ImportError as error:
        raise ConfigError(
            f"optimizer={settings.optimizer} needs the package {kind.package}, which cannot be imported "
            f"({first_line(error)}); pip install 'graft-llm[tuning]', or set optimizer=adamw"
        ) from None
    for name in settings.optimizer_options:
        if name not in known:
            raise ConfigError(
                f"optimizer_options.{name}: {settings.optimizer} has no such option"
                f"{did_you_mean(name, known) or '; it has ' + ', '.join(known)}"
            )
    if settings.optimizer_options.get("proj_type") == "full":
        raise ConfigError("optimizer_options.proj_type = 'full' keeps two matrices and saves nothing; use std")
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.eye(4)
    try:
        kind.make([{"params": [weight], "weight_decay": 0.0, "weights": "hidden"}], settings).step()
    except Exception as error:  # whatever a package says to a value that it cannot use
        raise ConfigError(
            f"optimizer_options = {settings.optimizer_options}: {settings.optimizer} refuses them ({first_line(error)})"
        ) from None


def _package(name: str) -> Any:
    """An optional package.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module(name)
