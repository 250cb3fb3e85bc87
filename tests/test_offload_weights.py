"""Weights kept on the host between uses: FSDP2's way of it, run where the host is the device too."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_ranks import numbers, run_as, settings_for
from tiny import make_model_folder
from together import together
from torch.distributed.fsdp import CPUOffloadPolicy

from graft.config.train import Train
from graft.model.processes import shard
from graft.runs import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def run_and_count(rank: int, settings: Train) -> int:
    """A run; how many modules were spread so that their parts stay on the host."""
    spread, policies = shard.fully_shard, []

    def counted(module: torch.nn.Module, **how: object) -> object:
        policies.append(how["offload_policy"])
        return spread(module, **how)

    shard.fully_shard = counted
    run_as(rank, settings)
    return sum(isinstance(policy, CPUOffloadPolicy) for policy in policies)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_whose_parts_stay_on_the_host_is_the_run_without(base, tmp_path, method):
    runs = []
    for name, more in (("off", []), ("on", ["offload_weights=true"])):
        settings = settings_for(base, tmp_path, name, f"method={method}", "max_steps=4", "save_every=2", *more)
        assert together(2, run_and_count, settings) == [3 if more else 0] * 2
        runs.append(RunFolder(Path(str(settings.out))))
    np.testing.assert_array_equal(numbers(runs[1]), numbers(runs[0]))


def test_it_goes_on_from_a_checkpoint(base, tmp_path):
    changes = ["offload_weights=true", "save_every=2", "keep_last=99", "max_steps=4", "eval_every=2"]
    unbroken = settings_for(base, tmp_path, "unbroken", *changes)
    assert together(2, run_as, unbroken) == [unbroken.out] * 2
    wanted, begun = RunFolder(tmp_path / "unbroken"), RunFolder(tmp_path / "begun")
    shutil.copytree(wanted.root, begun.root)
    shutil.rmtree(begun.final)
    shutil.rmtree(begun.checkpoints / "step-4")
    assert sorted(path.name for path in begun.checkpoints.iterdir()) == ["step-2"]
    resumed = settings_for(base, tmp_path, "begun", *changes, "resume=true")
    assert together(2, run_as, resumed) == [resumed.out] * 2
    assert (begun.checkpoints / "step-4").is_dir()
    np.testing.assert_array_equal(numbers(begun), numbers(wanted))
    found, expected = (load_file(run.final / "adapter_model.safetensors") for run in (begun, wanted))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
