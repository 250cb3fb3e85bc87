"""What a device can do, found out by doing it: small products, attention, an update, each against fp32 on the CPU.

Knows devices and number formats; nothing of models. Relative errors are of the L2 norm.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.errors import GraftError, first_line
from graft.model.memory.machine import best_time

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORST = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative error above which a kernel is wrong: several times what the format's own rounding makes of these sums.
Products in TF32 (10 bits of mantissa) are above that of fp32."""
NATIVE = 0.5
"""A 16-bit format is native where its products are at least this share as fast as those of the fastest other format:
emulated ones take several times as long, native ones are alike."""
PRODUCT = 2048
"""Rows and columns of the products that are timed."""
WRONG = (
    *(RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, AssertionError, ImportError),
    GraftError,
)
"""What torch, its extensions and graft raise for what a device cannot do."""


@dataclass(frozen=True, slots=True)
class Tried:
    """What came out of trying one thing on one device."""

    works: bool
    error: float | None = None
    """Relative error of the worst number, where there were numbers."""
    why: str = ""
    """What is wrong, as a clause."""


def within(errors: Sequence[float], worst: float, what: str) -> Tried:
    """Judge errors; NaN is no small error."""
    error = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if error <= worst:
        return Tried(True, error)
    return Tried(False, error, f"{what} is off by {error:.1%}, at most {worst:.2%} is expected")


def relative(found: Tensor, wanted: Tensor) -> float:
    """L2 distance of two tensors, relative to the second."""
    return float((found.detach().float().cpu() - wanted).norm() / wanted.norm())


def attempt(work: Callable[[], Tried]) -> Tried:
    """What comes out of trying; an error of torch is a result too, and so is memory that runs out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of shows in the numbers
        try:
            return work()
        except WRONG as error:
            return Tried(False, None, first_line(error))


@functools.cache
def try_format(device: torch.device, dtype: torch.dtype) -> Tried:
    """A product under autocast and its gradients in a format, with fp32 weights, as training computes them.

    fp16 goes through a loss scaler, which must be at work on this device. The result is remembered.
    """
    return attempt(lambda: _product(device, dtype))


def _product(device: torch.device, dtype: torch.dtype) -> Tried:
    draw = torch.Generator().manual_seed(0)
    x, g = (torch.randn(64, 256, generator=draw) for _ in range(2))
    weight = torch.randn(256, 256, generator=draw) / 16
    x_there = x.to(device).requires_grad_()
    w_there = nn.Parameter(weight.to(device))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        y = F.linear(x_there, w_there)
    if y.dtype != dtype:
        return Tried(False, None, f"autocast has no effect there, products stay {_name(y.dtype)}")
    scale = 1.0
    loss = (y.float() * g.to(device)).sum()
    if dtype == torch.float16:
        scale = 256.0
        _scaled_backward(loss, w_there, scale)
    else:
        loss.backward()
    assert x_there.grad is not None
    assert w_there.grad is not None
    errors = (
        relative(y, x @ weight.T),
        relative(
            x_there.grad / scale,  # the scaler unscales what the optimiser holds, and x is not among that
            g @ weight,
        ),
        relative(w_there.grad, g.T @ x),
    )
    return within(errors, WORST[dtype], f"a product in {_name(dtype)}")


def _scaled_backward(loss: Tensor, weight: nn.Parameter, scale: float) -> None:
    """Backward as fp16 is trained: the weight's gradient is unscaled by a scaler that has looked at it."""
    scaler = torch.amp.GradScaler(loss.device.type, init_scale=scale)
    if not scaler.is_enabled():
        raise RuntimeError("torch has no loss scaler for this device")
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def try_attention(device: torch.device, dtype: torch.dtype) -> Tried:
    """torch's causal attention and its gradients in a format."""

    def work() -> Tried:
        draw = torch.Generator().manual_seed(0)
        q, k, v, g = (torch.randn(1, 4, 128, 32, generator=draw) for _ in range(4))
        wanted = _attended(q, k, v, g)
        found = _attended(*(t.to(device, dtype, copy=True) for t in (q, k, v, g)))
        errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
        return within(errors, WORST[dtype], f"attention in {_name(dtype)}")

    return attempt(work)


def _attended(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> list[Tensor]:
    """Causal attention, and the gradients of q, k and v for the gradient g of it."""
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=True)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def try_fused_adamw(device: torch.device) -> Tried:
    """Three updates of the fused AdamW, which training uses, against the plain one on the CPU."""

    def work() -> Tried:
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(256, 64, generator=draw)
        mine, there = nn.Parameter(start.clone()), nn.Parameter(start.to(device, copy=True))
        plain = torch.optim.AdamW([mine], lr=0.1, foreach=False, fused=False)
        fused = torch.optim.AdamW([there], lr=0.1, fused=True)
        for _ in range(3):
            gradient = torch.randn(256, 64, generator=draw)
            mine.grad, there.grad = gradient, gradient.to(device)
            plain.step()
            fused.step()
        return within([relative(there.detach().cpu() - start, mine.detach() - start)], 1e-4, "an update")

    return attempt(work)


def best_format(device: torch.device) -> str:
    """The format in which to compute there: bf16, else fp16, where it works and is native; else fp32. CPU: fp32.

    torch emulates bf16 on devices that do not have it; the numbers are right and the products slow, so they are timed.
    """
    if device.type == "cpu":
        return "fp32"
    works = [name for name in FORMATS if try_format(device, FORMATS[name]).works]
    if works in ([], ["fp32"]):
        return "fp32"
    seconds = {name: product_seconds(device, FORMATS[name]) for name in works}
    for name in ("bf16", "fp16"):
        others = [s for other, s in seconds.items() if other != name]
        if name in works and (not others or seconds[name] * NATIVE <= min(others)):
            return name
    return "fp32"


@functools.cache
def product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a product of two square matrices of PRODUCT rows; a quarter as many on a CPU. Remembered."""
    size = PRODUCT // 4 if device.type == "cpu" else PRODUCT
    a = torch.randn(size, size, device=device, dtype=dtype)
    with torch.inference_mode():
        return best_time(lambda: a @ a, device, 0.05)


def _name(dtype: torch.dtype) -> str:
    return next((name for name, known in FORMATS.items() if known == dtype), str(dtype))
