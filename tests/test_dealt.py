"""Optimisers that look at whole weights, over weights of which each process has a part: the bits of one process."""

import pytest
import torch
from together import together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from graft.config.train import Train, load_train
from graft.model.processes.ranks import ranks_from_environment
from graft.model.processes.shard import everywhere, like
from graft.train.updates.dealt import Dealt
from graft.train.updates.optim import (
    load_optimizer_state,
    make_optimizer,
    optimizer_numbers,
    optimizer_state,
    set_learning_rate,
)

OPTIONS = {
    "muon": (),
    "adamw_8bit": (),
    "adafactor": ("optimizer_options={beta2_decay: -0.7}",),
    "galore": ("optimizer_options={rank: 4, update_proj_gap: 2}",),
    "apollo": ("optimizer_options={rank: 4, update_proj_gap: 2}",),
}
SHAPES = {
    "embedding": (50, 8), "large": (96, 64), "wide": (7, 40), "short": (2, 9), "norm": (11,), "experts": (3, 6, 5),
    "unused": (5, 5), "last": (13, 24),
}  # fmt: skip
"""Rows that no number of processes divides, fewer rows than processes, a weight that never has a gradient."""


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def settings_of(optimizer: str) -> Train:
    common = ["model=m", "data=d.jsonl", "method=full", "lr=1e-2", "weight_decay=0.1", f"optimizer={optimizer}"]
    return load_train(None, [*common, *OPTIONS[optimizer]])


def steps(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        set_learning_rate(optimizer, 1e-2 / (1 + number))
        for name, gradient in tensors(100 + number).items():
            parameters[name].grad = None if name == "unused" else like(parameters[name], gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make(settings: Train, parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(parameters, {id(parameters["embedding"])}, settings)


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Whole weights to the bit; of numbers that are updated in parts vector instructions round the last one apart.
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def compare(rank: int, optimizer: str, shape: tuple[int, ...]) -> str:
    """Four steps, a save, and a load into another optimiser that goes on; against whole weights in one process."""
    ranks = ranks_from_environment()
    ranks.join(torch.device("cpu"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    settings = settings_of(optimizer)

    def spread(values: dict[str, Tensor]) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(distribute_tensor(value, mesh, placements)) for name, value in values.items()}

    whole = {name: nn.Parameter(value.clone()) for name, value in tensors(0).items()}
    parts = spread(tensors(0))
    alone, dealt = make(settings, whole), make(settings, parts)
    assert isinstance(dealt, Dealt)
    assert not isinstance(alone, Dealt)
    steps(whole, alone, range(4))
    steps(parts, dealt, range(4))
    for name, value in whole.items():
        found = everywhere(parts[name])
        if id(parts[name]) in dealt.dealt:
            assert torch.equal(found, value), (name, (found - value).abs().max())
        torch.testing.assert_close(found, value.detach(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(whole["large"], tensors(0)["large"])
    assert torch.equal(whole["unused"], tensors(0)["unused"])

    saved = optimizer_state(dealt, parts), optimizer_numbers(dealt, parts)
    wanted = optimizer_state(alone, whole), optimizer_numbers(alone, whole)
    if ranks.first:
        assert_equal(saved[0], wanted[0])
        assert saved[1] == wanted[1]
    others = spread({name: everywhere(value) for name, value in parts.items()})
    resumed = make(settings, others)
    load_optimizer_state(resumed, others, {name: value.clone() for name, value in wanted[0].items()}, wanted[1])
    steps(whole, alone, range(4, 7))
    steps(others, resumed, range(4, 7))
    assert_equal({name: everywhere(value) for name, value in others.items()}, {n: v.detach() for n, v in whole.items()})
    ranks.leave()
    return f"{len(dealt.mine)} of {len(dealt.dealt)}"


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIONS)
def test_dealt_weights_are_updated_to_the_bit_as_whole_ones(optimizer, shape):
    found = together(int(torch.tensor(shape).prod()), compare, optimizer, shape)
    counts = [int(text.split(" of ")[0]) for text in found if " of " in text]
    assert len(counts) == len(found), found
    assert sum(counts) == int(found[0].split(" of ")[1]), "each weight belongs to one process"
    assert max(counts) - min(counts) <= 1


def round_in_parts(rank: int, shape: tuple[int, ...]) -> list[bool]:
    """bf16 weights, rounded by chance: in parts and whole."""
    ranks = ranks_from_environment()
    ranks.join(torch.device("cpu"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    placements = [Replicate(), Shard(0)][-len(shape) :]
    wholes = {name: nn.Parameter(value.bfloat16()) for name, value in tensors(0).items()}
    parts = {name: nn.Parameter(distribute_tensor(value.data, mesh, placements)) for name, value in wholes.items()}
    stochastic = ["master_weights=stochastic", "optimizer=adamw"]
    settings = load_train(None, ["model=m", "data=d.jsonl", "method=full", "lr=1e-2", "weight_decay=0.1", *stochastic])
    for parameters in (wholes, parts):
        optimizer = make(settings, parameters)
        for number in range(3):
            for name, gradient in tensors(100 + number).items():
                parameters[name].grad = like(parameters[name], gradient.bfloat16())
            optimizer.step()
    same = [torch.equal(everywhere(parts[name]), whole) for name, whole in wholes.items()]
    ranks.leave()
    return same


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_parts_are_rounded_by_chance_as_the_whole_is(shape):
    size = int(torch.tensor(shape).prod())
    assert together(size, round_in_parts, shape) == [[True] * len(SHAPES)] * size
