"""Compilation of decoder layers by torch.compile. Knows modules and devices; of trees only the backends' names.

Each kind of layer is compiled once and serves all layers of its kind ("regional" compilation): the time it takes does
not grow with depth. Attention stays outside of the graphs: its backends look at a row's shape, which would be compiled
anew for each row, and the kernels that gain from a compiler are compiled by themselves.
"""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from graft.errors import ConfigError
from graft.model.attention.segments import BACKENDS

Setting = Literal["auto"] | bool

MOST_VERSIONS = 64
"""Compiled versions of one kind of layer: row lengths, times training or not, times windows or not."""


def wants_compile(setting: Setting, device: torch.device) -> bool:
    """Whether a run compiles its layers. `auto` does not: on two CPU cores it brought 1 %, other devices are not yet
    measured.

    Raises:
        ConfigError: it is asked for where it cannot be done.
    """
    if setting is not True:
        return False
    missing = _missing(device)
    if missing is not None:
        raise ConfigError(f"compile=true cannot be done: {missing}; use compile=auto")
    return True


def _missing(device: torch.device) -> str | None:
    """What the compiler lacks here; None if nothing."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"there is no C++ compiler {compiler!r}"
    if device.type not in {"cuda", "xpu"}:
        return f"torch's compiler does not serve {device.type} devices"
    return None if find_spec("triton") else "triton is not installed"


def compiler_cache() -> Path:
    """Where compiled code is kept for later runs: in $GRAFT_CACHE, else in the user's cache folder."""
    if "GRAFT_CACHE" in os.environ:
        return Path(os.environ["GRAFT_CACHE"]) / "compiled"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graft" / "compiled"


def keep_compiled() -> None:
    """Let the compiler keep its work beyond this process, and the next reboot; a user's own folder for it stands."""
    chosen = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    # Torch writes its default there when it is first asked for the folder, which some library does on import.
    if not chosen or chosen.startswith(str(Path(tempfile.gettempdir()) / "torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiler_cache())


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Compile the decoder layers of a model of transformers; returns how many.

    A layer in which a module's forward was replaced (the last one, of which only predictors are computed) is left as it
    is: every one would be compiled by itself.
    """
    keep_compiled()
    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    _keep_attention_outside()
    compiled: dict[type, Callable[..., Any]] = {}
    done = 0
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        if any("forward" in module.__dict__ for module in layer.modules()):
            continue
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = torch.compile(inspect.unwrap(kind.forward), dynamic=False, backend=backend)
        layer.forward = MethodType(_forward(compiled[kind], wrapped=hasattr(kind.forward, "__wrapped__")), layer)
        done += 1
    return done


def _forward(compute: Callable[..., Any], wrapped: bool) -> Callable[..., Any]:
    """A layer's forward. With `wrapped`, that of its class does the checkpointing, which is done here in its stead:

    around the compiled function, since the compiler does not look into a checkpointed one that it cannot take whole.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if wrapped and self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(compute, self, **kwargs), *args)
        return compute(self, *args, **kwargs)

    return forward


def _keep_attention_outside() -> None:
    known = AttentionInterface()
    for name in BACKENDS:
        AttentionInterface.register(name, torch.compiler.disable(known[name]))
