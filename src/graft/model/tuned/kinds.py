"""From settings to a PEFT configuration, checked before any weight is loaded. Knows PEFT's options, no model.

The kinds and their options are PEFT's own: a configuration class and its fields. What is refused is refused for a
reason that stands here, found by training each kind on a tree and one by one and comparing the gradients.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftType
from peft.config import PromptLearningConfig

from graft.config.base import did_you_mean
from graft.config.train import Lora, Train
from graft.errors import ConfigError, first_line

REFUSED = {
    "ADALORA": "it moves ranks between layers during the run and adds a term to the loss; use LORA, or EVA's ranks",
    "ADAMSS": "it needs scikit-learn to cluster the weights, and has not been tried on trees",
    "ADAPTION_PROMPT": "it writes prompts into each layer's attention, past the row of a tree",
    "LILY": "its router looks at all tokens of a row together, so that a row's other examples would change an example",
    "POLY": "it wants a task id with every example",
    "RANDLORA": "the gradient that PEFT computes for it is not that of its forward pass (finite differences disagree)",
    "SHADOW": "it passes a pair of streams through the layers, which their attention on trees cannot take",
    "XLORA": "it mixes adapters that were trained before, and asks the whole model twice per step",
}
PROMPT_LEARNING = (
    "it trains prompt vectors in front of every sequence, which no token of a tree stands for; use a kind that tunes "
    "weights, such as LORA or IA3"
)
MUTATING = ("pissa", "olora", "corda")
"""Ways of beginning that subtract the update's first value from the base's weights."""


def peft_config(settings: Train) -> PeftConfig:
    """The PEFT configuration of `method: lora` or `method: peft`.

    Raises:
        ConfigError: the kind or an option is unknown, refused, or has a value that PEFT refuses.
    """
    if settings.method == "lora":
        return lora_config(settings.lora)
    options = {key: value for key, value in settings.peft.items() if key != "type"}
    kind = _kind(str(settings.peft["type"]))
    return _make(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], options, f"peft (type {kind})")


def lora_config(lora: Lora) -> PeftConfig:
    """PEFT's LoRA configuration for our settings, which have its names but for alpha and dropout.

    Raises:
        ConfigError: PEFT refuses the combination.
    """
    values = lora.model_dump(exclude={"alpha", "dropout", "loraplus_ratio", "init_examples"})
    options: dict[str, Any] = {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    for key, value in values.items():
        # PEFT asks whether these are None, and an empty tuple is not.
        absent = key in ("modules_to_save", "exclude_modules", "target_parameters") and not value
        options[key] = None if absent else list(value) if isinstance(value, tuple) else value
    return _make(LoraConfig, options, "lora")


def kind_of(config: PeftConfig) -> str:
    """PEFT's name of the kind: `LORA`, `VERA`, ..."""
    return PeftType(config.peft_type).value


def mutates_base(config: PeftConfig) -> bool:
    """Whether beginning to train changes the base's weights, so that what is saved must be converted."""
    start = str(config.init_lora_weights).lower() if isinstance(config, LoraConfig) else ""
    return start.startswith(MUTATING)


def _kind(named: str) -> str:
    kind = named.upper()
    known = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
    if kind not in known:
        raise ConfigError(
            f"peft.type = {named!r}: PEFT has no such kind{did_you_mean(kind, known) or '; it has ' + ', '.join(known)}"
        )
    reason = REFUSED.get(kind)
    if reason is None and issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)], PromptLearningConfig):
        reason = PROMPT_LEARNING
    if reason is not None:
        raise ConfigError(f"peft.type = {kind} cannot be trained by graft: {reason}")
    return kind


def _make(config_class: type[PeftConfig], options: Mapping[str, Any], place: str) -> PeftConfig:
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in options:
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(sorted(known))}"
            raise ConfigError(f"{place}: no option `{name}`{hint}")
    for name, value in options.items():
        _refuse_wrong_type(config_class, name, value, place)
    given = {name: _nested(config_class, name, value, place) for name, value in options.items()}
    if "target_modules" in known and config_class.__name__ not in OWN_TARGETS:
        given.setdefault("target_modules", "all-linear")
    if "task_type" in known:
        given["task_type"] = "CAUSAL_LM"
    try:
        return config_class(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"{place}: PEFT refuses it: {first_line(error)}") from None


OWN_TARGETS = ("LNTuningConfig", "TrainableTokensConfig", "IA3Config")
"""Kinds that know by themselves which modules they tune."""


def _refuse_wrong_type(config_class: type[PeftConfig], name: str, value: Any, place: str) -> None:
    """PEFT itself takes any value for a number, and fails on it in the middle of a layer.

    Raises:
        ConfigError: the option is a number or a yes or no, and the value is none.
    """
    wanted = typing.get_type_hints(config_class)[name]
    kinds = _choices(wanted)
    if not kinds <= {int, float, bool, types.NoneType}:
        return
    # PEFT calls most scales whole numbers, and computes with any.
    given = {int, float} if type(value) in (int, float) else {type(value)}
    if not given & kinds:
        words = {float: "a number", bool: "true or false", types.NoneType: "null"}
        wants_number = {float} if kinds & {int, float} else set()
        said = " or ".join(text for kind, text in words.items() if kind in kinds | wants_number)
        raise ConfigError(f"{place}: {name} = {value!r}: {said} is expected")


def _choices(wanted: Any) -> set[Any]:
    """The types of a union, or the one type."""
    return set(typing.get_args(wanted)) if typing.get_origin(wanted) in (typing.Union, types.UnionType) else {wanted}


def _nested(config_class: type[PeftConfig], name: str, value: Any, place: str) -> Any:
    """A mapping becomes the dataclass that PEFT wants there (`eva_config: {rho: 1}`), where it wants one."""
    if not isinstance(value, Mapping):
        return value
    wanted = typing.get_type_hints(config_class)[name]
    for choice in _choices(wanted):
        if dataclasses.is_dataclass(choice) and isinstance(choice, type):
            known = [field.name for field in dataclasses.fields(choice)]
            for key in value:
                if key not in known:
                    raise ConfigError(f"{place}: {name} has no option `{key}`{did_you_mean(key, known)}")
            try:
                return choice(**value)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{place}: {name}: {first_line(error)}") from None
    return dict(value)
