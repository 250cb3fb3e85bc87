"""What is kept for the backward pass: less of it, and the gradients are the same to the bit."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from tiny import (
    ON_TREES,
    ONE_PER_ROW,
    branching_examples,
    make_conversations,
    make_model,
    make_model_folder,
    write_rows,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from graft.config.train import Lora, load_train
from graft.errors import ConfigError
from graft.model.attention.segments import TreeRow
from graft.model.device import Precision
from graft.model.memory.offload import HostStore
from graft.model.memory.recipes import gated, keeping_recipes, write_recipe, write_recipes
from graft.model.memory.remember import kept_bytes, remember
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora
from graft.train.costs import checkpointing
from graft.train.costs.checkpointing import activation_bytes_per_token, remember_what_fits
from graft.train.loop import train
from graft.train.loss import row_loss

FP32 = Precision(torch.float32, torch.float32, torch.float32)
CPU = torch.device("cpu")


def prepared(family: str, method: str, dropout: float = 0.0) -> TreeLM:
    config = (ON_TREES | ONE_PER_ROW)[family]
    model = make_model(config)
    if method == "lora":
        model = add_lora(model, Lora(r=4, dropout=dropout), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return TreeLM(model)


def gradients(lm: TreeLM, autocast: bool = False) -> dict[str, torch.Tensor]:
    lm.model.train()
    lm.model.zero_grad()
    for number, row in enumerate(lm.rows(branching_examples(), 40)):
        torch.manual_seed(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nll = row_loss(lm, TreeRow.of(row, lm.device)).nll
        nll.backward()
    return {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}


def kept(lm: TreeLM) -> float:
    return activation_bytes_per_token(lm, FP32)


def assert_same_bits(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    assert any(bool(gradient.any()) for gradient in wanted.values())
    different = [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]
    assert not different


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "family",
    ["llama-tied", "qwen3", "gemma2-window-softcap", "phi3", "gpt-neox", "gpt2", "bloom", "qwen3-moe", "gpt-oss-sinks"],
)  # fmt: skip
def test_gradients_are_the_same_bits_and_less_is_kept(family, method, mode):
    plain, lm = (prepared(family, method) for _ in range(2))
    remember(lm.model, mode)
    assert_same_bits(gradients(lm), gradients(plain))
    share = kept(lm) / kept(plain)
    assert share < (0.45 if mode == "full" else 1.0), share


@pytest.mark.parametrize(("family", "most"), [("llama", 0.95), ("phi3", 0.7)])
def test_what_selective_keeps_of_a_real_shape(family, most):
    """Three times as many features in the MLP, as real models have. Llama's is one operation already."""
    sizes = {"hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 2}
    config = ON_TREES[family].__class__(**{**ON_TREES[family].to_dict(), **sizes, "head_dim": 16})
    by_mode = {}
    for mode in ("none", "selective", "full"):
        lm = TreeLM(add_lora(make_model(config), Lora(r=2), seed=0))
        remember(lm.model, mode)
        by_mode[mode] = kept(lm)
    assert by_mode["selective"] < most * by_mode["none"]
    assert by_mode["full"] < 0.2 * by_mode["none"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_dropout_draws_the_same_numbers_when_a_layer_runs_again(mode):
    plain, lm = (prepared("llama", "lora", dropout=0.3) for _ in range(2))
    remember(lm.model, mode)
    found = gradients(lm)
    assert_same_bits(found, gradients(plain))
    still = gradients(prepared("llama", "lora"))
    assert any(not torch.equal(found[name], still[name]) for name in still), "the dropout was not idle"


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_made_again_under_autocast_is_the_same(method, mode):
    plain, lm = (prepared("qwen2", method) for _ in range(2))
    remember(lm.model, mode)
    assert_same_bits(gradients(lm, autocast=True), gradients(plain, autocast=True))


def test_every_second_layer_lies_between_none_and_full():
    config = ON_TREES["llama"].__class__(**{**ON_TREES["llama"].to_dict(), "num_hidden_layers": 4, "layer_types": None})
    sizes = []
    for every in (1, 2, 5):
        lm = TreeLM(make_model(config))
        wanted = gradients(lm)
        remember(lm.model, "full", every)
        assert_same_bits(gradients(lm), wanted)
        sizes.append(kept(lm))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2]


def test_full_checkpointing_reaches_every_adapter_without_a_warning():
    """A reentrant checkpoint over frozen embeddings trains nothing, in silence; `use_cache` warns on every start."""
    lm = prepared("llama", "lora")
    remember(lm.model, "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(lm)
    trained = [name for name, p in lm.model.named_parameters() if p.requires_grad]
    assert sorted(found) == sorted(trained)
    assert all(bool(gradient.any()) for gradient in found.values())
    inputs = lm.embedding(torch.arange(4))
    assert not inputs.requires_grad, "no gradient is computed for inputs that nobody trains"


def test_a_model_without_layers_to_run_again_is_refused_by_name():
    class Bare(nn.Module):
        pass

    model = make_model(ON_TREES["llama"])
    model.model.layers = nn.ModuleList()
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no layers"):
        remember(model, "full")


def test_evaluation_keeps_nothing():
    lm = prepared("llama", "lora")
    remember(lm.model, "selective")
    tree = TreeRow.of(lm.rows(branching_examples(), 512)[0], lm.device)
    with torch.inference_mode():
        assert not lm.states(tree).requires_grad


# The parts ------------------------------------------------------------------------------------------------------------


def test_the_graph_of_a_step_that_is_thrown_away_is_freed():
    """An operation that keeps its own output through a hook would hold itself for ever."""
    lm = prepared("llama", "full")
    remember(lm.model, "selective")
    lm.model.train()
    gc.disable()
    try:
        made: list[weakref.ref[torch.Tensor]] = []
        for layer in lm.decoder.layers:
            layer.mlp.register_forward_hook(lambda module, given, out: made.append(weakref.ref(out)))
        states = lm.states(TreeRow.of(lm.rows(branching_examples(), 512)[0], lm.device))
        assert len(made) == 2
        del states
        assert not [output for output in made if output() is not None]
        probability = weakref.ref(opened := _sigmoid_in_a_book())
        del opened
        assert probability() is None
    finally:
        gc.enable()


def _sigmoid_in_a_book() -> torch.Tensor:
    with keeping_recipes():
        return torch.sigmoid(torch.ones(3, requires_grad=True) * 2)  # sigmoid keeps what it returns


def test_an_input_that_was_changed_in_place_is_noticed():
    x = torch.ones(2, 3, requires_grad=True) * 1
    other = torch.ones(2, 3, requires_grad=True)
    with keeping_recipes():
        made = torch.relu(x)
        write_recipe(made, torch.relu, x)
        out = (made * other).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.backward()


def test_a_tensor_in_the_place_of_a_freed_one_has_no_recipe():
    """Recipes are found by identity, and what is gone is nobody's."""
    other = torch.ones(2, 3, requires_grad=True)
    with keeping_recipes():
        for value in (2.0, 3.0, 5.0):
            made = torch.full((2, 3), value, requires_grad=True) * 1
            write_recipe(made, lambda x: x * 0, other)
            del made
            out = (torch.full((2, 3), value, requires_grad=True) * 1) * other
    out.sum().backward()
    assert torch.equal(other.grad, torch.full((2, 3), 5.0))


def test_a_wrong_recipe_would_be_seen():
    """The comparison above can fail: a recipe that makes something else gives another gradient."""
    other = torch.ones(2, 3, requires_grad=True)
    with keeping_recipes():
        made = torch.full((2, 3), 4.0, requires_grad=True) * 1
        write_recipe(made, lambda x: x * 7, other)
        (made * other).sum().backward()
    assert torch.equal(other.grad, torch.full((2, 3), 7.0))


def test_a_gated_product_has_the_gradients_of_its_definition():
    act = nn.SiLU()
    gate, up = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: gated(act, a, b), (gate, up))


def test_only_what_gives_the_same_numbers_is_replaced():
    class Scaled(nn.Module):
        """Named like a gated MLP, and another thing."""

        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    mlp = Scaled()
    before = mlp.forward
    assert write_recipes(mlp) == 1, "the activation alone"
    assert mlp.forward == before


def test_an_activation_that_keeps_its_output_is_made_to_keep_its_input():
    """ReLU's gradient is taken from what it returns: beside a recipe that needs the input, both would be kept."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    (wanted,) = torch.autograd.grad(model(x).sum(), x)
    write_recipes(model)
    packed = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor.detach()

    with keeping_recipes(keep):
        out = model(x).sum()
    assert not [tensor for tensor in packed if tensor.shape == (4, 8) and bool((tensor >= 0).all())]
    assert torch.equal(torch.autograd.grad(out, x)[0], wanted)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_offloaded_activations_come_back_as_they_were(mode, monkeypatch):
    """On the CPU the other memory is another piece of the same; the order of things is that of the GPU."""
    sent = []
    monkeypatch.setattr(
        "graft.model.memory.remember.HostStore", lambda device: sent.append(HostStore(device, 1)) or sent[-1]
    )
    plain, lm = (prepared("llama", "lora") for _ in range(2))
    remember(lm.model, mode, offload=True)
    assert_same_bits(gradients(lm), gradients(plain))
    (store,) = sent
    assert store._count >= 6
    assert not store._recent, "nothing is held after the backward pass"


def test_a_tensor_that_many_keep_is_moved_once():
    store = HostStore(CPU, 1)
    x = torch.randn(4, 4, requires_grad=True) * 1
    with saved_tensors_hooks(store.keep, store.give_back):
        out = x.sin() + x.cos() + x.exp().sum()
    assert store._count == 2, "x once, and what exp keeps"
    out.sum().backward()


def test_offload_on_the_cpu_is_refused_before_the_model_is_read(tmp_path):
    folder = make_model_folder(tmp_path / "model")
    data = write_rows(tmp_path / "data.jsonl", make_conversations())
    settings = load_train(
        None, [f"model={folder}", f"data={data}", f"out={tmp_path / 'run'}", "offload_activations=true"]
    )
    with pytest.raises(ConfigError, match="the device is cpu"):
        train(settings)


# auto and the settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row_tokens", "wanted"), [(10, "none"), (130, "selective"), (100_000, "full")])
def test_auto_takes_the_first_that_fits(row_tokens, wanted, monkeypatch):
    lm = prepared("llama", "lora")
    none = kept(lm)
    optimizer = 12 * sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    monkeypatch.setattr(checkpointing, "free_bytes", lambda device: optimizer + 120 * none / checkpointing.SHARE)
    found = gradients(lm)
    assert remember_what_fits(lm, FP32, row_tokens, 1, False) == wanted
    assert_same_bits(gradients(lm), found)
    assert (kept(lm) < none) == (wanted != "none")


def test_kept_bytes_counts_shared_storage_once_and_no_weights():
    layer = nn.Linear(256, 256, bias=False)
    x = torch.randn(8, 256)
    assert kept_bytes(lambda: layer(x)) == 8 * 256 * 4, "the output; the input was there before"
    with torch.device("meta"):
        assert kept_bytes(lambda: nn.functional.silu(torch.empty(8, 256, requires_grad=True) * 2)) == 3 * 8 * 256 * 4


def test_the_older_name_still_works_and_a_contradiction_is_named():
    base = ["model=m", "data=d.jsonl"]
    assert load_train(None, [*base, "gradient_checkpointing=true"]).checkpointing == "full"
    assert load_train(None, [*base, "gradient_checkpointing=false"]).checkpointing == "none"
    assert (
        load_train(None, [*base, "gradient_checkpointing=true", "checkpointing=selective"]).checkpointing == "selective"
    )
    with pytest.raises(ConfigError, match="contradict"):
        load_train(None, [*base, "gradient_checkpointing=true", "checkpointing=none"])
    with pytest.raises(ConfigError, match="checkpointing"):
        load_train(None, [*base, "checkpointing=some"])
