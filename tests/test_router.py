"""The load-balancing loss of a mixture of experts: rows of trees give what all tokens of the step give unshared."""

import copy

import pytest
import torch
from architectures import tiny_model
from tiny import ON_TREES, branching_examples, make_conversations, make_model, make_model_folder, write_rows
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from graft.config.train import Lora, load_train
from graft.errors import ConfigError
from graft.model.device import pick_precision
from graft.model.router import RouterWatch
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora
from graft.model.tuned.unreached import not_plainly_linear, stacked_experts
from graft.runs import read_jsonl
from graft.tokens.tree import build_rows, total_weight
from graft.train.loop import train
from graft.train.processes.share import MyRows
from graft.train.step import Stepper

COEFFICIENT = 0.5  # large, so that a wrong balance is a wrong gradient
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "jetmoe", "qwen3_next"]


def by_definition(model, examples) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Every example alone, and transformers' own function on the router logits of all their tokens together."""
    model.zero_grad()
    weight = total_weight(examples)
    nll, logits = 0.0, []
    for example in examples:
        ids = torch.tensor(example.ids).long()
        output = model(input_ids=ids[None], use_cache=False, output_router_logits=True)
        each = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")
        nll = nll + (each * torch.tensor(example.weights[1:])).sum() / weight
        logits.append(output.router_logits)
    layers = tuple(torch.cat([layer.flatten(0, -2) for layer in of_layer]) for of_layer in zip(*logits, strict=True))
    top_k = model.config.num_experts_per_tok
    aux = load_balancing_loss_func(layers, layers[0].shape[-1], top_k)
    (nll + COEFFICIENT * aux).backward()
    return (
        float(nll.detach()),
        float(aux.detach()),
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    )


def by_graft(model, examples, row_tokens: int) -> tuple[float, float, dict[str, torch.Tensor], int]:
    model = copy.deepcopy(model)
    model.zero_grad()
    lm = TreeLM(model)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(parameters.values())
    router = RouterWatch(lm, COEFFICIENT)
    stepper = Stepper(lm, parameters, optimizer, pick_precision("fp32", lm.device), clip=None, seed=0)
    stepper.router = router
    rows = build_rows(examples, row_tokens, share=lm.on_trees)
    weight = total_weight(examples)
    stepper.count_experts(MyRows(rows, [], sum(map(len, rows))), 0)
    nll = sum(float(stepper.accumulate(row, (0, n), weight).nll) for n, row in enumerate(rows)) / weight
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    assert stepper.routed is not None
    assert stepper.routed.heaviest >= 1
    return nll, stepper.aux, gradients, len(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_is_that_of_all_tokens_of_the_step(family):
    examples = branching_examples()
    model = tiny_model(family)
    nll, aux, gradients = by_definition(model, examples)
    for row_tokens in (512, 40):
        found_nll, found_aux, found, rows = by_graft(model, examples, row_tokens)
        assert (rows == 1) == (row_tokens == 512) or family == "qwen3_next"  # that one is computed one per row
        assert found_nll == pytest.approx(nll, abs=1e-6 * max(1, nll))
        assert found_aux == pytest.approx(aux, abs=1e-6 * max(1, aux))
        whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * whole), name
    assert any("router" in name or "gate" in name for name in gradients)


def test_shared_tokens_count_once_for_each_example():
    """Without multiplicity the balance would be another: the test above can fail."""
    examples = branching_examples()
    model = make_model(ON_TREES["mixtral-moe"])
    _, aux, _ = by_definition(model, examples)
    lm = TreeLM(model)
    (row,) = build_rows(examples, 512)
    assert row.multiplicity.sum() == sum(len(example.ids) for example in examples) > len(row)
    row.multiplicity[:] = 1
    optimizer = torch.optim.SGD(model.parameters())
    stepper = Stepper(lm, {}, optimizer, pick_precision("fp32", lm.device), clip=None, seed=0)
    stepper.router = RouterWatch(lm, 1.0)
    stepper.accumulate(row, (0, 0), 1.0)
    assert abs(stepper.aux - aux) > 1e-3


def test_checkpointed_layers_give_the_same_balance():
    examples = branching_examples()
    model = make_model(ON_TREES["mixtral-moe"])
    wanted = by_definition(model, examples)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = by_graft(model.train(), examples, 40)
    assert found[1] == pytest.approx(wanted[1], abs=1e-6)
    for name, gradient in wanted[2].items():
        assert (found[2][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_model_without_such_a_loss_is_named(family):
    with pytest.raises(ConfigError, match="no load-balancing loss"):
        RouterWatch(TreeLM(tiny_model(family)), 0.01)
    with pytest.raises(ConfigError, match="it has no experts"):
        RouterWatch(TreeLM(tiny_model(family)), None)


def test_a_run_logs_the_balance_and_says_what_lora_does_not_reach(tmp_path, capsys):
    folder = make_model_folder(tmp_path / "model", MixtralConfig, num_local_experts=4)
    data = write_rows(tmp_path / "data.jsonl", make_conversations(8))
    values = {"model": str(folder), "data": [data], "out": str(tmp_path / "run"), "max_steps": 2, "precision": "fp32"}
    run = train(load_train(None, ["router_aux_loss=auto", "device=cpu"], values))
    steps = [row for row in read_jsonl(run.metrics) if row["kind"] == "train"]
    assert all(row["router_aux_loss"] > 0 and row["expert_load_max"] >= 1 for row in steps)
    said = " ".join(capsys.readouterr().err.split())
    assert "does not reach the experts" in said
    assert "gate_up_proj" in said, said


def test_all_linear_leaves_out_what_is_linear_in_name_alone():
    """Llama 4's router returns a tuple; Mamba's kernels read `out_proj` past the layer."""
    assert not_plainly_linear(tiny_model("llama4_text")) == ["router"]
    assert not_plainly_linear(tiny_model("mamba")) == ["out_proj"]
    assert not_plainly_linear(tiny_model("llama")) == []
    assert not_plainly_linear(tiny_model("falcon")) == []  # its own class, but linear
    tuned = add_lora(tiny_model("llama4_text"), Lora(r=2), seed=0)
    assert TreeLM(tuned).why_not is None
    assert stacked_experts(tuned)
    assert not stacked_experts(add_lora(tiny_model("llama"), Lora(r=2), seed=0))
