"""What is set and sent on a device; most of it shows on a GPU alone."""

import os
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from graft.model.device import memory_gib, pick_device, prepare_device, scratch, send
from graft.model.machine import resident


def test_arrays_arrive_as_they_are():
    array = np.arange(7, dtype=np.int32)
    assert np.array_equal(send(array, torch.device("cpu")).numpy(), array)


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
    del kept
    assert resident() - before > 0.9 * size, "the heap gives back nothing"


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
