"""Attention in parts, put together by log-sum-exps, against the dense mask: output and every gradient."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_attention import CPU, assert_same, outputs, random_row
from tiny import make_example
from transformers import AutoModelForCausalLM, Qwen2Config

from graft.model.attention import segments as attention
from graft.model.attention.attend import Shape
from graft.model.attention.parts import BLOCK, Parts, block_size
from graft.model.attention.segments import TreeRow, dense_attention, segment_attention
from graft.model.fused import lora as lora_layers
from graft.model.fused import product
from graft.model.trees import TreeLM
from graft.tokens.tree import build_rows, segments, visible
from graft.train.loss import row_loss
from graft.types import Row


def long_branches() -> Row:
    """A stem of three blocks, two branches that fork again, a leaf of one node, and a second tree of two blocks."""
    rng = np.random.default_rng(0)
    stem, left, right = (rng.integers(0, 50, size) for size in (3 * BLOCK + 5, 2 * BLOCK, 40))
    tails = [np.concatenate(parts) for parts in (
        (stem, left, [51], rng.integers(0, 50, 90)),
        (stem, left, [52]),
        (stem, right, [53], rng.integers(0, 50, 3)),
        (stem, right, [54], rng.integers(0, 50, BLOCK + 1)),
        ([60], rng.integers(0, 50, 2 * BLOCK)),
    )]  # fmt: skip
    (row,) = build_rows([make_example(str(n), ids, 1) for n, ids in enumerate(tails)], 4096)
    return row


@pytest.fixture
def no_other_way(monkeypatch):
    """Runs one by one are an error."""

    def refuse(*_):
        raise AssertionError("not computed in parts")

    monkeypatch.setattr(attention, "_attention_by_run", refuse)


@pytest.mark.parametrize("shape", [Shape(), Shape(scaling=0.3), Shape(window=4096), Shape(chunk=4096)])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)])
def test_parts_equal_the_dense_mask(shape, heads, no_other_way):
    row = long_branches()
    assert len(Parts.of(segments(row)).below) == 3, "forks below forks"
    assert_same(
        outputs(segment_attention, row, shape, heads=heads), outputs(dense_attention, row, shape, heads=heads), 2e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_parts_of_any_forest_equal_the_dense_mask(seed):
    row = random_row(seed)
    assert_same(outputs(segment_attention, row, Shape()), outputs(dense_attention, row, Shape()), 2e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_parts_and_causal_runs_are_what_is_seen_and_nothing_twice(seed):
    row = random_row(seed)
    parts = Parts.of(segments(row))
    seen = np.zeros((len(row), len(row)), int)
    for queries, keys in (block for run in parts.runs for block in run):
        asked, among = queries.stop - queries.start, keys.stop - keys.start
        seen[queries, keys] += np.tri(asked, among, among - asked, dtype=int)
    for queries, keys in parts.below:
        seen[queries, keys] += 1
    assert np.array_equal(seen, visible(row).astype(int))


@pytest.mark.parametrize("run", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 215, 1000])
def test_a_run_is_cut_into_blocks_of_about_one_size(run):
    size = block_size(run)
    assert 0 < size <= 1.5 * BLOCK
    assert run <= size or size >= BLOCK / 1.5


def test_large_scores_of_either_part_leave_the_other_out(no_other_way):
    """Log-sum-exps thousands apart: neither infinity nor nan, and gradients to the rounding of such scores."""
    shape = Shape(scaling=300.0)
    found, wanted = (outputs(by, long_branches(), shape) for by in (segment_attention, dense_attention))
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    assert_same(found, wanted, 1e-4)


def test_short_runs_in_16_bits_are_computed_in_fp32(no_other_way):
    row = long_branches()
    found = outputs(segment_attention, row, Shape(), torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    assert_same(found, outputs(dense_attention, row, Shape()), 2e-2)


@pytest.mark.parametrize(
    "shape", [Shape(window=50), Shape(chunk=50), Shape(softcap=2.0), Shape(slopes=torch.ones(4)), Shape(dropout=0.1)]
)
def test_what_the_kernel_cannot_do_goes_another_way(shape, no_other_way):
    tree = TreeRow.of(long_branches(), CPU)
    q, k = torch.randn(1, 4, len(tree.row), 8), torch.randn(1, 2, len(tree.row), 8)
    with pytest.raises(AssertionError, match="not computed in parts"):
        segment_attention(q, k, k, tree, shape)


def test_the_mask_is_made_once_for_all_layers():
    tree = TreeRow.of(long_branches(), CPU)
    q, k = torch.randn(1, 4, len(tree.row), 8), torch.randn(1, 2, len(tree.row), 8)
    for _ in range(2):
        segment_attention(q, k, k, tree, Shape())
    assert len(tree.prepared) == 1
    assert not tree.scores


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_large_enough_for_every_fast_way_gives_the_gradient_of_examples_one_by_one(lora, monkeypatch):
    """Blocks, parts, trained and LoRA layers as one operation, oneDNN where torch has it: against none of them."""
    monkeypatch.setattr(product, "on_amd", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(lora_layers, "on_amd", torch.backends.mkldnn.is_available)
    config = Qwen2Config(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(model)
    rng = np.random.default_rng(0)
    stem, middle = rng.integers(0, 500, 180), rng.integers(0, 500, 100)
    examples = [
        make_example(str(n), np.concatenate([stem, middle[: 100 * (n % 2)], rng.integers(0, 500, 20 + 40 * n)]), 150)
        for n in range(5)
    ]
    losses = []
    for lm, rows in (
        (TreeLM(model), build_rows(examples, 4096)),
        (TreeLM(plain, fuse=False, trees=False), build_rows(examples, 4096, share=False)),
    ):
        losses.append(0.0)
        for row in rows:
            loss = row_loss(lm, lm.place(row)).loss
            loss.backward()
            losses[-1] += float(loss.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 1e-5, name
