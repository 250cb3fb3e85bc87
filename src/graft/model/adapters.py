"""What is trained: an adapter by PEFT, or every weight. Knows models, not data."""

from __future__ import annotations

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from graft.config.train import Lora
from graft.errors import ConfigError


def add_lora(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """Add LoRA to the wanted modules; only the adapter is trainable, and in fp32.

    Raises:
        ConfigError: no module has one of the wanted names; says which linear layers there are.
    """
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT annotates int, computes with any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
    )
    torch.manual_seed(seed)
    try:
        tuned = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        names = ", ".join(linear_names(model))
        reason = str(error).splitlines()[0]
        raise ConfigError(f"lora.target_modules = {targets!r}: {reason} This model's linear layers: {names}") from None
    assert isinstance(tuned, PeftModel)
    return tuned


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
