"""What the run ran on, so that a result can be traced to its versions, device, code and data."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from graft.model.device import device_name
from graft.version import __version__

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "accelerate")


def describe_environment(device: torch.device, made_of: dict[str, str]) -> dict[str, Any]:
    """Versions, device, git commit of the working folder, and the hashes of what the run is made of."""
    return {
        "graft": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": device_label(device),
        "threads": torch.get_num_threads(),
        "git": _git_commit(),
        "made_of": made_of,
    }


def package_version(package: str) -> str | None:
    """Version of an installed package; None where it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_label(device: torch.device) -> str:
    """The device with what it is called by its maker."""
    return f"{device} ({device_name(device)})"


def _git_commit() -> str | None:
    """Commit of the working folder, where it is a git checkout and git is installed."""
    try:
        said = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None
