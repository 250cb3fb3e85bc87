"""The last layer at the predictors alone: fewer products, the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_exact import assert_equal_numbers, in_rows, one_by_one
from tiny import ON_TREES, make_example, make_model
from torch.utils.flop_counter import FlopCounterMode

from graft.model.attention.segments import TreeRow
from graft.model.trees import TreeLM
from graft.tokens.tree import build_rows
from graft.train.loss import row_loss

NARROWED = ["llama", "qwen2", "qwen3", "mistral-window", "gemma2-window-softcap", "mixtral-moe", "gpt-oss-sinks"]


def _long_prompts():
    """Two answers to one long question, and one short one: few nodes predict anything."""
    rng = np.random.default_rng(3)
    question = rng.integers(3, 97, 30)
    answers = [rng.integers(3, 97, n) for n in (3, 4, 2)]
    paths = [np.r_[question, answers[0]], np.r_[question, answers[1]], np.r_[question[5:15], answers[2]]]
    lengths = [30, 30, 10]
    return [make_example(str(n), ids, prompt) for n, (ids, prompt) in enumerate(zip(paths, lengths, strict=True))]


@pytest.mark.parametrize("family", NARROWED)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_numbers_are_those_of_one_by_one(family, checkpointing):
    examples = _long_prompts()
    model = make_model(ON_TREES[family])
    wanted = one_by_one(model, examples)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    lm = TreeLM(model)
    assert lm.on_trees
    assert lm.last_layer.active
    assert_equal_numbers(in_rows(lm, examples, 128), wanted)


def _products(lm: TreeLM, row) -> int:
    """Floating-point operations of all matrix products of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.states(TreeRow.of(row, lm.device))
    return counter.get_total_flops()


def test_the_last_layers_products_are_left_out_where_nothing_is_predicted():
    lm = TreeLM(make_model(ON_TREES["llama"]))
    (row,) = build_rows(_long_prompts(), 128)
    asked = len(TreeRow.of(row, lm.device).asked)
    assert asked < len(row) / 3
    narrowed = _products(lm, row)
    lm.last_layer.active = False
    width, between = 32, 48
    assert _products(lm, row) - narrowed == (len(row) - asked) * 2 * (2 * width * width + 3 * width * between)


def test_where_nearly_all_nodes_predict_nothing_is_picked_out():
    lm = TreeLM(make_model(ON_TREES["llama"]))
    rng = np.random.default_rng(0)
    (row,) = build_rows([make_example("a", rng.integers(3, 97, 40), 1)], 64)
    lm.states(TreeRow.of(row, lm.device))
    assert lm.last_layer._nodes is None


def test_a_wrong_set_of_nodes_is_noticed():
    examples = _long_prompts()
    model = make_model(ON_TREES["llama"])
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    weight = sum(float(example.weights.sum()) for example in examples)
    (row,) = lm.rows(examples, 128)
    tree = TreeRow.of(row, lm.device)
    tree.asked = tree.asked[:-1]
    loss = float(row_loss(lm, tree).nll.detach()) / weight
    assert loss != pytest.approx(wanted[0], abs=1e-4)
