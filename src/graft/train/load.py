"""The model that a run trains: from its base, a checkpoint or other weights; and whether the data fits its context."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from graft.config.train import Train
from graft.console import note, warn
from graft.errors import InputError
from graft.model.adapters import add_lora
from graft.model.attention_pick import Attention, pick_attention, row_step
from graft.model.compile import compile_layers, wants_compile
from graft.model.device import Precision
from graft.model.liger import use_liger, wants_liger
from graft.model.load import load_adapter, load_base
from graft.model.trees import TreeLM
from graft.runs import RunFolder
from graft.train.prepare import Prepared


def load_for_training(
    settings: Train, precision: Precision, device: torch.device, checkpoint: Path | None
) -> tuple[TreeLM, torch.dtype]:
    """The model on its device, with what is trained from a checkpoint, `init_from`, or afresh.

    Also returns the number format of the final folder of a full fine-tuning: that of the model it began with.
    """
    computing = pick_computing(settings, device)
    start = checkpoint or (weights_folder(settings.init_from) if settings.init_from else None)
    model: PreTrainedModel | PeftModel
    if settings.method == "lora":
        base = load_base(settings.model, precision.frozen, settings.trust_remote_code)
        final_dtype = base.dtype
        if settings.gradient_checkpointing:
            base.enable_input_require_grads()  # the first layer's inputs need a gradient, or nothing is recomputed
        model = load_adapter(base, start, trainable=True) if start else add_lora(base, settings.lora, settings.seed)
        if start and start is not checkpoint:
            _say_other_shape(model, settings)
    else:
        model = load_base(str(start or settings.model), precision.trained, settings.trust_remote_code)
        model.requires_grad_(True)
        final_dtype = stored_dtype(settings.model)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    nn.Module.to(model, device)
    return tree_model(model, settings, computing), final_dtype


@dataclass(frozen=True, slots=True)
class Computing:
    """By what a run's numbers are computed; they are the same whatever it is."""

    attention: Attention
    compiled: bool
    liger: bool


def pick_computing(settings: Train, device: torch.device) -> Computing:
    """What this device and installation offer of what the settings ask for.

    Raises:
        ConfigError: something is asked for that they do not have.
    """
    compiled = wants_compile(settings.compile, device)
    liger = wants_liger(settings.kernels, device, compiled)
    return Computing(pick_attention(settings.attention, device), compiled, liger)


def tree_model(model: PreTrainedModel | PeftModel, settings: Train, computing: Computing) -> TreeLM:
    """The model, on its device already, ready to be trained on trees; says in one line what computes it."""
    step = row_step(settings.row_budget) if computing.attention.padded or computing.compiled else 1
    lm = TreeLM(model, computing.attention.backend, settings.trees, step, fuse=not computing.compiled)
    kernels = use_liger(model) if computing.liger else {}
    layers = compile_layers(lm.base) if computing.compiled and lm.on_trees else 0
    said = [f"attention: {computing.attention.why}"] if lm.on_trees else []
    said += [f"{count} {name} by liger-kernel" for name, count in kernels.items() if count]
    if layers:
        said.append(f"{layers} layers compiled, rows padded to multiples of {lm.row_step} tokens")
    if said:
        note("; ".join(said))
    if lm.on_trees and lm.backend_failed is not None:
        warn(f"attention by segments, since {computing.attention.backend} failed on a probe: {lm.backend_failed}")
    if computing.compiled and not layers:
        reason = "its layers are not of the form that can be" if lm.on_trees else "it runs one example per row"
        warn(f"compile=true: nothing was compiled, since {reason}")
    return lm


def _say_other_shape(model: PeftModel, settings: Train) -> None:
    """An adapter brings its own shape, which the recipe's cannot change."""
    brought: Any = model.peft_config["default"]
    its = {"r": brought.r, "alpha": brought.lora_alpha, "dropout": brought.lora_dropout}
    asked = {name: getattr(settings.lora, name) for name in its}
    if its != asked:
        shown = [", ".join(f"{name} {value:g}" for name, value in shape.items()) for shape in (its, asked)]
        warn(f"init_from {settings.init_from}: its adapter has {shown[0]}, which stays; the settings say {shown[1]}")


def weights_folder(named: str) -> Path:
    """The folder of weights that `init_from` names; a run stands for its `final/`."""
    run = RunFolder(Path(named))
    return run.final if run.exists() and run.final.is_dir() else run.root


def longest_example(prepared: Prepared) -> int:
    """Tokens of the longest example of training or validation."""
    lengths = [int(np.diff(store.start).max()) for store in (prepared.train, prepared.val) if len(store)]
    return max(lengths)


def check_context(lm: TreeLM, model: str, longest: int) -> None:
    """Say when examples are longer than the context that the model was made for.

    Raises:
        InputError: its positions are a table, so that there is none for the tokens beyond.
    """
    limit = lm.base.config.to_dict().get("max_position_embeddings") or lm.base.config.to_dict().get("n_positions")
    if not isinstance(limit, int) or longest <= limit:
        return
    tables = [m for m in lm.base.modules() if isinstance(m, nn.Embedding) and m is not lm.embedding]
    if any(limit <= table.num_embeddings <= limit + 2 for table in tables):  # OPT's table has two rows more
        raise InputError(
            f"{model}: has positions for {limit} tokens, the longest example has {longest}; "
            f"set encode.max_length={limit} or less"
        )
    warn(f"{model} was made for {limit} tokens; the longest example has {longest}. It may not do well beyond {limit}")


def stored_dtype(model: str) -> torch.dtype:
    """The format that a model's config says its weights are stored in; fp32 where it does not say."""
    path = Path(model) / "config.json"
    if not path.is_file():
        return torch.float32
    config = json.loads(path.read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(named), torch.float32)
