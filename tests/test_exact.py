"""The numbers contract: a tree computes the same loss and the same gradients as its examples one by one."""

import pytest
import torch
from tiny import ON_TREES, ONE_PER_ROW, branching_examples, make_model

from graft.config.train import Lora
from graft.model.adapters import add_lora
from graft.model.attention import DENSE, SEGMENTS, TreeRow
from graft.model.trees import TreeLM
from graft.tokens.tree import build_rows, total_weight
from graft.train.loss import row_loss


def one_by_one(model, examples) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by definition: transformers' own forward, one example at a time, full logits."""
    model.zero_grad()
    weight = total_weight(examples)
    loss = 0.0
    for example in examples:
        ids = torch.tensor(example.ids).long()
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        share = (nll * torch.tensor(example.weights[1:])).sum() / weight
        share.backward()
        loss += float(share.detach())
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_rows(lm: TreeLM, examples, row_tokens: int) -> tuple[float, dict[str, torch.Tensor], int]:
    """The same by graft, over rows of a given budget; also the number of rows."""
    lm.model.zero_grad()
    weight = total_weight(examples)
    rows = lm.rows(examples, row_tokens)
    loss = 0.0
    for row in rows:
        share = row_loss(lm, lm.place(row)).nll / weight
        share.backward()
        loss += float(share.detach())
    return loss, {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}, len(rows)


def assert_equal_numbers(found, wanted) -> None:
    loss, gradients = found[:2]
    wanted_loss, wanted_gradients = wanted
    assert loss == pytest.approx(wanted_loss, abs=1e-6 * max(1.0, wanted_loss))
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in wanted_gradients.items():
        if gradient.norm() > 1e-7:
            error = float((gradients[name] - gradient).norm() / gradient.norm())
            assert error < 1e-5, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("family", ON_TREES)
def test_a_tree_equals_one_by_one_for_loss_and_every_gradient(family):
    examples = branching_examples()
    model = make_model(ON_TREES[family])
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    assert lm.why_not is None
    for row_tokens, least_rows in ((512, 1), (40, 2), (29, 3)):
        found = in_rows(lm, examples, row_tokens)
        assert found[2] >= least_rows
        assert_equal_numbers(found, wanted)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "bloom", "gemma2-window-softcap", "gpt-oss-sinks"])
def test_segments_equal_the_dense_mask(family):
    examples = branching_examples(seed=5)
    dense = in_rows(TreeLM(make_model(ON_TREES[family]), DENSE), examples, 512)
    found = in_rows(TreeLM(make_model(ON_TREES[family]), SEGMENTS), examples, 512)
    assert_equal_numbers(found, dense[:2])


@pytest.mark.parametrize("family", ONE_PER_ROW)
def test_what_cannot_run_on_trees_says_so_and_is_exact_one_per_row(family):
    examples = branching_examples()
    model = make_model(ONE_PER_ROW[family])
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    assert not lm.on_trees
    assert lm.why_not
    found = in_rows(lm, examples, 512)
    assert found[2] == len(examples)
    assert_equal_numbers(found, wanted)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bloom", "mixtral-moe"])
def test_lora_on_trees_equals_lora_one_by_one(family):
    examples = branching_examples()
    lora = Lora(r=4, target_modules="all-linear")
    model = add_lora(make_model(ON_TREES[family]), lora, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # B starts at zero, where A would have no gradient to compare
            torch.nn.init.normal_(parameter, std=0.1)
    wanted = one_by_one(model, examples)
    assert any("lora_A" in name for name in wanted[1])
    assert_equal_numbers(in_rows(TreeLM(model), examples, 40), wanted)


@pytest.mark.parametrize("target", ["lm_head", "modules_to_save"])
def test_a_head_that_is_trained_by_an_adapter(target):
    examples = branching_examples()
    lora = Lora(r=4, target_modules=("q_proj", "lm_head")) if target == "lm_head" else Lora(
        r=4, target_modules=("q_proj",), modules_to_save=("lm_head",)
    )  # fmt: skip
    model = add_lora(make_model(ON_TREES["llama"]), lora, seed=0)
    wanted = one_by_one(model, examples)
    assert any("lm_head" in name for name in wanted[1])
    assert_equal_numbers(in_rows(TreeLM(model), examples, 40), wanted)


def test_gradient_checkpointing_changes_nothing():
    examples = branching_examples()
    for family in ("llama", "bloom"):
        model = make_model(ON_TREES[family])
        wanted = one_by_one(model, examples)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        assert_equal_numbers(in_rows(TreeLM(model), examples, 40), wanted)


def test_bfloat16_is_within_its_rounding():
    examples = branching_examples()
    model = make_model(ON_TREES["llama"])
    loss, gradients = one_by_one(model, examples)
    lm = TreeLM(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_loss, found, _ = in_rows(lm, examples, 40)
    assert found_loss == pytest.approx(loss, rel=1e-2)
    error = sum(float((found[n] - g).norm() ** 2) for n, g in gradients.items()) ** 0.5
    assert error / sum(float(g.norm() ** 2) for g in gradients.values()) ** 0.5 < 5e-2


def test_the_checker_sees_a_wrong_mask():
    """A model that saw its neighbours' branches would be found out: plain causal attention over the same row."""
    examples = branching_examples()
    model = make_model(ON_TREES["llama"])
    wanted = one_by_one(model, examples)
    (row,) = build_rows(examples, 512)
    lm = TreeLM(model)
    tree = TreeRow.of(row, lm.device)
    whole_row = tree.segments.__class__(sizes=(len(row),), ancestors=((),), offsets=(0,))
    tree.segments = whole_row
    model.zero_grad()
    loss = float(row_loss(lm, tree).nll.detach()) / total_weight(examples)
    assert abs(loss - wanted[0]) > 1e-3


def test_the_probe_refuses_a_model_that_loses_the_row_or_the_window():
    model = make_model(ON_TREES["gemma2-window-softcap"])
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None  # the window now stands in the mask alone
    lm = TreeLM(model)
    assert not lm.on_trees
    assert "windows of [7]" in (lm.why_not or "")
