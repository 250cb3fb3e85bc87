"""What a process occupies, and how fast a device multiplies, copies and begins. Knows no models."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F


def resident() -> int:
    """Bytes of memory that this process occupies now."""
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True, slots=True)
class Rates:
    """Speeds of a device in one number format."""

    products: float
    """Floating-point operations per second of matrix products."""
    attention: float
    """The same of the attention kernel."""
    moved: float
    """Bytes per second, read and written together."""
    operation: float
    """Seconds to begin an operation."""


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, heads: int, seconds: float = 0.8) -> Rates:
    """Measure a device for at most about `seconds`, with products `width` features wide."""
    head = max(8, width // max(1, heads))
    a = torch.randn(512, width, device=device, dtype=dtype)
    b = torch.randn(width, 2 * width, device=device, dtype=dtype)
    q = torch.randn(1, heads, 256, head, device=device, dtype=dtype)
    large, small = torch.randn(2**23, device=device), torch.randn(16, device=device)
    out = torch.empty_like(large)
    share = seconds / 4
    with torch.inference_mode():
        product = best_time(lambda: a @ b, device, share)
        attention = best_time(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device, share)
        copy = best_time(lambda: torch.mul(large, 2.0, out=out), device, share)
        begin = best_time(lambda: small.add(1.0), device, share)
    return Rates(
        products=2.0 * a.numel() * b.shape[1] / product,
        attention=2.0 * heads * 256 * 256 * head / attention,  # two products, of which the mask leaves half
        moved=2.0 * large.numel() * large.element_size() / copy,
        operation=begin,
    )


def best_time(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest time in seconds of one call, of as many as fit into `seconds`; waits for the device."""
    accelerated = device.type != "cpu"
    work()  # the first call also chooses kernels
    if accelerated:
        torch.accelerator.synchronize(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        work()
        if accelerated:
            torch.accelerator.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
