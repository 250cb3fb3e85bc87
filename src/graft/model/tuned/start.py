"""How an adapter begins: from data, or from the base's own weights. Knows PEFT's LoRA; token ids, no text.

PiSSA, OLoRA and CorDA begin with a part of the base's weights, which they subtract from it: W = R + s B0 A0 is trained
as R + s B A. Such an adapter means nothing on the base as others have it, so it is saved as the difference, which is
a LoRA of twice the rank on W itself:

    R + s B A  =  W + s (B A - B0 A0)  =  W + s [B | -B0] [A ; A0]

(PEFT's `subtract_mutated_init` computes the same from an adapter folder on disk.)

Shapes: r rank, i and o features of a layer; A [r, i], B [o, r].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import Tensor
from transformers import PreTrainedModel

from graft.errors import ConfigError


def learn_start(model: PeftModel, samples: Sequence[Tensor]) -> None:
    """EVA: begin with the principal directions of each layer's inputs (Paischer et al. 2024, arXiv:2410.07170).

    Raises:
        ConfigError: the samples have fewer tokens than the rank asks for.
    """
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    needed = math.ceil(config.r * (config.eva_config.rho if config.eva_config else 1.0))
    usable = [ids for ids in samples if len(ids) > needed]
    if not usable:
        longest = max((len(ids) for ids in samples), default=0)
        raise ConfigError(
            f"init_lora_weights=eva finds {needed} directions in each example's tokens, but the longest of the first "
            f"{len(samples)} has {longest}; lower lora.r, or raise lora.init_examples"
        )
    batches = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])} for ids in usable]
    initialize_lora_eva_weights(model, batches, show_progress_bar=False)


def covariances(model: PreTrainedModel, config: LoraConfig, samples: Sequence[Tensor]) -> None:
    """CorDA: let each layer see the data, and split its weight by what it saw (Yang et al. 2024, arXiv:2406.05223)."""
    from peft.tuners.lora.corda import preprocess_corda  # needs the package attrs, which PEFT does not ask for

    config.corda_config = config.corda_config or CordaConfig(corda_method="kpm")
    _maybe_include_all_linear_layers(config, model)  # CorDA looks the names up before PEFT knows what `all-linear` is

    def look() -> None:
        with torch.no_grad():
            for ids in samples:
                model(input_ids=ids[None], use_cache=False)

    preprocess_corda(model, config, run_model=look)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors as PEFT saves them, copied."""
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def as_difference(
    config: LoraConfig, now: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and tensors of the LoRA of twice the rank that says what training added to the base."""
    tensors = dict(now)
    for name, value in now.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([value, start[name]], dim=0)
        elif ".lora_B." in name and name.endswith("weight"):
            tensors[name] = torch.cat([value, -start[name]], dim=1)
    doubled = copy.deepcopy(config)
    doubled.init_lora_weights = True
    doubled.corda_config = None
    doubled.r = 2 * config.r
    doubled.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    # The scale is alpha / r, or alpha / sqrt(r), and must stay as it was.
    grown = math.sqrt(2) if config.use_rslora else 2
    doubled.lora_alpha = config.lora_alpha * grown  # type: ignore[assignment]
    doubled.alpha_pattern = {name: alpha * grown for name, alpha in (config.alpha_pattern or {}).items()}
    return doubled, tensors
