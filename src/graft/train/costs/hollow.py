"""A run's model without its weights: every shape and number format is there, no number is, and nothing is read.

It is the model that `graft.train.load` would give, made from the config alone. Its tensors are torch's fake ones, so
that the engine's own code runs on it, at the cost of Python alone, and can be counted. Decoder layers of one kind cost
the same: the model is kept with its last layer and at most one other, and the counts are multiplied.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from graft.config.train import Train
from graft.errors import GraftError, InputError, first_line
from graft.model.attention.segments import DENSE, SEGMENTS
from graft.model.device import Precision
from graft.model.files.quantize import (
    is_bitsandbytes_4bit,
    is_bitsandbytes_8bit,
    pack_without_numbers,
    with_quantized_layers,
)
from graft.model.fused.lora_quantized import fuse_quantized_lora
from graft.model.memory.remember import remember
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import Unfit, add_adapter, freeze_but, trainable
from graft.model.tuned.kinds import peft_config
from graft.model.tuned.vocabulary import grow
from graft.train.load import stored_dtype, with_new_tokens

QUANTISED = "how its weights are packed is known only when they are loaded"


class NotCountable(GraftError):
    """The run's step depends on numbers, or on what is not known without its weights."""


@dataclass(slots=True)
class Hollow:
    """A model to be counted."""

    lm: TreeLM
    mode: FakeTensorMode
    device: torch.device
    precision: Precision
    frozen_bytes: int
    """Of all weights that are not trained."""
    trained_bytes: int
    mapped_bytes: int
    """Of weights that were packed, as they are stored: on the CPU the file stays mapped, as others of its weights are
    used where they lie, and its pages stay until the kernel wants them for something else."""
    base_numbers: int
    """Weights of the base, as a file of it holds them."""
    trained: dict[str, nn.Parameter]
    """Every trainable parameter, of all layers, as fake tensors."""
    kinds: Tally[int]
    """How many layers, the last one left out, are of the kind of the layer with this index."""
    _layers: nn.ModuleList | None
    _holder: tuple[nn.Module, str] | None

    @contextmanager
    def with_layers(self, *indices: int) -> Iterator[None]:
        """Keep only these layers and the last one; without a list of layers the model stays whole."""
        if self._holder is None or self._layers is None:
            yield
            return
        holder, name = self._holder
        setattr(holder, name, nn.ModuleList([*(self._layers[index] for index in indices), self._layers[-1]]))
        try:
            yield
        finally:
            setattr(holder, name, self._layers)


@contextmanager
def countable(name: str) -> Iterator[None]:
    """Whatever a model without numbers cannot do becomes one error.

    Raises:
        NotCountable: the model with this name could not do it.
    """
    try:
        yield
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RuntimeError,
        AssertionError,
        ArithmeticError,
    ) as error:
        raise NotCountable(f"{name} cannot be counted without its weights ({first_line(error)})") from None


def refuse_uncountable(settings: Train) -> None:
    """What a count without weights would get wrong is not counted.

    Raises:
        NotCountable: the settings ask for it.
    """
    why = None
    if settings.compile is True:
        why = "with compile=true the compiler chooses what is kept"
    elif settings.offload_activations:
        why = "with offload_activations=true it depends on the transfers what is on the device at a time"
    if why is not None:
        raise NotCountable(f"this run cannot be counted beforehand: {why}")


def hollow(settings: Train, precision: Precision, device: torch.device, new_tokens: Sequence[int] = ()) -> Hollow:
    """The model of a run, without weights; `new_tokens` are the ids of `new_tokens`.

    Raises:
        InputError: the config cannot be read or is of no causal language model.
        ConfigError: the settings do not fit the model.
        NotCountable: it cannot be made without weights.
    """
    refuse_uncountable(settings)
    assert settings.checkpointing != "auto", "which mode it is must be decided before"
    with countable(settings.model):
        return _hollow(settings, precision, device, new_tokens)


def _hollow(settings: Train, precision: Precision, device: torch.device, new_tokens: Sequence[int] = ()) -> Hollow:
    """In the order of graft.train.load."""
    with torch.device("meta"):
        base = _from_config(settings, precision.trained if settings.trains_own_weights else precision.frozen)
        base_numbers = sum(parameter.numel() for parameter in base.parameters())
        model: PreTrainedModel | PeftModel
        if settings.trains_own_weights:
            model = _own_weights(base, settings, new_tokens)
        else:
            model = _adapted(base, settings, precision, new_tokens)
    model.train()
    fuse_quantized_lora(model)
    if settings.checkpointing == "full":
        remember(model, "full", settings.checkpoint_every)
    if device.type == "cpu":
        _give_norms_numbers(model)
    backend = DENSE if settings.attention == "dense" else SEGMENTS  # what GPUs have for it is not counted
    lm = TreeLM(model, backend, settings.trees, probe=False)
    lm.last_layer.active = settings.router_aux_loss is None  # as model/router.py needs it
    if settings.checkpointing == "selective":
        _give_norms_numbers(model)
        remember(model, "selective")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    packed_numbers = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and _is_packed(m))
    packed = _make_fake(model, mode, device)
    stored = stored_dtype(settings.model)
    parameters = list(dict.fromkeys([*model.parameters(), *packed]))
    trained = [p for p in parameters if p.requires_grad]
    holder = _layer_list(lm)
    layers = getattr(*holder) if holder else None
    return Hollow(
        lm=lm,
        mode=mode,
        device=device,
        precision=precision,
        frozen_bytes=_bytes(parameters) - _bytes(trained),
        trained_bytes=_bytes(trained),
        mapped_bytes=packed_numbers * stored.itemsize if device.type == "cpu" and stored == precision.frozen else 0,
        base_numbers=base_numbers,
        trained=trainable(model),
        kinds=_kinds(lm, layers),
        _layers=layers,
        _holder=holder,
    )


