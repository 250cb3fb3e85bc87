"""What is trained: an adapter by PEFT, some of the model's own weights, or all of them. Knows models, not data."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from graft.config.train import Freeze, Lora
from graft.errors import ConfigError, first_line
from graft.model.tuned.kinds import kind_of, lora_config
from graft.model.tuned.start import covariances, learn_start
from graft.model.tuned.unreached import not_plainly_linear


class Unfit(ConfigError):
    """PEFT cannot put an adapter on a model, or not without the numbers of its weights."""


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Add LoRA to the wanted modules; see `add_adapter`."""
    return add_adapter(model, lora_config(lora), seed)


def add_adapter(model: PreTrainedModel, config: PeftConfig, seed: int, samples: Sequence[Tensor] = ()) -> PeftModel:
    """Add an adapter of any of PEFT's kinds; only it is trainable, and in fp32.

    `samples` are token ids [L] from the data, for the ways of beginning that learn from data.

    Raises:
        ConfigError: no module has one of the wanted names, or the kind does not fit this model; says which linear
            layers there are.
    """
    if isinstance(config, LoraConfig) and config.target_modules == "all-linear" and not config.exclude_modules:
        config.exclude_modules = not_plainly_linear(model) or None
    _refuse_packed_copies(model, config)
    torch.manual_seed(seed)
    try:
        if isinstance(config, LoraConfig) and config.init_lora_weights == "corda":
            covariances(model, config, samples)
        tuned = get_peft_model(model, config)
        if isinstance(config, LoraConfig) and config.init_lora_weights == "eva":
            learn_start(tuned, samples)
    except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError, ImportError, re.error) as error:
        if "target" not in str(error).lower():  # a value of another option, which PEFT looks at only now
            raise Unfit(f"{kind_of(config)}: PEFT cannot put it on this model: {first_line(error)}") from None
        names = ", ".join(linear_names(model))
        targets = getattr(config, "target_modules", None)
        shown = sorted(targets) if isinstance(targets, set) else targets
        raise ConfigError(
            f"{kind_of(config)}: target_modules = {shown!r}: {first_line(error)} This model's linear layers: {names}"
        ) from None
    if not isinstance(tuned, PeftModel):  # PEFT's mixed models, which no setting asks for
        raise ConfigError(f"{kind_of(config)}: PEFT makes a {type(tuned).__name__} of it, which cannot be saved alone")
    return tuned


def _refuse_packed_copies(model: PreTrainedModel, config: PeftConfig) -> None:
    """What is saved whole is trained, and a quantised weight cannot be."""
    wanted = getattr(config, "modules_to_save", None) or ()
    for name, module in model.named_modules():
        if any(name == end or name.endswith(f".{end}") for end in wanted):
            for inner, parameter in module.named_parameters():
                if is_traceable_wrapper_subclass(parameter) or not parameter.is_floating_point():
                    raise ConfigError(
                        f"modules_to_save: {name} ({inner}) is quantised, and what is saved whole is trained; leave it "
                        "out of modules_to_save, or out of what is quantised (quantize=none)"
                    )


def freeze_but(model: PreTrainedModel, freeze: Freeze) -> None:
    """Leave only the last decoder layers, and what the patterns name, trainable.

    Raises:
        ConfigError: there are fewer layers, or a pattern is in no parameter's name.
    """
    model.requires_grad_(False)
    prefix, layers = decoder_layers(model)
    if freeze.layers > len(layers):
        raise ConfigError(f"freeze.layers = {freeze.layers}, but the model has {len(layers)} decoder layers")
    for layer in layers[len(layers) - freeze.layers :]:
        layer.requires_grad_(True)
    for pattern in freeze.patterns:
        try:
            found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise ConfigError(f"freeze.patterns: {pattern!r} is no regular expression ({first_line(error)})") from None
        if not found:
            names = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
            raise ConfigError(
                f"freeze.patterns: {pattern!r} is in no parameter's name; there are {prefix}0..{len(layers) - 1}.* "
                f"and {', '.join(names)}"
            )
        for parameter in found:
            parameter.requires_grad_(True)


def decoder_layers(model: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """The prefix of their names, and the decoder layers in order.

    Raises:
        ConfigError: the model has no list of layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", list(module)
    raise ConfigError(f"{type(model).__name__}: has no list of {count} decoder layers; use freeze.patterns")


def plain(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without the adapter's wrapper (the adapter's layers stay in it)."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of linear layers, each once, in order."""
    names = (name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return list(dict.fromkeys(names))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_weights(model: nn.Module) -> int:
    """Numbers that a model's weights stand for: of packed ones not the bytes that hold them, and tied ones once."""
    total, seen = 0, set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen |= {id(p) for p in own}
        packed = [p for p in own if not p.is_floating_point()]
        wide, high = vars(module).get("in_features"), vars(module).get("out_features")
        if packed and isinstance(wide, int) and isinstance(high, int):
            bias = module._parameters.get("bias")
            total += wide * high + (0 if bias is None else bias.numel())
        else:
            total += sum(p.numel() for p in own)
    return total
