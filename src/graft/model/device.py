"""Which device, which number format. Knows torch; nothing of models."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import Tensor

from graft.errors import ConfigError

SMALLEST_MAPPING = 2**22
"""Bytes from which on a passing tensor on the CPU is mapped on its own: its pages are faulted in anew each time."""


@dataclass(frozen=True, slots=True)
class Precision:
    """In what format numbers are kept and computed."""

    frozen: torch.dtype
    """Format of weights that are not trained."""
    trained: torch.dtype
    """Format of weights that are trained: fp32, since small updates round to nothing in 16 bits, unless by chance."""
    compute: torch.dtype
    """Format of matrix products."""

    @property
    def scaled(self) -> bool:
        """Whether gradients need a loss scaler: fp16 has no range for small ones."""
        return self.compute == torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context that computes in `compute`."""
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def pick_device(name: str) -> torch.device:
    """`auto` is the accelerator that is there, else the CPU.

    Raises:
        ConfigError: the device is unknown or not there.
    """
    # Read by torch at CUDA's first allocation: rows of changing length leave holes between blocks of fixed size.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name before torch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here ({reason}); try device=auto or device=cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """The formats for a wanted precision; `auto` asks the device.

    Raises:
        ConfigError: the precision is not known.
    """
    if name == "auto":
        name = "fp32"
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in formats:
        raise ConfigError(f"precision {name!r} is not known; use auto, {', '.join(formats)}")
    compute = formats[name]
    return Precision(frozen=compute, trained=torch.float32, compute=compute)


def prepare_device(device: torch.device) -> None:
    """Set what a training process on this kind of device wants, before anything large is allocated there.

    CUDA: no TF32, whose 10 bits of mantissa would round the positions that rotary embeddings multiply in fp32; matrix
    products that may be short are in 16 bits already. CPU: see `keep_freed_memory`.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on a device. To CUDA it goes through pinned memory, so that the host need not wait."""
    if device.type != "cuda":
        return torch.as_tensor(array, device=device)
    return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)


def keep_freed_memory() -> None:
    """Let glibc keep what the CPU's tensors free, instead of giving it back and faulting it in again at every step.

    Blocks over 128 KiB are otherwise mapped anew for each tensor, and the kernel clears every page of them. Does
    nothing where the C library is another.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):  # the numbers are those of glibc's malloc.h
        library.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        library.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
        library.mallopt(-2, 2**26)  # M_TOP_PAD: grow by 64 MiB at a time


def scratch(rows: int, columns: int, like: Tensor) -> Tensor:
    """[rows, columns] of fp32 without values, on the device of `like`, for a short while.

    On the CPU a large one is a mapping of its own, which is given back at once. In the heap, which keeps what is freed
    (`keep_freed_memory`), small tensors would settle in its hole, so that the next one does not fit there any more and
    the heap grows by as much again.
    """
    size = 4 * rows * columns
    real = like.device.type == "cpu" and type(like) is Tensor  # no fake one, which is only counted
    if not real or size < SMALLEST_MAPPING or not sys.platform.startswith("linux"):
        return torch.empty(rows, columns, dtype=torch.float32, device=like.device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)  # a fault for 2 MiB, not for 4 KiB
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def memory_gib(device: torch.device) -> float:
    """Peak memory of the process so far: allocated on an accelerator, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose ru_maxrss still has the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    per_unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * per_unit / 2**30


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: on CUDA what is free or only reserved, else what the machine has available.

    In a container it is what the container may still take. For accelerators other than CUDA that have a memory of
    their own this is a guess.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return free
    return max(0, min(free, limit - used + int(cached)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
