"""Weights that arrive late: when their layer is about to be spread over processes, in the format that it is to have.

A weight that is stored in the format it is wanted in is the file's pages, which the processes of a host share. In any
other format it is memory of the process's own, and each of N processes would hold the whole model before it keeps a
part. So the model is made without the numbers of its matrices (one NaN, shown as all of them: whoever reads them too
early spoils the run visibly), and the files' pages wait beside it. `Late.fill` converts or quantises one module's.

Numbers, buffers and formats are those of a model that is loaded at once: transformers loads both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from graft.model.files.load import load_base
from graft.model.files.quantize import with_quantized_layers

FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
QUANTISED = ("nf4", "int8")
"""What can be quantised layer by layer: the adapter must find the library's layers before their numbers are there."""


class Late:
    """The numbers that a model on the host is still without."""

    def __init__(self, device: torch.device) -> None:
        """`device` is where weights are quantised."""
        self.device = device
        self._plain: dict[nn.Parameter, Tensor] = {}
        self._quantised: dict[nn.Module, Tensor] = {}

    @property
    def waiting(self) -> int:
        """Weights whose numbers have not come yet."""
        return len(self._plain) + len(self._quantised)

    def load(self, path: str, dtype: torch.dtype, trust_remote_code: bool, quantize: str) -> PreTrainedModel | None:
        """A model on the host that waits for its numbers; None where it gains nothing or cannot be.

        Raises:
            InputError: see `load_base`.
        """
        stored = stored_format(path)
        if stored is None or quantize not in ("none", *QUANTISED) or (stored == dtype and quantize == "none"):
            return None
        mapped = load_base(path, stored, trust_remote_code)
        if quantize != "none" and mapped._keep_in_fp32_modules:  # formats that only the quantised loading knows of
            return None
        pages = {name: parameter.detach() for name, parameter in mapped.named_parameters()}
        tied = {name for name, _ in mapped.named_parameters(remove_duplicate=False)} - pages.keys()
        state = {
            name: _without_numbers(value.shape, dtype) if name in pages and value.dim() > 1 else value
            for name, value in mapped.state_dict().items()
            if name not in tied
        }
        model = _again(mapped, state, dtype)
        parameters = dict(model.named_parameters())
        if {name: value.shape for name, value in pages.items()} != {n: p.shape for n, p in parameters.items()}:
            return None
        for name, parameter in parameters.items():
            if pages[name].dim() > 1:
                parameter.data = _without_numbers(parameter.shape, parameter.dtype)
                self._plain[parameter] = pages[name]
        if quantize != "none":
            with_quantized_layers(model, quantize, dtype)
            self._wait_for_quantised(model, parameters)
            model.eval()  # as transformers leaves it; the new layers were not
        return model

    def _wait_for_quantised(self, model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> None:
        """Layers that were put in the place of others get their bias, and a weight without numbers."""
        layer: Any
        for name, layer in model.named_modules():
            weight = layer._parameters.get("weight")
            if weight is None or not weight.is_meta:
                continue
            if layer.bias is not None:
                layer.bias = parameters[f"{name}.bias"]
            plain = parameters[f"{name}.weight"]
            self._quantised[layer] = self._plain.pop(plain)
            # In fp32, so that PEFT makes its adapter in fp32, as it does where the weights are whole numbers.
            hollow = _without_numbers(plain.shape, torch.float32)
            layer.weight = type(weight)(hollow, requires_grad=False, **_settings(weight))
            layer._late_dtype = plain.dtype

    @torch.no_grad()
    def fill(self, module: nn.Module) -> None:
        """Give a module the numbers that it is without."""
        layer: Any
        for layer in module.modules():
            pages = self._quantised.pop(layer, None)
            if pages is not None:
                layer.weight = self._packed(layer, pages)
        for parameter in module.parameters():
            pages = self._plain.pop(parameter, None)
            if pages is not None:
                parameter.data = pages.to(parameter.dtype)

    def _packed(self, layer: Any, pages: Tensor) -> nn.Parameter:
        """A quantised layer's weight, as transformers makes it."""
        value = pages.to(self.device, layer._late_dtype)
        if issubclass(layer.source_cls, Conv1D):
            value = value.T
        kind = type(layer.weight)
        if kind.__name__ == "Int8Params":  # it quantises on the way from the host
            value = value.cpu()
        made: nn.Parameter = kind(value, requires_grad=False, **_settings(layer.weight)).to(self.device)
        return made

    @contextmanager
    def lent(self, module: nn.Module) -> Iterator[None]:
        """A module with its numbers, for as long as something is tried out on it; quantised layers stay without."""
        waiting = {p: self._plain[p] for p in module.parameters() if p in self._plain}
        for parameter, pages in waiting.items():
            parameter.data = pages.to(parameter.dtype)
        try:
            yield
        finally:
            for parameter in waiting:
                parameter.data = _without_numbers(parameter.shape, parameter.dtype)


def _again(mapped: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """The same model in another number format, loaded from these tensors instead of its files."""
    kind: Any = type(mapped)
    model = kind.from_pretrained(None, config=copy.deepcopy(mapped.config), state_dict=state, dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    model.generation_config = mapped.generation_config
    name: Any = mapped.name_or_path
    model.name_or_path = model.config._name_or_path = name
    return model


def _without_numbers(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.full((), torch.nan, dtype=dtype).expand(shape)


def _settings(weight: Any) -> dict[str, Any]:
    """What the constructor of a quantised weight is given again."""
    return {name: value for name, value in vars(weight).items() if name not in ("SCB", "CB")}


def reads_weights(config: PeftConfig) -> bool:
    """Whether PEFT looks at the base's numbers as it puts an adapter on; of kinds other than LoRA that is believed."""
    if type(config) is not LoraConfig:
        return True
    begins = config.init_lora_weights
    plainly = isinstance(begins, bool) or begins in ("gaussian", "orthogonal")
    looks = (config.use_dora, config.modules_to_save, config.trainable_token_indices, config.target_parameters)
    return not plainly or any(looks) or config.layer_replication is not None


def saved_reads_weights(folder: Path) -> bool:
    """The same of an adapter that was saved; one that cannot be read is refused by whoever loads it."""
    try:
        return reads_weights(PeftConfig.from_pretrained(str(folder)))
    except (OSError, ValueError, TypeError, KeyError):
        return True


def stored_format(path: str) -> torch.dtype | None:
    """The one format of all numbers in a model's safetensors files; None where there are several, or other files."""
    config = Path(path) / "config.json"
    if not config.is_file():
        cached: object = None
        with suppress(ValueError):  # no hub's id either
            cached = try_to_load_from_cache(path, "config.json")
        if not isinstance(cached, str):
            return None
        config = Path(cached)
    found = set()
    try:
        for file in config.parent.glob("model*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):  # said by whoever loads it
        return None
    return FORMATS.get(found.pop()) if len(found) == 1 else None