def _own_weights(model: PreTrainedModel, settings: Train, new_tokens: Sequence[int]) -> PreTrainedModel:
    grow(model, 1 + max(new_tokens, default=-1))
    if settings.method == "freeze":
        freeze_but(model, settings.freeze)
    else:
        model.requires_grad_(True)
    return model


def _adapted(base: PreTrainedModel, settings: Train, precision: Precision, new_tokens: Sequence[int]) -> PeftModel:
    if settings.quantize != "none":
        with_quantized_layers(base, settings.quantize, precision.frozen)
    grow(base, 1 + max(new_tokens, default=-1))
    config = with_new_tokens(peft_config(settings), base, new_tokens)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # other ways to begin look at the weights; the shapes are the same
    try:
        return add_adapter(base, config, settings.seed)
    except Unfit as error:  # some kinds look at the weights' numbers when they are put on a model
        raise NotCountable(f"this run cannot be counted beforehand: without weights {error}") from None


def _bytes(tensors: Iterable[Any]) -> int:
    """What their numbers take, of tensors that are made of others what those take."""
    total = 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            total += _bytes(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            total += tensor.numel() * tensor.element_size()
    return total


def _is_packed(layer: nn.Linear) -> bool:
    """Whether a layer's weight is kept in another form than it is computed with."""
    return is_bitsandbytes_4bit(layer) or is_bitsandbytes_8bit(layer) or is_traceable_wrapper_subclass(layer.weight)


def _from_config(settings: Train, dtype: torch.dtype) -> PreTrainedModel:
    path = settings.model
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {path}: its config cannot be read: {first_line(error)}") from None
    assert isinstance(model, PreTrainedModel)
    if model.config.to_dict().get("quantization_config"):
        raise NotCountable(f"this run cannot be counted beforehand: {QUANTISED}")
    return model


def _give_norms_numbers(model: nn.Module) -> None:
    """Norms are replaced by faster ones after a comparison of numbers: theirs, which are few, are made up."""
    for module in model.modules():
        own = list(module.parameters())
        if type(module).__name__.endswith("Norm") and own and all(p.dim() == 1 for p in own):
            module.to_empty(device="cpu")
            for parameter in own:
                parameter.data.fill_(1)


def _make_fake(model: nn.Module, mode: FakeTensorMode, device: torch.device) -> list[Tensor]:
    """Put a fake tensor in the place of every parameter and buffer; tied ones stay tied.

    Returns the tensors of packed weights, which are more than their parameters.
    """
    made: dict[int, nn.Parameter] = {}
    packed: list[Tensor] = []
    with mode:
        for module in model.modules():
            packed += pack_without_numbers(module, device)
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and not isinstance(parameter, FakeTensor):
                    if id(parameter) not in made:
                        made[id(parameter)] = nn.Parameter(_empty(parameter, device), parameter.requires_grad)
                    module._parameters[name] = made[id(parameter)]
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return packed


def _empty(tensor: Any, device: torch.device) -> Tensor:
    """A tensor like this one; of one that is made of others (PyTorch's protocol), as torchao's are, each of them."""
    if not is_traceable_wrapper_subclass(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _empty(getattr(tensor, name), device) for name in names}
    made: Tensor = type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    return made


def _layer_list(lm: TreeLM) -> tuple[nn.Module, str] | None:
    """The module that holds the decoder's layers, and the list's name in it."""
    count = lm.base.config.get_text_config().num_hidden_layers
    for module in lm.decoder.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count and count > 1:
                return module, name
    return None


def _kinds(lm: TreeLM, layers: nn.ModuleList | None) -> Tally[int]:
    """Layers, the last one left out, counted by the first one of the same shapes, attention and memory of its input.

    A layer above trained weights passes a gradient on to them, and keeps what it needs for that, even where none of its
    own weights is trained. Cut out of the model it must be told so.
    """
    types = lm.base.config.get_text_config().to_dict().get("layer_types") or []
    first: dict[object, int] = {}
    found: Tally[int] = Tally()
    trained_below = any(p.requires_grad for p in lm.embedding.parameters())
    for index, layer in enumerate(layers or []):
        if trained_below:
            layer.register_forward_pre_hook(_as_if_computed_by_trained)
        if index + 1 < len(layers or []):
            shapes = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
            again = isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing
            kind = (type(layer), shapes, types[index] if index < len(types) else None, trained_below, again)
            found[first.setdefault(kind, index)] += 1
        trained_below = trained_below or any(p.requires_grad for p in layer.parameters())
    return found


def _as_if_computed_by_trained(_layer: nn.Module, given: tuple[object, ...]) -> None:
    states = given[0] if given else None
    if isinstance(states, Tensor) and torch.is_grad_enabled() and not states.requires_grad:
        states.requires_grad_(True)
