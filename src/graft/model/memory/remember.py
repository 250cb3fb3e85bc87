"""How much of the forward pass is remembered for the backward pass: activation checkpointing and its kin.

Speaks of a prepared model and its decoder layers; knows no trees (their rows pass through as arguments) and no data.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graft.errors import ConfigError
from graft.model.memory.offload import HostStore
from graft.model.memory.recipes import keeping_recipes, write_recipes
from graft.model.tuned.adapters import plain

Mode = Literal["none", "selective", "full"]
MODES: tuple[Mode, ...] = get_args(Mode)
"""In the order in which `auto` tries them: each keeps less than the one before."""


def remember(
    model: PreTrainedModel | PeftModel, mode: Mode, every: int = 1, offload: bool = False, written: bool = False
) -> None:
    """Set what a model keeps between forward and backward; once per model, after everything else was done to it.

    `selective` keeps recipes of what is cheap to make again (model/memory/recipes.py), `full` keeps the inputs of every
    `every`-th decoder layer and runs that layer again. `offload` moves what is kept to the host's memory. What one
    mode sets stays when another is set over it. `written` says that the recipes are noted already (`note_recipes`).

    Raises:
        ConfigError: the model has no decoder layers that can be run again.
    """
    base = plain(model)
    if mode == "full":
        layers = decoder_layers(base)
        if not layers:
            raise ConfigError(
                f"checkpointing: full: {type(base).__name__} has no layers that transformers can run again; "
                "use checkpointing=selective or none"
            )
        layer: Any
        for number, layer in enumerate(layers):
            if number % every == 0:
                # The two attributes by which transformers' own switch works. Its switch would also make the
                # embeddings require a gradient, which only the older, reentrant kind of checkpointing needs.
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    if mode == "selective" and not written:
        write_recipes(base)
    if mode == "selective" or offload:
        store = HostStore(next(base.parameters()).device) if offload else None
        decoder: nn.Module = base.base_model
        decoder.forward = MethodType(_with_recipes(decoder.forward, store), decoder)


def note_recipes(model: PreTrainedModel | PeftModel) -> None:
    """Let a model's modules note their recipes before its weights are spread: each is tried on a few numbers for it.

    Nothing is kept otherwise until `remember` says so.
    """
    write_recipes(plain(model))


def _with_recipes(forward: Callable[..., Any], store: HostStore | None) -> Callable[..., Any]:
    def kept(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        with keeping_recipes() if store is None else keeping_recipes(store.keep, store.give_back):
            return forward(*args, **kwargs)

    return kept


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The model's decoder layers, in order; empty where transformers does not mark them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def kept_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that a forward pass leaves behind, what it returns and keeps for its backward pass.

    Weights are not counted, and storage that several tensors share is counted once. Works for every mode and on any
    device, `meta` too, where nothing is computed.
    """
    with _Births() as births:
        made = forward()
    kept: int = sum(size for storage, size in births.storages.values() if not storage.expired())
    del made
    return kept


class _Births(TorchDispatchMode):
    """Notes every piece of memory that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        old = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return made
