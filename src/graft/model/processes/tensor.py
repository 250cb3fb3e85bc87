"""Decoder layers that several processes compute between them (tensor parallelism), by transformers' own plans.

Which projections are cut by columns and which by rows is the plan of the model's config (Shoeybi et al. 2019,
arXiv:1909.08053). The parent of such projections, an attention or an MLP, is a *region*: inside of it each process
computes with its own heads or features on plain tensors, so that every forward of graft's works as it is. Only at its
border do the processes meet:

    hidden states in     forward as they are                    backward summed
    output out           forward summed                         backward as they are

All else is computed by each of them alike. Its predictors are dealt, so that head and loss are computed once, and
gradients outside of the layers are sums over the processes, as those of what is whole within a region are.

Every weight is a DTensor over the processes of a group, so that FSDP2, norms, optimizers and checkpoints treat all
alike. A bias that is added once to a sum over t processes is added by each as a t-th of it.

Shapes: N nodes, M predictors, d hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedConfig, PreTrainedModel

from graft.errors import ConfigError
from graft.model.attention.segments import TreeRow
from graft.model.processes.shard import Enter
from graft.model.processes.tensor_parts import (
    InPlace,
    PartOfDropout,
    Slot,
    Use,
    as_kept,
    gathered,
    gradients_meet,
    in_use,
    meet_around,
    norm_over,
    put_in_place,
    share,
    share_gradient,
    summed,
    with_input,
    with_output,
)
from graft.model.tuned.adapters import decoder_layers, plain

COLUMNS, ROWS = "colwise", "rowwise"
HALVES = "packed_colwise"
"""Columns of two projections that lie behind each other in one weight: each process takes its part of both."""
WHOLE = "replicated_with_grad_allreduce"
"""A weight that all processes of a region use alike, such as the scale of a norm over each head."""
EXPERTS = "moe_tp_experts"
"""A module of many experts, whose weights [experts, out, in] are cut each alike."""
CUT = (COLUMNS, ROWS, HALVES)
LAYERS = "layers.*."
COUNTS = {
    "num_attention_heads": "attention heads", "num_key_value_heads": "key heads",
    "intermediate_size": "features in an MLP", "moe_intermediate_size": "features in an expert",
}  # fmt: skip
"""What is cut, by its name in a config."""


def refuse_model(config: PreTrainedConfig, model: str, team: int) -> None:
    """Find out by the config alone that a model's layers cannot be computed by `team` processes between them.

    Raises:
        ConfigError: there is no plan for it, or it cuts what cannot be cut; names it, with both numbers.
    """
    text = config.get_text_config()
    plan = _plan_of_layers(text)
    if not plan:
        raise ConfigError(
            f"tensor_ranks={team}: transformers has no plan for cutting the layers of {model} ({text.model_type}); set "
            "tensor_ranks=1, and shard_ranks=all spreads its weights"
        )
    for name, style in plan.items():
        if style not in (*CUT, WHOLE, EXPERTS):
            raise ConfigError(
                f"tensor_ranks={team}: the plan for {model} ({text.model_type}) cuts {name} by {style}, which graft "
                f"cannot train; only {', '.join(CUT)}: set tensor_ranks=1"
            )
    values = text.to_dict()
    for name, words in COUNTS.items():
        count = values.get(name)
        if isinstance(count, int) and count % team:
            raise ConfigError(
                f"tensor_ranks={team}: {model} has {count} {words}, which {team} processes cannot share evenly; "
                "choose a divisor of that, or leave tensor_ranks out"
            )


def _plan_of_layers(text: PreTrainedConfig) -> dict[str, str]:
    """{name within a decoder layer: style}."""
    plan: Mapping[str, str] = text.base_model_tp_plan or {}
    return {name.removeprefix(LAYERS): style for name, style in plan.items() if name.startswith(LAYERS)}


class Split:
    """The cut of one model over the groups of a mesh's dimension `tensor`.

    Made while the weights are whole, after everything that compares or replaces modules. `cut` is called with each
    module before FSDP2 takes it, `around` surrounds what computes with the weights outside of the layers.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, mesh: DeviceMesh, device: torch.device) -> None:
        """Cuts nothing yet.

        Raises:
            ConfigError: the plan names what this model does not have in this form.
        """
        # A hint at how to gather in one sum what it gathers in two; it would stand in every process's output.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.mesh = mesh["tensor"]
        self.group = self.mesh.get_group()
        self.rank, self.size = self.mesh.get_local_rank(), self.mesh.size()
        self.device = device
        base = plain(model)
        prefix, layers = decoder_layers(base)
        self.layers = list(layers)
        self.plan = _plan_of_layers(base.config.get_text_config())
        self._name = f"{prefix}*."
        self._outside: list[Slot] = []
        self._in_place: list[InPlace] = []

    def cut(self, module: nn.Module) -> None:
        """Keep only this process's part of a decoder layer's weights, or of whatever is outside of the layers.

        Raises:
            ConfigError: a weight cannot be cut; names it.
        """
        if module in self.layers:
            self._cut_layer(module)
            return
        kept: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # tied weights stay one
        for owner in module.modules():
            for name, parameter in _own_parameters(owner):
                if isinstance(parameter, DTensor):  # of a layer
                    continue
                if id(parameter) not in kept:
                    even = parameter.dim() > 1 and parameter.shape[0] % self.size == 0
                    kept[id(parameter)] = parameter, self._placed(parameter, Shard(0) if even else Replicate())
                self._put(Slot(owner, name, gathered), kept[id(parameter)][1], self._outside)

    def around(self, enter: Enter[Any]) -> Enter[Any]:
        """What surrounds whatever computes with the model's weights: those outside of the layers are whole within."""

        def entered(run: Callable[[], Any]) -> Any:
            def inside() -> Any:
                with in_use(self._outside) as self._in_place:
                    return run()

            try:
                return enter(inside)
            finally:
                self._in_place = []

        return entered

    def recompute(self) -> tuple[Any, Any]:
        """For `checkpoint`: what surrounds a forward pass within `around`, and what its repetition in the backward."""
        return nullcontext(), put_in_place(self._in_place)

    def dealt(self, tree: TreeRow) -> TreeRow:
        """The row with this process's predictors: all compute the row, each a part of its loss."""
        parts = (tensor.tensor_split(self.size)[self.rank] for tensor in (tree.predictors, tree.labels, tree.weights))
        predictors, labels, weights = parts
        return replace(tree, predictors=predictors, labels=labels, weights=weights)

    def _cut_layer(self, layer: nn.Module) -> None:
        slots: list[Slot] = []
        for name, pieces in self._regions(layer).items():
            region = layer.get_submodule(name)
            meet_around(region, self.group)
            for piece, style in pieces.items():
                if piece in region._parameters:
                    placement = _cut_of_experts(style)
                    made = self._placed(region.get_parameter(piece), placement, f"{name}.{piece}")
                    self._put(Slot(region, piece, as_kept), made, slots)
                else:
                    self._cut_projection(region.get_submodule(piece), f"{name}.{piece}", style, slots)
            self._keep_whole(region, summed, slots)
        self._keep_whole(layer, as_kept, slots)
        self._compute_with(layer, slots)

    def _keep_whole(self, module: nn.Module, use: Use, slots: list[Slot]) -> None:
        """What is not cut within a module is the same in all processes."""
        for owner in module.modules():
            for name, parameter in _own_parameters(owner):
                if not isinstance(parameter, DTensor):
                    self._put(Slot(owner, name, use), self._placed(parameter, Replicate()), slots)

    def _regions(self, layer: nn.Module) -> dict[str, dict[str, str]]:
        """The parts of a layer that are computed by parts: {name: {name of a piece in it: style}}.

        Raises:
            ConfigError: the plan cuts into one and does not come out of it, or there is an adapter on experts.
        """
        there = {name for name, _ in (*layer.named_modules(), *layer.named_parameters())}
        found: dict[str, dict[str, str]] = {}
        for name, style in self.plan.items():
            region, _, piece = name.rpartition(".")
            if style in CUT and name in there:
                found.setdefault(region, {})[piece] = style
            if style == EXPERTS and name in there and f"{name}.gate_up_proj" not in there:
                kind = type(layer.get_submodule(name)).__name__
                raise ConfigError(
                    f"tensor_ranks: {self._name}{name} is a {kind}: LoRA on experts is not cut with them; leave them "
                    "out of lora.target_modules ([q_proj, v_proj], for example) and lora.target_parameters"
                )
        for region, pieces in found.items():
            styles = set(pieces.values())
            if ROWS not in styles or len(styles) < 2:
                raise ConfigError(
                    f"tensor_ranks: the plan cuts {self._name}{region} by {' and '.join(styles)} alone, so that it "
                    "would give a part of what it should; set tensor_ranks=1"
                )
        return found

    def _cut_projection(self, layer: nn.Module, name: str, style: str, slots: list[Slot]) -> None:
        known = type(layer) is nn.Linear
        if isinstance(layer, ModulesToSaveWrapper):
            known = all(type(one) is nn.Linear for one in (layer.original_module, *layer.modules_to_save.values()))
        if isinstance(layer, LoraLinear) and type(layer.base_layer) is nn.Linear:
            known = all(isinstance(variant, DoraLinearVariant) for variant in layer.lora_variant.values())
            if style == ROWS:
                self._follow(layer)
        if not known:
            raise ConfigError(
                f"tensor_ranks: {self._name}{name} is a {type(layer).__name__}, of which no process can compute a "
                "part; linear layers can, with LoRA and DoRA: set tensor_ranks=1"
            )
        for inner, owner in layer.named_modules():
            for parameter_name, parameter in _own_parameters(owner):
                full = f"{inner}.{parameter_name}" if inner else parameter_name
                placement, use = _cut_of(full, style)
                made = self._placed(parameter, placement, f"{name}.{full}")
                self._put(Slot(owner, parameter_name, use), made, slots)

    def _follow(self, layer: LoraLinear) -> None:
        """What LoRA does with a part of its inputs: the dropout of a part, and DoRA's norm of whole rows."""
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                part = PartOfDropout(dropout.p, self.rank, self.size)
                layer.lora_dropout[name] = part.train(dropout.training)
        magnitude: Any
        for magnitude in layer.lora_magnitude_vector.values():
            magnitude.get_weight_norm = norm_over(magnitude.get_weight_norm, self.group)

    def _placed(self, parameter: nn.Parameter, placement: Placement, name: str = "") -> nn.Parameter:
        """A whole weight as it is kept; every process has the same one.

        Raises:
            ConfigError: it cannot be shared evenly.
        """
        mine = parameter.detach()
        if not placement.is_replicate():
            part: Any = placement
            packed = part.split_factor if isinstance(placement, _StridedShard) else 1
            if parameter.shape[part.dim] % (packed * self.size):
                raise ConfigError(
                    f"tensor_ranks={self.size}: {self._name}{name} is {list(parameter.shape)}, of which {self.size} "
                    f"processes cannot share the {parameter.shape[part.dim]} evenly"
                )
            halves = [half.chunk(self.size, part.dim)[self.rank] for half in mine.chunk(packed, part.dim)]
            mine = halves[0] if packed == 1 else torch.cat(halves, part.dim)
        spread = DTensor.from_local(
            mine.to(self.device).contiguous(),
            self.mesh,
            [placement],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return nn.Parameter(spread, requires_grad=parameter.requires_grad)

    @staticmethod
    def _put(slot: Slot, made: nn.Parameter, slots: list[Slot]) -> None:
        slot.module.register_parameter(slot.name, made)
        slots.append(slot)

    def _compute_with(self, layer: nn.Module, slots: Sequence[Slot]) -> None:
        """Let a layer compute with plain tensors; the first and the last are where all else begins and ends."""
        forward, first, last = layer.forward, layer is self.layers[0], layer is self.layers[-1]

        def by_parts(_self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            _refuse_other_gradients(layer, args, kwargs)
            if first:
                args, kwargs = with_input(args, kwargs, lambda x: share_gradient(x, self.size))
            with in_use(slots):
                found = forward(*args, **kwargs)
            return with_output(found, lambda x: gradients_meet(x, self.group)) if last else found

        layer.forward = MethodType(by_parts, layer)


def _cut_of(name: str, style: str) -> tuple[Placement, Use]:
    """How a weight of a projection is kept and used, by its name within it: its own, or LoRA's."""
    part, bias = name.split(".", maxsplit=1)[0], name.endswith("bias")
    if style == COLUMNS:
        return (Replicate(), summed) if part == "lora_A" else (Shard(0), as_kept)
    if bias:
        return Replicate(), share
    return (Replicate(), summed) if part in ("lora_B", "lora_magnitude_vector") else (Shard(1), as_kept)


def _cut_of_experts(style: str) -> Placement:
    """How a weight [experts, out, in] is kept."""
    if style == HALVES:
        return _StridedShard(1, split_factor=2)
    return Shard(1) if style == COLUMNS else Shard(2)


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    found = module.named_parameters(recurse=False, remove_duplicate=False)
    return [(name, parameter) for name, parameter in found if parameter.is_floating_point()]


def _refuse_other_gradients(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    others = {str(number): value for number, value in enumerate(args) if number} | dict(kwargs)
    others.pop("" if args else "hidden_states", None)
    for name, value in others.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ConfigError(
                f"tensor_ranks: {type(layer).__name__} is handed more that is trained than hidden states (argument "
                f"{name}), whose gradient would be counted wrongly; set tensor_ranks=1"
            )
