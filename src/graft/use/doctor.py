"""What this machine can do for graft, found out by trying; what a report of a bug needs, and nothing about the user.

No socket is opened: whether a hub can be reached is not asked.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from graft.errors import ConfigError, first_line
from graft.model.attention.pick import pick_attention
from graft.model.device import (
    device_name,
    free_bytes,
    own_module,
    pick_device,
    prepare_device,
    total_bytes,
    unused_devices,
)
from graft.model.files.quantize import KINDS, check_quantize, error_of_a_product
from graft.model.fused.compile import wants_compile
from graft.model.probe_device import (
    FORMATS,
    PRODUCT,
    Tried,
    attempt,
    best_format,
    product_seconds,
    try_attention,
    try_format,
    try_fused_adamw,
    within,
)
from graft.private import HIDDEN, hide_user, is_secret_name
from graft.use.parity import reference, try_backend, try_training
from graft.version import __version__

PACKAGES = (
    "torch", "transformers", "peft", "tokenizers", "accelerate", "safetensors", "huggingface-hub", "numpy", "pyarrow",
    "jinja2", "pydantic", "triton", "torch_npu",
)  # fmt: skip
EXTRAS = {
    "quant": ("bitsandbytes", "torchao"),
    "tuning": ("apollo_torch", "galore_torch", "lion_pytorch", "schedulefree"),
    "liger": ("liger_kernel",),
    "hub": ("datasets",),
    "vllm": ("vllm",),
}
"""Graft's optional sets of packages, by the modules that they bring."""
HEAVY = {"vllm"}
"""Modules that take a GPU or half a minute when they are imported: only looked for."""
ENVIRONMENT = (
    "GRAFT_CACHE", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT",
    "HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT",
    "TOKENIZERS_PARALLELISM", "MALLOC_ARENA_MAX", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION", "ASCEND_RT_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_NPU_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK", "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "TORCHINDUCTOR_CACHE_DIR",
    "TORCH_COMPILE_DISABLE", "NO_COLOR", "PYTHONHASHSEED", "PYTHONOPTIMIZE",
)  # fmt: skip
"""Variables that change what graft and the libraries below it do."""
BACKENDS = ("segments", "flex", "varlen", "dense")
LEAST_SHARED = 64 << 20
"""Bytes of shared memory below which the workers of other programs fail, as in containers with Docker's default."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried on a device."""

    what: str
    needed: bool
    """Whether training in the device's best format needs it."""
    tried: Tried

    def as_json(self) -> dict[str, Any]:
        """Without the words for what went well."""
        return {"what": self.what, "needed": self.needed, **asdict(self.tried)}


