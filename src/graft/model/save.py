"""From a model to a folder that transformers, PEFT and vLLM load as is: weights, tokenizer, chat template, stop set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from graft.model.adapter_start import adapter_tensors, as_difference
from graft.model.adapters import plain
from graft.tokens.renderer import Renderer


def save_model(
    model: PreTrainedModel | PeftModel,
    renderer: Renderer,
    folder: Path,
    dtype: torch.dtype | None = None,
    start: Mapping[str, Tensor] | None = None,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Write an adapter folder or a model folder; `dtype` is the format of a full model's weights, None as they are.
    `state` holds the weights of a model that is spread over processes (model/shard.py), None the model's own.

    `start` is what an adapter began as where that was subtracted from the base: the difference is saved, for the base
    as others have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        _save_adapter(model, folder, start, state)
    else:
        _save_full(model, folder, dtype, state)
    renderer.save(folder)
    _stop_set(plain(model), renderer).save_pretrained(folder)


def _save_adapter(
    model: PeftModel, folder: Path, start: Mapping[str, Tensor] | None, state: Mapping[str, Tensor] | None
) -> None:
    config = model.peft_config["default"]
    named = config.base_model_name_or_path
    if named and os.path.isdir(named):  # noqa: PTH112  # it may be an id, which Path would rewrite
        config.base_model_name_or_path = str(Path(named).resolve())
    if start is not None:
        assert isinstance(config, LoraConfig)
        on_base, tensors = as_difference(config, adapter_tensors(model, state), start)
        on_base.inference_mode = True
        on_base.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return
    # PEFT would otherwise ask the hub whether the vocabulary was resized; new rows are saved by themselves.
    model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # an unfilled model card form


def _save_full(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype | None, state: dict[str, Tensor] | None
) -> None:
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # graft's own names mean nothing to other programs
    if dtype is not None:
        kept = model.state_dict() if state is None else state
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in kept.items()}
    before = model.config.dtype
    if dtype is not None:
        model.config.dtype = dtype
    try:
        model.save_pretrained(str(folder), state_dict=state)
    finally:
        model.config.dtype = before
        model.set_attn_implementation(attention)


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
