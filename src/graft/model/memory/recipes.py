"""What a backward pass needs and need not keep: tensors that are cheap to make again are kept as recipes.

A norm's output is one pass over its input, which the norm keeps for its own gradient anyway; so is the product of a
gated MLP. They are half of what a decoder layer keeps. Here autograd keeps how they were made, makes them again when
the backward pass asks, and keeps everything else as it is: no layer runs twice, no random number is drawn twice, and
the gradients are the same to the bit. Knows modules and tensors, not trees.

Shapes: T tokens, d features, f features of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Make = Callable[..., Tensor]
Pack = Callable[[Tensor], Any]
Unpack = Callable[[Any], Tensor]


class Recipe:
    """How to make one tensor again: a function of tensors that are kept in any case."""

    __slots__ = ("_autocast", "_book", "_function", "_inputs", "_made", "_uses", "_watched")

    def __init__(self, book: _Book, function: Make, inputs: tuple[Tensor, ...]) -> None:
        kind = inputs[0].device.type
        self._book = book
        self._function = function
        self._inputs = [book.keep(tensor) for tensor in inputs]
        self._watched = [(kept, kept._version) for kept in self._inputs if isinstance(kept, Tensor)]
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._made: Tensor | None = None
        self._uses = 0

    def promise(self) -> Recipe:
        """One more use; the tensor is kept between the first and the last of them."""
        self._uses += 1
        return self

    def make(self) -> Tensor:
        """The tensor, made under the autocast of its first making.

        Raises:
            RuntimeError: an input was changed in place since.
        """
        made = self._made
        if made is None:
            if any(kept._version != version for kept, version in self._watched):
                raise RuntimeError("an input of a norm or an activation was changed in place; set checkpointing=full")
            kind, dtype, enabled = self._autocast
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                made = self._function(*(self._book.give_back(kept) for kept in self._inputs))
        self._uses -= 1
        self._made = made if self._uses > 0 else None
        return made


@dataclass(slots=True)
class _Book:
    """Recipes of the tensors of one forward pass by the tensors' `id`, and how all else is kept."""

    keep: Pack
    give_back: Unpack
    written: dict[int, tuple[ReferenceType[Tensor], Recipe]] = field(default_factory=dict)


_book: ContextVar[_Book | None] = ContextVar("recipes", default=None)


def as_it_is(tensor: Tensor) -> Tensor:
    """What autograd may keep of a tensor in its place: not itself, or an output that keeps itself is never freed."""
    return tensor if tensor.is_leaf else tensor.detach()


def _unchanged(kept: Tensor) -> Tensor:
    return kept


@contextmanager
def keeping_recipes(keep: Pack = as_it_is, give_back: Unpack = _unchanged) -> Iterator[None]:
    """What autograd saves inside has its recipe kept instead, where it has one; all else goes through `keep`."""
    book = _Book(keep, give_back)
    token = _book.set(book)

    def pack(tensor: Tensor) -> Any:
        whole = tensor if tensor._base is None else tensor._base
        written = book.written.get(id(whole))
        if written is not None and written[0]() is whole and whole.is_contiguous():
            return written[1].promise(), tensor.shape, tensor.stride(), tensor.storage_offset()
        return keep(tensor)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, tuple) and isinstance(kept[0], Recipe):
            return kept[0].make().as_strided(*kept[1:])
        return give_back(kept)

    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _book.reset(token)
        book.written.clear()


def write_recipe(made: Tensor, function: Make, *inputs: Tensor) -> None:
    """Note how a tensor was made; does nothing outside `keeping_recipes`."""
    book = _book.get()
    if book is not None and torch.is_grad_enabled() and made.requires_grad:
        book.written[id(made)] = ref(made), Recipe(book, function, inputs)


def write_recipes(model: nn.Module) -> int:
    """Let the norms and activations of a model, and the products of its gated MLPs, note their recipes.

    Call it once, after the model's layers are what they will stay; returns the number of modules. Modules that keep
    more than their input for the backward pass (a norm written as four operations) are made to keep that alone.
    """
    found = 0
    for module in list(model.modules()):
        forward = _gated_forward(module)
        if forward is not None:
            module.forward = MethodType(forward, module)
            found += 1
        elif _is_pointwise(module):
            if not _keeps_its_input_alone(module):
                module.forward = _keeping_its_input_alone(module.forward)
            module.register_forward_hook(_note)
            found += 1
    return found


