"""Which device, which number format, how much memory. Knows torch; nothing of models' architectures.

Devices are reached through `torch.accelerator`: CUDA and ROCm (both called `cuda`), Intel's XPU, Apple's MPS, and
whatever a plug-in registers when torch is imported, as `torch_npu` does for Ascend. What a device can do is tried
(`model/probe_device.py`), not looked up.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn

from graft.console import warn_once
from graft.errors import ConfigError, first_line
from graft.model.probe_device import FORMATS, best_format, try_format

DRIVERS = {
    "/dev/nvidiactl": ("an NVIDIA GPU", "a build of torch for CUDA"),
    "/dev/kfd": ("an AMD GPU", "a build of torch for ROCm"),
    "/dev/davinci_manager": ("an Ascend NPU", "torch_npu beside torch"),
}
"""Files that a driver makes, what they show, and what torch needs to use it."""
PLUGINS = {"npu": "torch_npu"}
"""Devices that torch knows by a package of their makers."""
CONTROL_GROUP = Path("/sys/fs/cgroup")

KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables that bound what oneDNN, and torch's layer above it, keep of the kernels that they make for each shape."""
KEPT_KERNELS = 32
"""Every row has a length of its own, so kernels of earlier rows are hardly ever wanted again, and each takes 0.3 MiB in
both caches; by default 1,024 are kept. One row's layers want about 18 of them, a phase of the step six at a time."""
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
    """The device of that name, once it has computed something; `auto` is the accelerator, the CPU where there is none.

    An accelerator that is there and does not work is an error: nothing is moved to the CPU unasked.

    Raises:
        ConfigError: the device is unknown, not there, or does not compute.
    """
    # Read by torch at CUDA's first allocation: rows of changing length leave holes between blocks of fixed size.
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # its name before torch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for cache in KERNEL_CACHES:  # read at the first product that oneDNN computes
        os.environ.setdefault(cache, str(KEPT_KERNELS))
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            for unused in unused_devices():
                warn_once(f"device=auto takes the CPU: {unused}")
            return torch.device("cpu")
        wanted = accelerator.type
    else:
        wanted = name
    try:
        tried = torch.ones(2, device=wanted)
        if float((tried + tried).sum()) != 4.0:  # reading it waits for the device; `meta` has nothing to read
            raise RuntimeError("it computes 1 + 1 + 1 + 1 wrongly")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = _first_sentence(error)
        if "device type at start" in str(error):  # torch goes on with all names that it knows
            plugin = PLUGINS.get(wanted.partition(":")[0])
            reason = f"torch knows it once {plugin} is installed" if plugin else "torch knows no such device"
        instead = "device=cpu" if name == "auto" else "device=auto or device=cpu"
        raise ConfigError(f"device {wanted!r} cannot be used here ({reason}); try {instead}") from None
    return tried.device


def _first_sentence(error: BaseException) -> str:
    """torch lists, after what is wrong, every backend that it has."""
    sentence = first_line(error).partition(". ")[0]
    return sentence if len(sentence) <= 160 else f"{sentence[:160]} ..."


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, as far as torch tells; of a CPU its kind."""
    if device.type == "cpu":
        return _cpu_name()
    if device.type == "mps":
        return f"Apple {platform.machine()}"
    return str(own_module(device).get_device_name(device))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def unused_devices() -> list[str]:
    """Devices whose driver is there but which this torch does not see, each with what is missing, as a sentence."""
    if torch.accelerator.is_available():
        return []
    return [
        f"the driver of {what} is there, but torch {torch.__version__} does not see it; install {needs}"
        for file, (what, needs) in DRIVERS.items()
        if Path(file).exists()
    ]


def refuse_elsewhere(model: nn.Module, device: torch.device) -> None:
    """See to it that all of a model is where it was asked for: work on another device would only be slow, silently.

    Raises:
        ConfigError: names the first parameter or buffer that is elsewhere.
    """
    index: int | None = device.index
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        its = tensor.device
        if its.type != device.type or (index is not None and its.index != index):
            raise ConfigError(
                f"device {device}: the model's {name} is on {its} after loading; `graft doctor --device {device}` says "
                "what works there"
            )


def pick_precision(name: str, device: torch.device) -> Precision:
    """The formats for a wanted precision, tried on the device; `auto` asks the device which is best.

    Raises:
        ConfigError: the precision is not known, or the device computes wrong numbers or none in it.
    """
    if name == "auto":
        name = best_format(device)
    if name not in FORMATS:
        raise ConfigError(f"precision {name!r} is not known; use auto, {', '.join(FORMATS)}")
    compute = FORMATS[name]
    tried = try_format(device, compute)
    if not tried.works:
        others = [other for other, dtype in FORMATS.items() if other != name and try_format(device, dtype).works]
        instead = f"use precision={' or '.join(others)}" if others else "use device=cpu"
        raise ConfigError(f"precision {name} does not work on {device}: {tried.why}; {instead}")
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
    reset_peak_memory(device)


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
    """Peak memory of the process so far: allocated on an accelerator, resident on the CPU.

    MPS keeps no peak: there it is what the driver has given so far, which only `empty_cache` lowers.
    """
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if device.type != "cpu":
        return int(_accounts(device).max_memory_allocated(device)) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, whose ru_maxrss still has the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    per_unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * per_unit / 2**30


def reset_peak_memory(device: torch.device) -> None:
    """Let `memory_gib` begin anew on an accelerator; a process and MPS cannot forget theirs."""
    if device.type not in ("cpu", "mps"):
        _accounts(device).reset_peak_memory_stats(device)


def _accounts(device: torch.device) -> Any:
    """Where torch keeps an accelerator's memory accounts: one place for all from 2.9 on, each device's own before."""
    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else own_module(device)


def own_module(device: torch.device) -> Any:
    """The device's module, such as `torch.cuda` or `torch.npu`, for what `torch.accelerator` does not offer."""
    return torch.get_device_module(device)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: on an accelerator what is free or only reserved, else what the machine has left.

    In a container it is what the container may still take. MPS shares the machine's memory, up to a limit of its own.
    """
    if device.type not in ("cpu", "mps"):
        accounts = _accounts(device)
        free, _ = own_module(device).mem_get_info(device)
        return int(free + accounts.memory_reserved(device) - accounts.memory_allocated(device))
    if device.type == "mps":
        limit = torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
        return max(0, min(int(limit), _free_in_machine()))
    return _free_in_machine()


def total_bytes(device: torch.device) -> int:
    """Memory of a device; of the machine, or of the container that the process is in, for those without their own."""
    if device.type not in ("cpu", "mps"):
        return int(own_module(device).mem_get_info(device)[1])
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CONTROL_GROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return total


def _free_in_machine() -> int:
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CONTROL_GROUP / "memory.max").read_text())
        used = int((CONTROL_GROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())[
            "inactive_file"
        ]
    except (OSError, ValueError, KeyError):  # no control group, or no limit ("max")
        return free
    return max(0, min(free, limit - used + int(cached)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that memory ran out; the CPU's allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )
