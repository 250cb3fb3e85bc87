"""Devices and formats: what is tried, refused and sent. Most of it shows on a GPU alone, so some devices are fakes."""

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graft import console
from graft.errors import ConfigError
from graft.model import device as device_module
from graft.model import probe_device
from graft.model.device import (
    free_bytes,
    memory_gib,
    pick_device,
    pick_precision,
    prepare_device,
    refuse_elsewhere,
    reset_peak_memory,
    scratch,
    send,
    total_bytes,
    unused_devices,
)
from graft.model.files.load import to_device
from graft.model.memory.machine import resident
from graft.model.probe_device import FORMATS, Tried, best_format, try_attention, try_format, try_fused_adamw, within

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def nothing_remembered():
    """What was tried in another test, or with a fake, is forgotten."""
    for remembered in (probe_device.try_format, probe_device.product_seconds):
        remembered.cache_clear()
    yield
    for remembered in (try_format, probe_device.product_seconds):
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()


def test_arrays_arrive_as_they_are():
    array = np.arange(7, dtype=np.int32)
    assert np.array_equal(send(array, CPU).numpy(), array)


def test_cudas_memory_grows_in_segments_unless_the_user_chose(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    for own, wanted in (("", "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", own)
        if not own:
            monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        pick_device("cpu")
        assert os.environ["PYTORCH_ALLOC_CONF"] == wanted


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is mapped the Linux way")
def test_memory_for_a_short_while_is_given_back_at_once_though_the_heap_keeps_what_is_freed():
    prepare_device(torch.device("cpu"))
    size = 2**26
    before = resident()
    made = scratch(2**12, 2**12, torch.zeros(1)).fill_(1.5)
    view = made[3:5]
    del made
    assert view.sum() == 1.5 * 2**13
    assert resident() - before > 0.9 * size
    del view
    assert resident() - before < 0.1 * size
    kept = torch.ones(2**12, 2**12)
    with_it = resident()
    del kept
    assert with_it - resident() < 0.1 * size, "the heap gives back nothing"


def test_memory_of_a_model_that_is_only_counted_is_not_there():
    with FakeTensorMode():
        made = scratch(2**15, 2**15, torch.zeros(1))
    assert tuple(made.shape) == (2**15, 2**15)
    assert type(made).__name__ == "FakeTensor"


@pytest.mark.gpu
def test_a_gpu_is_prepared_and_arrays_are_sent_there():
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: no CUDA device")
    device = torch.device("cuda")
    prepare_device(device)
    assert torch.get_float32_matmul_precision() == "highest"
    array = np.arange(10**6, dtype=np.int32)
    assert np.array_equal(send(array, device).cpu().numpy(), array)
    assert memory_gib(device) * 2**30 >= array.nbytes


@pytest.mark.parametrize(
    ("name", "said"),
    [("npu", "torch_npu"), ("gpu", "no such device"), ("meta", "meta tensors"), ("cpux", "no such device")],
)
def test_a_device_that_does_not_compute_is_refused_in_a_line(name, said):
    with pytest.raises(ConfigError, match=said) as refused:
        pick_device(name)
    assert name in str(refused.value)
    assert "device=cpu" in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_accelerator_that_is_there_and_broken_is_an_error_not_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"'cuda' cannot be used here .* try device=cpu"):
        pick_device("auto")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_auto_says_when_a_driver_is_there_that_torch_does_not_see(monkeypatch, tmp_path, capsys):
    (tmp_path / "nvidiactl").touch()
    drivers = {
        str(tmp_path / "nvidiactl"): ("an NVIDIA GPU", "a build for CUDA"),
        str(tmp_path / "kfd"): ("AMD", "ROCm"),
    }
    monkeypatch.setattr(device_module, "DRIVERS", drivers)
    monkeypatch.setattr(console, "_warned", set())
    assert pick_device("auto") == CPU
    assert "an NVIDIA GPU is there" in capsys.readouterr().err
    assert len(unused_devices()) == 1


class Stubborn(nn.Module):
    """Stays where it is, whatever it is told."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def _apply(self, fn, recurse=True):
        return self


def test_a_model_that_does_not_come_to_the_device_ends_the_run():
    with pytest.raises(ConfigError, match=r"device meta: the model's inner.weight is on cpu .*doctor --device meta"):
        to_device(Stubborn(), torch.device("meta"))
    model = nn.Linear(2, 2)
    to_device(model, torch.device("meta"))
    refuse_elsewhere(model, torch.device("meta"))
    with pytest.raises(ConfigError, match="weight is on meta"):
        refuse_elsewhere(model, CPU)
    model = nn.Linear(2, 2)
    model.register_buffer("positions", torch.ones(2, device="meta"))
    with pytest.raises(ConfigError, match="positions is on meta"):
        refuse_elsewhere(model, CPU)


@pytest.mark.parametrize("name", FORMATS)
def test_the_cpu_computes_in_every_format(name):
    tried = try_format(CPU, FORMATS[name])
    assert tried.works, tried
    assert (tried.error == 0) == (name == "fp32")  # an error of 16 bits shows that something was computed in them
    assert try_attention(CPU, FORMATS[name]).works
    assert pick_precision(name, CPU).compute == FORMATS[name]


def test_updates_are_compared():
    assert try_fused_adamw(CPU).works


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_that_is_a_little_wrong_is_noticed(monkeypatch, name):
    right = F.linear
    off = {"fp32": 1 + 1e-3, "bf16": 1.05, "fp16": 1.02}[name]
    monkeypatch.setattr(F, "linear", lambda x, w: right(x, w * off))
    tried = try_format(CPU, FORMATS[name])
    assert not tried.works
    assert "off by" in tried.why
    with pytest.raises(
        ConfigError, match=f"precision {name} does not work on cpu: a product in {name} is off by .*; use "
    ):
        pick_precision(name, CPU)


def test_a_gradient_that_is_wrong_is_noticed(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x @ w.T

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g @ w, 1.01 * g.T @ x

    monkeypatch.setattr(F, "linear", Wrong.apply)
    assert not try_format(CPU, torch.float32).works


def test_autocast_and_scaler_without_effect_are_no_silent_fp32(monkeypatch):
    with monkeypatch.context() as fake:
        fake.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        assert "autocast has no effect" in try_format(CPU, torch.bfloat16).why
        with pytest.raises(ConfigError, match="use precision=fp32"):
            pick_precision("bf16", CPU)
    try_format.cache_clear()
    real = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, **named: real(kind, **named | {"enabled": False}))
    assert "no loss scaler" in try_format(CPU, torch.float16).why


def test_nan_is_no_small_error():
    assert not within([0.0, float("nan")], 1.0, "it").works
    assert within([0.0, 0.5], 1.0, "it") == Tried(True, 0.5)


@pytest.mark.parametrize(
    ("works", "seconds", "wanted"),
    [
        ("fp32 bf16 fp16", {"fp32": 16, "bf16": 1, "fp16": 1}, "bf16"),  # A100
        ("fp32 bf16 fp16", {"fp32": 8, "bf16": 9, "fp16": 1}, "fp16"),  # V100, T4: bf16 is emulated
        ("fp32 fp16", {"fp32": 2, "fp16": 1}, "fp16"),  # a kernel for bf16 is missing
        ("fp32 bf16", {"fp32": 2, "bf16": 1}, "bf16"),  # no loss scaler
        ("fp32 bf16", {"fp32": 1, "bf16": 4}, "fp32"),
        ("fp32", {"fp32": 1}, "fp32"),
    ],
)
def test_auto_takes_the_format_that_works_and_is_not_emulated(monkeypatch, works, seconds, wanted):
    def tried(_device, dtype):
        return Tried(next(name for name, known in FORMATS.items() if known == dtype) in works.split())

    for module in (probe_device, device_module):
        monkeypatch.setattr(module, "try_format", tried)
    by_dtype = {FORMATS[name]: float(value) for name, value in seconds.items()}
    monkeypatch.setattr(probe_device, "product_seconds", lambda _device, dtype: by_dtype[dtype])
    assert best_format(GPU) == wanted
    assert pick_precision("auto", GPU).compute == FORMATS[wanted]
    assert pick_precision("auto", CPU).compute == torch.float32
    missing = set(FORMATS) - set(works.split())
    for name in missing:
        with pytest.raises(ConfigError, match=f"precision {name} does not work on cuda:0"):
            pick_precision(name, GPU)


def test_an_accelerators_memory_is_what_torch_accounts_for_it(monkeypatch):
    reset = []
    accounts = SimpleNamespace(
        max_memory_allocated=lambda _: 3 << 30, memory_reserved=lambda _: 5 << 20, memory_allocated=lambda _: 2 << 20,
        reset_peak_memory_stats=reset.append,
    )  # fmt: skip
    monkeypatch.setattr(device_module, "_accounts", lambda _: accounts)
    monkeypatch.setattr(
        device_module, "own_module", lambda _: SimpleNamespace(mem_get_info=lambda _: (7 << 20, 1 << 40))
    )
    device = torch.device("xpu:0")
    assert memory_gib(device) == 3.0
    assert free_bytes(device) == (7 + 5 - 2) << 20
    assert total_bytes(device) == 1 << 40
    reset_peak_memory(device)
    assert reset == [device]
    reset_peak_memory(CPU)
    assert reset == [device]


def test_memory_of_a_container_is_its_limit(monkeypatch, tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 50\n")
    monkeypatch.setattr(device_module, "CONTROL_GROUP", tmp_path)
    assert (free_bytes(CPU), total_bytes(CPU)) == (350, 1000)
    (tmp_path / "memory.max").write_text("max\n")
    assert total_bytes(CPU) > 1 << 28
