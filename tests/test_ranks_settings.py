"""Settings that look at the whole model, at a whole step or at the memory: the same run on several processes as on one.

tests/test_ranks.py has those that do not.
"""

from pathlib import Path

import pytest
import torch
from test_ranks import assert_same_course, run_on, settings_for
from tiny import ON_TREES, make_model, make_model_folder
from together import together

from graft.config.train import Lora
from graft.model.adapters import add_lora
from graft.model.device import Precision
from graft.model.ranks import ranks_from_environment
from graft.model.remember import Mode, note_recipes, remember
from graft.model.shard import mesh_of, shard
from graft.model.trees import TreeLM, fuse_modules
from graft.train.checkpointing import activation_bytes_per_token
from graft.train.loop import train

FP32 = Precision(torch.float32, torch.float32, torch.float32)
CPU = torch.device("cpu")
MODES: tuple[Mode, ...] = ("none", "selective", "full")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def test_selective_checkpointing_of_all_weights_is_that_of_one_process(base, tmp_path):
    settings = ("method=full", "checkpointing=selective")
    alone = train(settings_for(base, tmp_path, "alone", *settings))
    assert_same_course(alone, run_on(2, settings_for(base, tmp_path, "two", *settings)))


def kept_by_mode(method: str, spread: bool) -> list[float]:
    model = make_model(ON_TREES["qwen3"])
    if method == "lora":
        model = add_lora(model, Lora(r=4), seed=0)
    fuse_modules(model)
    if spread:
        ranks = ranks_from_environment()
        ranks.join(CPU)
        note_recipes(model)
        lm = TreeLM(model, fuse=False, enter=shard(model, mesh_of(ranks, CPU, ranks.size)))
    else:
        lm = TreeLM(model, fuse=False)
    found = []
    for mode in MODES:
        remember(model, mode, written=spread)
        found.append(activation_bytes_per_token(lm, FP32))
    return found


def kept_by_mode_of_a_spread_one(_rank: int, method: str) -> list[float]:
    return kept_by_mode(method, spread=True)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_spread_model_keeps_to_the_byte_what_a_whole_one_does(method):
    whole = kept_by_mode(method, spread=False)
    assert whole[0] > whole[1] > whole[2]
    assert together(2, kept_by_mode_of_a_spread_one, method) == [whole, whole]
