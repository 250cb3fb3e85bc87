"""What a computation allocates and computes, counted operation by operation. Knows tensors; no models and no data.

`Counter` watches every operation of torch below autograd, so that what autograd keeps for the backward pass, and what
the backward pass needs for a moment, are counted as they happen, for any architecture. Under `FakeTensorMode` the
same operations run without numbers or memory; the counts are the same to the byte (tests/test_plan.py).
"""

from __future__ import annotations

import weakref
from collections import Counter as Tally
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

LAYERS = "layers"
ATTENTION = "attention"
HEAD = "head"


@dataclass(slots=True)
class Work:
    """What was computed in one part of the model."""

    products: float = 0.0
    """Floating-point operations of matrix products, a multiplication and an addition each."""
    moved: float = 0.0
    """Bytes read and written by all other operations."""
    operations: float = 0.0
    """Number of operations that did something (views do not)."""

    def plus(self, other: Work, times: float = 1.0) -> Work:
        return Work(
            self.products + times * other.products,
            self.moved + times * other.moved,
            self.operations + times * other.operations,
        )


@dataclass(slots=True)
class Counted:
    """Totals of a stretch of computation; bytes by the part of the model that made the tensor."""

    peak: Tally[str] = field(default_factory=Tally)
    """Bytes alive at the moment at which most were."""
    alive: Tally[str] = field(default_factory=Tally)
    """Bytes alive now."""
    work: dict[str, Work] = field(default_factory=dict)


_part: ContextVar[str] = ContextVar("part", default=LAYERS)


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is allocated and computed inside counts as this part of the model."""
    token = _part.set(name)
    try:
        yield
    finally:
        _part.reset(token)


class Counter(TorchDispatchMode):
    """Counts everything between its `with` and its end: bytes that were allocated inside, and work."""

    def __init__(self, scalar: float | None = None) -> None:
        """With `scalar`, a tensor without numbers that is asked for its one number gives this one."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = Counted()
        self.scalar = scalar
        self._alive = 0
        self._most = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def ignore(self, *tensors: Tensor) -> Self:
        """Leave tensors that were there before out of the count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)
        return self

    def restart_peak(self) -> Tally[str]:
        """The worst moment so far; from here on only later ones count."""
        before, self.counted.peak = self.counted.peak, self.counted.alive.copy()
        self._most = self._alive
        return before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, then look at what came out of it."""
        if func is aten._local_scalar_dense.default and self.scalar is not None:
            return self.scalar if args[0].is_floating_point() else int(self.scalar)
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":
            return result
        self._see_passing(_inside(func, args))
        fresh = [tensor for tensor in _tensors(result) if self._see(tensor)]
        flops = _flops(func, args, kwargs or {}, result)
        if flops or fresh or func._schema.is_mutable:
            of = ATTENTION if "attention" in func.__name__ else _part.get()  # its backward runs outside of any part
            work = self.counted.work.setdefault(of, Work())
            work.operations += 1
            if flops:
                work.products += flops
            else:
                work.moved += sum(_bytes(tensor) for tensor in (*_tensors(args), *fresh))
        return result

    def _see_passing(self, size: int) -> None:
        """Bytes that an operation took and gave back before it returned."""
        if size and self._alive + size > self._most:
            self._most = self._alive + size
            self.counted.peak = self.counted.alive.copy()
            self.counted.peak[_part.get()] += size

    def _see(self, tensor: Tensor) -> bool:
        """Whether a tensor has memory that was not there before; its end is noted too."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return False
        size, of = storage.nbytes(), _part.get()
        alive = self.counted.alive

        def freed(_: Any) -> None:
            self._storages.pop(key, None)
            self._alive -= size
            alive[of] -= size

        self._storages[key] = weakref.ref(storage, freed)
        self._alive += size
        alive[of] += size
        if self._alive > self._most:
            self._most = self._alive
            self.counted.peak = alive.copy()
        return True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _inside(func: Any, args: Any) -> int:
    """Bytes of what bitsandbytes' operators make inside on a CPU.

    The 4-bit product: the weight out of its format, and its scales. Eight bits out of their format: each times its
    scale, before all are divided by 127.
    """
    if func.namespace != "bitsandbytes":
        return 0
    if "int8_vectorwise_dequant" in func.__name__ and args[0].device.type == "cpu":
        return int(4 * args[0].numel())
    if "gemm_4bit" in func.__name__ and args[0].device.type == "cpu":
        numel, block = args[2][0] * args[2][1], args[4]
        return int(numel * args[0].element_size() + 2 * 4 * (numel // block))
    return 0


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """By torch's own formulas; it has none for the CPU's attention kernel and for oneDNN."""
    packet = func._overloadpacket
    if func.namespace == "bitsandbytes" and "gemm_4bit" in func.__name__:
        return float(2 * args[0].numel() * args[2][0])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        causal = bool(args[4]) if len(args) > 4 else False
        return float(sdpa_flop_count(*(tensor.shape for tensor in args[:3]))) / (2 if causal else 1)
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        query, key, value = (tensor.shape for tensor in args[1:4])
        causal = bool(args[7]) if len(args) > 7 else False
        return 2.5 * float(sdpa_flop_count(query, key, value)) / (2 if causal else 1)  # five products to two
    if packet is torch.ops.mkldnn._linear_pointwise:  # a product by oneDNN (model/fused/product.py)
        return 2.0 * float(args[0].numel() * args[1].shape[0])
    known = flop_registry.get(packet)
    return 0.0 if known is None else float(known(*args, **kwargs, out_val=result))
