"""From a folder to a model on a device. A local folder never opens a socket."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    TrainableTokensConfig,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from graft.errors import InputError, first_line, said
from graft.model.device import pick_device, pick_precision, refuse_elsewhere
from graft.model.files.quantize import make_trainable, quantization_config, quiet, refuse_stored
from graft.model.processes.shard import is_sharded, put
from graft.model.tuned.vocabulary import grow
from graft.tokens.trust import explained, refuse_escapes


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to be used."""

    model: PreTrainedModel | PeftModel
    device: torch.device
    dtype: torch.dtype
    folder: Path
    base: str | None
    """Path or id of the base model where `folder` holds an adapter."""


def load_model(
    folder: Path | str,
    device: str = "auto",
    precision: str = "auto",
    trust_remote_code: bool = False,
    base: str | None = None,
    quantize: str = "none",
) -> LoadedModel:
    """Load a model folder, or an adapter folder onto its base, for inference.

    `base` is the model that an adapter sits on; it is needed for an adapter folder and not looked at for others.
    `quantize` is the format in which the base's weights were frozen when the adapter was trained.

    Raises:
        InputError: the folder is missing, incomplete, or not of a causal language model.
    """
    folder = Path(folder)
    where = pick_device(device)
    dtype = pick_precision(precision, where).compute
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and base is None:
        raise InputError(f"{folder}: an adapter; give the model that it sits on with --base PATH")
    plain = load_base(base if adapter and base else str(folder), dtype, trust_remote_code, where, quantize)
    model: PreTrainedModel | PeftModel = load_adapter(plain, folder, trainable=False) if adapter else plain
    to_device(model, where)
    model.eval()
    return LoadedModel(model, where, dtype, folder, base if adapter else None)


def load_base(
    path: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
    quantize: str = "none",
) -> PreTrainedModel:
    """A causal language model in `dtype`: on the CPU, or straight on a CUDA device, tensor by tensor.

    The files are mapped, not read: weights that are stored in `dtype` stay the files' pages, others are converted one
    by one, so that the process never holds the model twice. `quantize` is `none` or a kind of model/files/quantize.py.

    Raises:
        InputError: there is no such model, or it is not a causal language model.
    """
    local = Path(path).exists()
    refuse_no_model(path)
    if local:
        refuse_escapes(Path(path))
    asked: dict[str, Any] = {}  # keys that are not needed are left out: a None would wipe out what config.json says
    if device is not None and device.type == "cuda":
        asked["device_map"] = {"": device}
    if quantize != "none":
        quiet(quantize)
        asked["quantization_config"] = quantization_config(quantize, dtype)
    try:
        # What transformers reports about missing keys is checked below; its own table and bars would only repeat it.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=local,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            weights_only=True,  # of `.bin` files, which are pickles: tensors are read, nothing is run
            **asked,
        )
    except Exception as error:  # a broken or foreign config fails anywhere in a modelling file
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"model {path}: its weights have other shapes than its config.json says") from None
        why = explained(error, path) or f"cannot be loaded: {said(error)}"
        raise InputError(f"model {path}: {why}") from None
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"model {path}: {len(missing)} weights are missing from its files, for example {missing[0]}")
    assert isinstance(model, PreTrainedModel)
    make_trainable(model)
    return model


def refuse_no_model(path: str) -> None:
    """A folder that is there must be a model's; any other name may be a hub's id.

    Raises:
        InputError: it has no config.json.
    """
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise InputError(f"{path}: no config.json there; name a model folder as transformers saves it")


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move what is not there yet; quantised weights are where they were loaded.

    Raises:
        ConfigError: some of it stays elsewhere.
    """
    if any(parameter.device != device for parameter in model.parameters()):
        nn.Module.to(model, device)
    refuse_elsewhere(model, device)


def load_merged(base: str, adapter: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model with an adapter worked into its weights, for an export; always onto the unquantised base.

    Merging into quantised weights would round the sum to 4 or 8 bits and lose most of a small update; the adapter of a
    quantised base is merged onto the weights that were quantised.

    Raises:
        InputError: the base is stored quantised, or the adapter does not fit.
    """
    refuse_stored(base, "full", "none", trust_remote_code)
    merged: Any = load_adapter(load_base(base, dtype, trust_remote_code), adapter, trainable=False).merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    return merged


def vocabulary_size(path: str, trust_remote_code: bool = False) -> int | None:
    """Rows of the embedding by the config alone, before any weight is read; None where it does not say.

    Raises:
        InputError: the config is missing or of no known architecture.
    """
    size = _config(path, trust_remote_code).get("vocab_size")
    return size if isinstance(size, int) else None


def layer_count(path: str, trust_remote_code: bool = False) -> int | None:
    """Decoder layers by the config alone; None where it does not say.

    Raises:
        InputError: the config is missing or of no known architecture.
    """
    config = _config(path, trust_remote_code)
    counts = (config.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers"))
    return next((count for count in counts if isinstance(count, int)), None)


def _config(path: str, trust_remote_code: bool) -> dict[str, Any]:
    """The text model's config."""
    found: dict[str, Any] = text_config(path, trust_remote_code).to_dict()
    return found


def text_config(path: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The text model's config, before any weight is read.

    Raises:
        InputError: it is missing or of no known architecture.
    """
    local = Path(path).exists()
    refuse_no_model(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=local, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = explained(error, path) or f"its config cannot be read: {first_line(error)}"
        raise InputError(f"model {path}: {why}") from None
    found: PreTrainedConfig = config.get_text_config()
    return found


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool) -> PeftModel:
    """Put a saved adapter on a model; every one of its weights must find its place.

    Raises:
        InputError: the adapter does not fit this model.
    """
    refuse_escapes(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = not trainable
        grow(model, 1 + max(_trained_tokens(config), default=-1))
        tuned = PeftModelForCausalLM(model, config)
        report = tuned.load_adapter(str(folder), "default", is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip() and not line.rstrip().endswith(":")]
        reason = said[0] if said else "its weights or settings cannot be read"
        raise InputError(f"adapter {folder}: does not fit the model {model.name_or_path}: {reason}") from None
    if report.unexpected_keys:
        raise InputError(
            f"adapter {folder}: {len(report.unexpected_keys)} of its weights have no place in the model "
            f"{model.name_or_path}, for example {report.unexpected_keys[0]}; is this its base?"
        )
    return tuned


def _trained_tokens(config: PeftConfig) -> Iterator[int]:
    """Ids whose own rows an adapter brings; they may lie beyond the base's vocabulary."""
    named = config.trainable_token_indices if isinstance(config, LoraConfig) else None
    if isinstance(config, TrainableTokensConfig):
        named = config.token_indices
    for ids in named.values() if isinstance(named, dict) else [named or []]:
        yield from ids


def load_weights(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Replace the trained weights of a live model by those that graft saved from it."""
    if is_sharded(model):
        kept = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
        for file in sorted(folder.glob("*model*.safetensors")):
            put(kept, load_file(file))
        return
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    for file in sorted(folder.glob("model*.safetensors")):
        model.load_state_dict(load_file(file), strict=False)  # a tied head is saved once, under the embedding's name