def _note(module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
    if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(made, Tensor) and made is not given[0]:
        write_recipe(made, module.forward, given[0])


def _is_pointwise(module: nn.Module) -> bool:
    """A norm or an activation: one tensor in, one of the same shape out, nothing random, nothing below it."""
    if next(module.children(), None) is not None:
        return False
    name = type(module).__name__
    if name.endswith("Norm") or isinstance(module, nn.LayerNorm):
        return [name for name, _ in module.named_parameters()] in (["weight"], ["weight", "bias"])
    home = type(module).__module__
    if next(module.parameters(), None) is not None or not (
        home in ("torch.nn.modules.activation", "transformers.activations") or name == "BloomGelu"
    ):
        return False
    return isinstance(_tried(module), Tensor)


def _tried(module: nn.Module) -> Tensor | None:
    """The module's output for a few numbers, where it is of the input's shape and the same twice."""
    x = _numbers(module)
    try:
        with torch.no_grad():
            once, twice = module(x), module(x)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):  # it is called otherwise
        return None
    return once if isinstance(once, Tensor) and once.shape == x.shape and torch.equal(once, twice) else None


def _numbers(module: nn.Module, features: int = 8) -> Tensor:
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    size = like.shape[-1] if like.dim() == 1 and like.numel() else features
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, size, generator=generator).to(like.device, like.dtype)


def _keeps_its_input_alone(module: nn.Module) -> bool:
    """Whether autograd keeps nothing as large as the input but the input itself."""
    x = _numbers(module).requires_grad_()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    own = x.untyped_storage().data_ptr()
    return all(t.untyped_storage().data_ptr() == own or t.numel() < x.numel() for t in kept)


def _keeping_its_input_alone(forward: Make) -> Make:
    def kept(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x)
        made: Tensor = checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False)
        return made

    return kept


def _gated_forward(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    """The forward of an MLP `down(act(gate(x)) * up(x))`, its two halves in one layer or in two; None for others.

    An MLP that model/fused/mlp.py computes as one operation keeps the gate's and the up layer's outputs alone already.
    """
    if "forward" in vars(module):
        return None
    parts = dict(module.named_children())
    act = parts.get("act_fn") or parts.get("activation_fn")
    if act is None or "down_proj" not in parts:
        return None
    if parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}:

        def two(self: Any, x: Tensor) -> Tensor:
            down: Tensor = self.down_proj(gated(act, self.gate_proj(x), self.up_proj(x)))
            return down

        forward = two
    elif "gate_up_proj" in parts and len(parts) == 3:

        def one(self: Any, x: Tensor) -> Tensor:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            down: Tensor = self.down_proj(gated(act, gate, up))
            return down

        forward = one
    else:
        return None
    return forward if _tried(act) is not None and _same_numbers(module, forward) else None


def _same_numbers(module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> bool:
    """Whether both forwards give the same: names promise nothing."""
    norm_like = next((p for p in module.parameters() if p.is_floating_point() and p.dim() == 2), None)
    first = next(m for name, m in module.named_modules() if name in ("gate_proj", "gate_up_proj"))
    features = first.in_features if isinstance(first.in_features, int) else 0
    x = torch.randn(1, 2, features, generator=torch.Generator().manual_seed(0))
    if norm_like is not None and norm_like.is_meta:
        return True  # a model without numbers, which is only counted: its parts' names are believed
    if norm_like is not None:
        x = x.to(norm_like.device, norm_like.dtype)
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return torch.equal(module(x), forward(module, x))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    finally:
        module.train(training)


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """[..., f] act(gate) * up, of which only gate and up are kept."""
    if not torch.is_grad_enabled():
        raised: Tensor = act(gate) * up
        return raised
    made: Tensor = _Gated.apply(act, gate, up)  # type: ignore[no-untyped-call]
    write_recipe(made, lambda gate, up: act(gate) * up, gate, up)
    return made


class _Gated(torch.autograd.Function):
    """With G the gradient of the output: d_up = G act(gate),  d_gate = act'(gate) (G up)."""

    @staticmethod
    def forward(ctx: Any, act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        raised: Tensor = act(gate) * up
        return raised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            entering = gate.detach().requires_grad_()
            opened = ctx.act(entering)
        d_up = (grad * opened.detach()).to(up.dtype)
        (d_gate,) = torch.autograd.grad(opened, entering, grad * up)
        return None, d_gate, d_up
