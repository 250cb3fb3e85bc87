"""What is set and sent on a device; most of it shows on a GPU alone."""

import os

import numpy as np
import pytest
import torch

from graft.model.device import memory_gib, pick_device, prepare_device, send


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
