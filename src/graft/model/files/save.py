"""From a model to a folder that transformers, PEFT and vLLM load as is: weights, tokenizer, chat template, stop set.

Nothing here changes the model, so a folder may be written while another thread trains on.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from graft.model.files.tensor_file import find_difference, write_mapping
from graft.model.processes.shard import gathered, is_sharded, unspread_class
from graft.model.tuned.adapters import plain
from graft.model.tuned.start import as_difference
from graft.tokens.renderer import Renderer

ADAPTER_FILE = "adapter_model.safetensors"


def saved_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """What a folder is written from: an adapter's tensors by PEFT's names, or all of a model's; the live ones.

    Of a model that is spread over processes they are gathered; all processes must ask, in the same order.
    """
    if is_sharded(model):
        return gathered(model, live_weights(model))
    return live_weights(model)


def live_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor]:
    """The same as they are, of a spread model this process's parts."""
    if isinstance(model, PeftModel):
        # PEFT would otherwise ask the hub whether the vocabulary was resized; new rows are saved by themselves.
        found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
        return found
    return model.state_dict()


def forgotten(model: PreTrainedModel | PeftModel, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of trained parameters that no saved tensor is; LoRA and full models only, others save other tensors."""
    if is_sharded(model) or (isinstance(model, PeftModel) and type(model.peft_config["default"]) is not LoraConfig):
        return []
    saved = {value.data_ptr() for value in saved_weights(model).values()}
    return [name for name, parameter in trained.items() if parameter.numel() and parameter.data_ptr() not in saved]


def save_model(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    folder: Path,
    dtype: torch.dtype | None = None,
    start: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder or a model folder; `dtype` is the format of a full model's weights, None as they are.

    `start` is what an adapter began as where that was subtracted from the base: the difference is saved, for the base
    as others have it. `weights` are those to save, of `saved_weights`; None takes the model's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = saved_weights(model) if weights is None else weights
    if isinstance(model, PeftModel):
        config, tensors = _adapter(model, weights, start)
        mapping = None
        if config.task_type is None:  # how PEFT finds the base's class then
            kind = type(plain(model))
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(str(folder), auto_mapping_dict=mapping)
        write_mapping(folder / ADAPTER_FILE, tensors)
    else:
        _save_full(model, folder, dtype, weights)
    renderer.save(folder)
    _stop_set(plain(model), renderer).save_pretrained(folder)


def find_fault(
    folder: Path,
    model: PreTrainedModel | PeftModel,
    dtype: torch.dtype | None = None,
    start: Mapping[str, Tensor] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Open a folder that `save_model` wrote from the same, and say what is not in it bit by bit; None where all is."""
    weights = saved_weights(model) if weights is None else weights
    if isinstance(model, PeftModel):
        _, expected = _adapter(model, weights, start)
        files = [folder / ADAPTER_FILE]
    else:
        ignored = set(model._keys_to_ignore_on_save or ())
        kept = {name: value for name, value in _as_stored(weights, dtype).items() if name not in ignored}
        # As transformers does it: tied weights stand there once, experts under the names that they were loaded by.
        expected = revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))
        files = sorted(folder.glob("model*.safetensors"))
    return "no tensor is saved" if not expected else find_difference(files, expected)


def _adapter(
    model: PeftModel, weights: Mapping[str, Tensor], start: Mapping[str, Tensor] | None
) -> tuple[PeftConfig, dict[str, Tensor]]:
    """An adapter's configuration and tensors as they are saved."""
    config: PeftConfig = copy.copy(model.peft_config["default"])
    named = config.base_model_name_or_path or plain(model).name_or_path
    if named and os.path.isdir(named):  # noqa: PTH112  # it may be an id, which Path would rewrite
        named = str(Path(named).resolve())
    config.base_model_name_or_path = named
    tensors = dict(weights)
    if start is not None:
        assert isinstance(config, LoraConfig)
        now = {name: value.detach().cpu() for name, value in weights.items()}
        config, tensors = as_difference(config, now, start)
    config.inference_mode = True
    return config, tensors


def _save_full(model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, weights: Mapping[str, Tensor]) -> None:
    shown = object.__new__(unspread_class(model))  # the same modules and tensors,
    shown.__dict__.update(model.__dict__)  # with a configuration of its own to be written
    shown.config = copy.deepcopy(model.config)
    shown.config._attn_implementation = "eager"  # graft's own names mean nothing to other programs
    shown.save_pretrained(str(folder), state_dict=_as_stored(weights, dtype))
    if dtype is not None:
        shown.config.dtype = dtype  # which transformers has set to that of the live weights
        shown.config.save_pretrained(str(folder))


def _as_stored(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is None:
        return dict(weights)
    stored: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay one tensor
    found = {}
    for name, value in weights.items():
        key = (value.data_ptr(), value.shape)
        if value.is_floating_point() and key not in stored:
            stored[key] = value.to(dtype)
        found[name] = stored.get(key, value)
    return found


def _stop_set(model: PreTrainedModel, renderer: Renderer) -> GenerationConfig:
    """The model's generation settings, with every id that ends a turn."""
    settings = model.generation_config
    saved = GenerationConfig(**{key: value for key, value in settings.to_diff_dict().items() if value is not None})
    stops = sorted(renderer.stop_ids)
    saved.eos_token_id = stops[0] if len(stops) == 1 else stops
    if saved.pad_token_id is None:
        saved.pad_token_id = stops[0]
    if saved.do_sample is not True:  # a saved temperature without sampling is refused by transformers
        saved.temperature = saved.top_p = saved.top_k = None
    return saved
