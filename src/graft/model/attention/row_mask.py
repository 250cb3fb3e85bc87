"""A mask that masks nothing and carries a row to attention code. Knows tensors and transformers' masks, no layer.

Most architectures hand an extra argument on to the attention function; some drop it, and some write a sliding window
or chunks into their masks alone. All of them hand their mask on. So where the argument does not serve, the mask that
transformers asks graft for is a `RowMask`: no numbers, but the row and the form that the mask would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Carried(Protocol):
    """A row of any kind; only attention code looks further into it."""

    @property
    def ids(self) -> Tensor:
        """[1, N] token ids, on the row's device."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a causal mask leaves out besides what is later."""

    window: int | None = None
    """A query sees keys less than this many depths above it."""
    chunk: int | None = None
    """A query sees keys of its own chunk of so many depths, counted from the root."""


class RowMask(Tensor):
    """A 4-D mask that masks nothing and carries the row.

    Whatever is computed from it is an ordinary tensor and carries nothing, so that attention code which changes its
    mask is found out; only to be moved, or cut to the number of keys, changes nothing.
    """

    row: Carried
    form: Form

    @classmethod
    def of(cls, row: Carried, form: Form | None = None) -> RowMask:
        """A mask on the row's device."""
        with _disable_current_modes():  # where a row is only counted, a tensor without numbers can be no subclass
            mask = torch.zeros(1, 1, 1, 1, device=row.ids.device).as_subclass(cls)
        mask.row, mask.form = row, form or Form()
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Attributes as they are; moved and cut masks stay row masks; everything else forgets the row."""
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if not isinstance(result, RowMask):
            return result
        if func in (Tensor.to, Tensor.__getitem__, Tensor.contiguous) and result.dim() == 4:
            result.row, result.form = args[0].row, args[0].form
            return result
        return result.as_subclass(Tensor)


_carried: ContextVar[Carried | None] = ContextVar("carried", default=None)
_sizes: ContextVar[set[int] | None] = ContextVar("sizes", default=None)


@contextmanager
def carried_by_masks(row: Carried) -> Iterator[None]:
    """Let the masks that a model asks for in here carry the row."""
    token = _carried.set(row)
    try:
        yield
    finally:
        _carried.reset(token)


@contextmanager
def watch_masks() -> Iterator[set[int]]:
    """Collect the sizes of windows and chunks of the masks that a model asks for.

    A model that expresses a window only through its mask would lose it where no mask is built; comparing these sizes
    with those that reached the attention function shows it.
    """
    sizes: set[int] = set()
    token = _sizes.set(sizes)
    try:
        yield sizes
    finally:
        _sizes.reset(token)


def mask_function(
    *_args: Any, local_size: int | None = None, mask_function: Callable[..., Tensor] | None = None, **_others: Any
) -> RowMask | None:
    """What transformers calls, through its `AttentionMaskInterface`, for each kind of mask that a model needs."""
    sizes, row = _sizes.get(), _carried.get()
    if sizes is not None and local_size is not None:
        sizes.add(local_size)
    if row is None:
        return None
    return RowMask.of(row, Form() if local_size is None or mask_function is None else _form(local_size, mask_function))


def _form(size: int, sees: Callable[..., Tensor]) -> Form:
    """A window or a chunk of `size`: the first token of the second chunk sees the one before it, or does not."""
    batch, head, query, key = (torch.tensor(index) for index in (0, 0, size, size - 1))
    return Form(window=size) if size > 1 and bool(sees(batch, head, query, key)) else Form(chunk=size)