@dataclass(slots=True)
class Device:
    """What one device is and can do."""

    name: str
    maker: str
    memory: int
    """Bytes."""
    free: int
    """Bytes that can still be had."""
    precision: str
    """What `precision: auto` is there."""
    capability: str = ""
    """CUDA's compute capability."""
    products: dict[str, float] = field(default_factory=dict)
    """Floating-point operations per second of a matrix product, by format."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def trains(self) -> bool:
        """Whether everything that training needs works."""
        return all(finding.tried.works for finding in self.findings if finding.needed)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name, "maker": self.maker, "capability": self.capability or None, "memory_bytes": self.memory,
            "free_bytes": self.free, "precision_auto": self.precision, "flops": self.products, "trains": self.trains,
            "findings": [finding.as_json() for finding in self.findings],
        }  # fmt: skip


@dataclass(slots=True)
class Report:
    """What `graft doctor` found."""

    asked: str
    versions: dict[str, str | None]
    extras: dict[str, str]
    """Name of the extra: `installed`, or what is missing or broken."""
    system: dict[str, Any]
    environment: dict[str, str]
    devices: list[Device]
    problems: list[str]
    """Why the asked device cannot train, as sentences; empty when all is well."""
    hints: list[str]
    """What would be better otherwise."""

    @property
    def well(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "asked": self.asked, "well": self.well, "problems": self.problems, "hints": self.hints,
            "versions": self.versions, "extras": self.extras, "system": self.system, "environment": self.environment,
            "devices": [device.as_json() for device in self.devices],
        }  # fmt: skip


def examine(asked: str, environment: Mapping[str, str], say: Callable[[str], None]) -> Report:
    """Try everything on the asked device; with `auto` on the CPU and on every accelerator.

    `environment` is that in which graft was started; `say` is told what goes on.

    A device that is not there is a problem of the report, not an error.
    """
    problems, devices = [], []
    try:
        main = pick_device(asked)
        names = [str(main)] if asked != "auto" else _all_devices()
    except ConfigError as error:
        names = ["cpu"] if asked == "auto" else []
        problems.append(hide_user(str(error)))
        main = torch.device("cpu")
    wanted = reference() if names else []
    for name in names:
        say(f"trying {name}")
        try:
            devices.append(_examine(pick_device(name), wanted))
        except ConfigError as error:  # another one than the asked: it was there a moment ago
            problems.append(hide_user(str(error)))
    for device in devices:
        if device.name == str(main) and not device.trains and not problems:
            broken = next(f for f in device.findings if f.needed and not f.tried.works)
            problems.append(f"{device.name} cannot train: {broken.what}: {broken.tried.why}")
    system = _system()
    return Report(
        asked, _versions(), {name: _extra(modules) for name, modules in EXTRAS.items()}, system,
        _environment(environment),
        devices, problems, [*unused_devices(), *_hints(system, environment, devices)],
    )  # fmt: skip


def _all_devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]


def _examine(device: torch.device, wanted: list[float]) -> Device:
    prepare_device(device)
    best = best_format(device)
    found = Device(str(device), hide_user(device_name(device)), total_bytes(device), free_bytes(device), best)
    if device.type == "cuda":
        found.capability = ".".join(map(str, own_module(device).get_device_capability(device)))

    def add(what: str, needed: bool, tried: Tried) -> None:
        why = hide_user(tried.why)
        found.findings.append(Finding(what, needed, Tried(tried.works, tried.error, why)))

    for name, dtype in FORMATS.items():
        tried = try_format(device, dtype)
        add(f"product and gradient, {name}", name in ("fp32", best), tried)
        if tried.works:
            size = PRODUCT // 4 if device.type == "cpu" else PRODUCT
            found.products[name] = 2.0 * size**3 / product_seconds(device, dtype)
            add(f"attention and gradient, {name}", name in ("fp32", best), try_attention(device, dtype))
    add("fused AdamW", True, try_fused_adamw(device))
    for kind in KINDS:
        add(f"quantize={kind}", False, _try_quantised(kind, device, FORMATS[best]))
    for setting in BACKENDS:
        add(f"attention={setting}", setting == "segments", _try_setting(setting, device, best))
    for name in FORMATS:
        if try_format(device, FORMATS[name]).works:
            what = f"20 steps as on the CPU, {name}" if device.type != "cpu" else f"20 steps as one by one, {name}"
            add(what, name in ("fp32", best), try_training(device, name, wanted))
    add("compiler for compile=true", False, attempt(lambda: _try_compiler(device)))
    return found


def _try_quantised(kind: str, device: torch.device, dtype: torch.dtype) -> Tried:
    try:
        check_quantize(kind, device, dtype)
    except ConfigError as error:
        return Tried(False, None, _clause(error, f"quantize: {kind} "))
    return within([error_of_a_product(kind, device, dtype)], KINDS[kind].worst, "a product")


def _try_setting(setting: Any, device: torch.device, precision: str) -> Tried:
    """An attention backend by itself, without what stands in for it where it cannot."""
    try:
        pick_attention(setting, device)
    except ConfigError as error:
        return Tried(False, None, _clause(error, f"attention={setting} "))
    if setting in ("flex", "varlen"):
        import_module(f"graft.model.attention_{setting}")  # makes the backend known, and loads torch's compiler
    return try_backend(device, precision, f"graft_{setting}", branches=setting != "varlen")


def _try_compiler(device: torch.device) -> Tried:
    try:
        wants_compile(True, device)
    except ConfigError as error:
        return Tried(False, None, _clause(error, "compile=true "))
    return Tried(True)


def _clause(error: Exception, prefix: str) -> str:
    return first_line(error).removeprefix(prefix).removeprefix("cannot be used: ")


def _versions() -> dict[str, str | None]:
    """Of graft, Python and the libraries; None is not installed."""
    found: dict[str, str | None] = {"graft": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    made = torch.version
    found["torch built for"] = (
        f"CUDA {made.cuda}"
        if made.cuda
        else f"ROCm {made.hip}"
        if made.hip
        else f"XPU {made.xpu}"
        if made.xpu
        else "CPU"
    )
    return found


def _extra(modules: tuple[str, ...]) -> str:
    """`installed` where every module can be imported; else what is missing, or how it breaks."""
    wrong = []
    for module in modules:
        try:
            if module not in HEAVY:
                import_module(module)
            elif find_spec(module) is None:
                raise ModuleNotFoundError(name=module)
        except ModuleNotFoundError as error:
            missing = error.name == module
            wrong.append(f"{module} is not installed" if missing else f"{module} breaks ({first_line(error)})")
        except Exception as error:  # a library of compiled code may fail in any way on a machine it was not made for
            wrong.append(f"{module} breaks ({type(error).__name__}: {first_line(error)})")
    return hide_user("; ".join(wrong)) or "installed"


def _system() -> dict[str, Any]:
    cpu = torch.device("cpu")
    shared = Path("/dev/shm")  # noqa: S108  # it is only measured
    runs = Path("runs") if Path("runs").is_dir() else Path()
    threads = os.sched_getaffinity(0) if sys.platform.startswith("linux") else range(os.cpu_count() or 1)
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cores_usable": len(threads),
        "threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": total_bytes(cpu),
        "memory_free_bytes": free_bytes(cpu),
        "shared_memory_bytes": shutil.disk_usage(shared).total if shared.is_dir() else None,
        "disk_free_bytes": shutil.disk_usage(runs).free,
    }


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that are set; of secrets and proxies only that they are."""
    found = {name: environment[name] for name in ENVIRONMENT if name in environment}
    secret = {name for name in found if is_secret_name(name) or name.endswith("_PROXY")}
    return {name: HIDDEN if name in secret else hide_user(value) for name, value in found.items()}


def _hints(system: dict[str, Any], environment: Mapping[str, str], devices: list[Device]) -> list[str]:
    found = []
    shared = system["shared_memory_bytes"]
    if shared is not None and shared <= LEAST_SHARED:
        found.append(
            f"shared memory is {shared >> 20} MiB, Docker's default; graft does without, but vLLM and NCCL do not: "
            "start the container with --shm-size=1g or --ipc=host"
        )
    if system["threads"] * 4 <= system["cores_usable"]:
        found.append(f"torch uses {system['threads']} of {system['cores_usable']} usable cores; set OMP_NUM_THREADS")
    if system["threads"] > system["cores_usable"]:
        found.append(
            f"torch uses {system['threads']} threads on {system['cores_usable']} usable cores, which slows it down; "
            f"set OMP_NUM_THREADS={system['cores_usable']}"
        )
    if environment.get("CUDA_LAUNCH_BLOCKING") == "1":
        found.append(
            "CUDA_LAUNCH_BLOCKING=1 makes the host wait for every kernel; unset it when nothing is searched for"
        )
    for device in devices:
        if device.free < 0.5 * device.memory and device.name != "cpu":
            found.append(f"more than half of the memory of {device.name} is in use by other processes")
    return found
