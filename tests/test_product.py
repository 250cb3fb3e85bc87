"""Products by oneDNN are torch's own."""

import subprocess
import sys

import pytest
import torch

from graft.model.fused import product
from graft.model.fused.product import FEWEST_ROWS, times, times_transposed


@pytest.fixture
def by_onednn(monkeypatch):
    """As on a processor for which it is chosen; returns the operations that were called."""
    called = []
    own = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        called.append(args[0].shape)
        return own(*args)

    monkeypatch.setattr(product, "on_amd", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return called


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="NOT TESTED: torch without oneDNN")
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_double_precision(by_onednn, bias):
    generator = torch.Generator().manual_seed(0)
    x, grad, weight = (torch.randn(n, m, generator=generator) for n, m in ((300, 130), (300, 90), (90, 130)))
    b = torch.randn(90, generator=generator) if bias else None
    wanted = x.double() @ weight.double().T + (0 if b is None else b.double())
    assert float((times(x, weight, b) - wanted).norm() / wanted.norm()) < 1e-6
    pulled = grad.double() @ weight.double()
    assert float((times_transposed(grad, weight) - pulled).norm() / pulled.norm()) < 1e-6
    assert len(by_onednn) == 2


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="NOT TESTED: torch without oneDNN")
def test_few_rows_and_other_formats_are_left_to_torch(by_onednn):
    few, many = torch.randn(FEWEST_ROWS - 1, 80), torch.randn(100, 80)
    weight = torch.randn(70, 80)
    for x, w in (
        (few, weight),
        (many, weight[:16]),
        (many.double(), weight.double()),
        (many.bfloat16(), weight.bfloat16()),
    ):
        torch.testing.assert_close(times(x, w), x @ w.T)
    assert not by_onednn


def test_elsewhere_than_on_amd_it_is_torchs(monkeypatch):
    monkeypatch.setattr(product, "on_amd", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    x, weight = torch.randn(100, 80), torch.randn(70, 80)
    assert torch.equal(times(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.equal(times_transposed(x, weight.T), x @ weight.T)


OF_MANY_SHAPES = """
import ctypes
import torch
from graft.model.device import pick_device

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h hblkhd u f uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
pick_device("cpu")
torch.set_num_threads(1)
weight = torch.randn(128, 128)
for rows in range(100, 400):
    torch.ops.mkldnn._linear_pointwise(torch.empty(rows, 128), weight, None, "none", [], "")
    if rows in (150, 399):
        print(library.mallinfo2().uordblks)
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="NOT TESTED: torch without oneDNN")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NOT TESTED: not glibc's heap")
def test_kernels_for_rows_of_many_lengths_are_not_all_kept():
    done = subprocess.run([sys.executable, "-c", OF_MANY_SHAPES], capture_output=True, text=True, check=True)
    after_some, after_all = map(int, done.stdout.split())
    assert after_all - after_some < 8 * 2**20  # without the bound it was 138 MiB
