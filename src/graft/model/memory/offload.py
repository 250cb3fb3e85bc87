"""Tensors that the backward pass will want, moved to the host's memory meanwhile. Knows tensors and streams alone.

Copies run on a stream of their own, out of pinned memory, so that the accelerator computes on; when one tensor is asked
for, those kept just before it, which the backward pass wants next, are sent for too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_BYTES = 2**20
"""Smaller tensors stay: a copy of 1 MiB takes as long as its launch."""
AHEAD = 4
"""Tensors sent for before they are asked for."""


@dataclass(slots=True, weakref_slot=True)
class _Kept:
    """A tensor on the host, and on the device again once it has been sent for."""

    host: Tensor
    away: Any
    """Event: the copy to the host is done."""
    number: int
    back: Tensor | None = None
    arrived: Any = None
    """Event: the copy to the device is done."""


class HostStore:
    """Keeps activations of one device on the host; weights and small tensors are left where they are."""

    def __init__(self, device: torch.device, smallest_bytes: int = SMALLEST_BYTES) -> None:
        self.device = device
        self.smallest_bytes = smallest_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._of_tensor: dict[int, tuple[weakref.ref[Tensor], int, weakref.ref[_Kept]]] = {}
        self._recent: dict[int, weakref.ref[_Kept]] = {}
        self._count = 0

    def keep(self, tensor: Tensor) -> Any:
        """What to hold instead of a tensor: a place on the host, or the tensor itself."""
        whole = tensor if tensor._base is None else tensor._base
        size = whole.untyped_storage().nbytes()
        if whole.is_leaf or whole.device != self.device or size < self.smallest_bytes or not whole.is_contiguous():
            return tensor if tensor.is_leaf else tensor.detach()
        return self._sent_away(whole), tensor.shape, tensor.stride(), tensor.storage_offset()

    def give_back(self, held: Any) -> Tensor:
        """The tensor that `keep` was given, on its device."""
        if isinstance(held, Tensor):
            return held
        kept, *view = held
        self._send_for(kept)
        for number in range(kept.number - 1, kept.number - 1 - AHEAD, -1):
            other = self._recent.get(number, lambda: None)()
            if other is not None:
                self._send_for(other)
        assert kept.back is not None
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(kept.arrived)
            kept.back.record_stream(now)
        back: Tensor = kept.back.as_strided(*view)
        return back

    def _sent_away(self, tensor: Tensor) -> _Kept:
        """Several operations keep one tensor: it is copied once, as long as it is not changed."""
        known = self._of_tensor.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            kept = known[2]()
            if kept is not None:
                return kept
        value = tensor.detach()
        host = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=self._stream is not None)
        away = None
        if self._stream is None:
            host.copy_(value)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                host.copy_(value, non_blocking=True)
                away = self._stream.record_event()
            value.record_stream(self._stream)  # its memory is not given out again before the copy is done
        kept = _Kept(host, away, self._count)
        self._recent[self._count] = weakref.ref(kept, self._forget(self._count))
        self._of_tensor[id(tensor)] = weakref.ref(tensor), tensor._version, weakref.ref(kept)
        self._count += 1
        return kept

    def _forget(self, number: int) -> Any:
        store = weakref.ref(self)

        def forget(_gone: object) -> None:
            mine = store()
            if mine is not None:
                mine._recent.pop(number, None)
                if not mine._recent:
                    mine._of_tensor.clear()

        return forget

    def _send_for(self, kept: _Kept) -> None:
        if kept.back is not None:
            return
        if self._stream is None:
            kept.back = kept.host.to(self.device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(kept.away)
            kept.back = kept.host.to(self.device, non_blocking=True)
            kept.arrived = self._stream.record_event()
