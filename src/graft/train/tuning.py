"""How a run is tuned, from its settings: what is checked before anything is read, and what makes its steps."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import nn

from graft.config.train import Train
from graft.errors import ConfigError, first_line
from graft.model.device import Precision
from graft.model.processes.ranks import ALONE, Ranks
from graft.model.trees import TreeLM
from graft.model.tuned.kinds import kind_of, peft_config
from graft.train.loss import Objective
from graft.train.step import Stepper
from graft.train.updates.in_backward import BackwardStepper
from graft.train.updates.optimizers import Together, check_optimizer


def check_tuning(settings: Train) -> None:
    """Find what is wrong with the method and the optimiser before data or weights are read.

    Raises:
        ConfigError: an option is unknown or refused, a package is missing, or the settings cannot do what they ask.
    """
    if not settings.trains_own_weights:
        config = peft_config(settings)
        if settings.new_tokens and not isinstance(config, LoraConfig):
            raise ConfigError(
                f"new_tokens: a {kind_of(config)} adapter has no place for new tokens; use method=lora or method=full"
            )
    for setting, patterns in (("lr_patterns", settings.lr_patterns), ("freeze.patterns", settings.freeze.patterns)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{setting}: {pattern!r} is no regular expression ({first_line(error)})") from None
    check_optimizer(settings)


def embeddings_of(lm: TreeLM, settings: Train) -> set[int]:
    """`id`s of the embedding's parameters, and for the optimisers that treat hidden matrices alone, of the head's."""
    modules = [lm.embedding]
    if settings.optimizer in ("muon", "galore", "apollo") and lm.base.get_output_embeddings() is not None:
        modules.append(lm.head)
    return {id(parameter) for module in modules for parameter in module.parameters()}


def make_stepper(
    lm: TreeLM,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    settings: Train,
    ranks: Ranks = ALONE,
) -> Stepper:
    """What turns rows into updates, by the settings."""
    objective = Objective(settings.label_smoothing, settings.loss == "dft")
    if isinstance(optimizer, Together) and settings.optimizer_in_backward:
        return BackwardStepper(
            lm, parameters, optimizer, precision, settings.seed, objective, settings.neftune_alpha, ranks
        )
    return Stepper(
        lm, parameters, optimizer, precision, settings.clip, settings.seed, objective, settings.neftune_alpha, ranks
    )
