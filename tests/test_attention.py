"""Attention backends against the dense mask, which is the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ON_TREES, branching_examples, make_example, make_model

from graft.errors import ConfigError
from graft.model.attention import flex as attention_flex
from graft.model.attention import varlen as attention_varlen
from graft.model.attention.attend import Shape
from graft.model.attention.flex import (
    BLOCK,
    FLEX,
    blocks_of,
    flex_refuses,
    flex_tree_attention,
)
from graft.model.attention.pick import ROW_LENGTHS, STEP, first_that_can, pick_attention, row_step
from graft.model.attention.segments import DENSE, SEGMENTS, TreeRow, dense_attention, register, segment_attention
from graft.model.attention.varlen import sequences, varlen_attention, varlen_refuses
from graft.model.trees import TreeLM
from graft.tokens.tree import build_rows, padded, path_starts, total_weight, visible
from graft.train.loss import row_loss
from graft.types import Row

CPU = torch.device("cpu")
SHAPES = {
    "plain": Shape(),
    "scaled": Shape(scaling=0.7),
    "window": Shape(window=5),
    "softcap": Shape(softcap=1.5),
    "alibi": Shape(slopes=torch.tensor([0.5, 0.25, -0.5, 0.1])),
    "sinks": Shape(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": Shape(window=5, softcap=2.0, slopes=torch.tensor([0.5, 0.25, 0.5, 0.1]), sinks=torch.ones(4)),
}


@pytest.fixture
def flex_gradients(monkeypatch):
    """Torch refuses gradients of FlexAttention on the CPU, though its uncompiled definition has them."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def random_row(seed: int, examples: int = 8, longest: int = 40) -> Row:
    """A forest of examples over two tokens, so that they branch everywhere."""
    rng = np.random.default_rng(seed)
    made = [
        make_example(str(n), rng.integers(0, 2, rng.integers(1, longest + 1)), 1, weight=rng.random())
        for n in range(examples)
    ]
    return build_rows(made, examples * longest)[0]


def outputs(compute, row: Row, shape: Shape, dtype=torch.float32, device=CPU, heads=(4, 2), size: int = 8):
    """Output and every gradient (queries, keys, values, sinks) of a weighted sum of the output."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, h, len(row), size, generator=generator) for h in (heads[0], heads[1], heads[1])]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
    sinks = None if shape.sinks is None else shape.sinks.to(device, dtype).requires_grad_()
    slopes = None if shape.slopes is None else shape.slopes.to(device)
    shape = Shape(shape.scaling, shape.window, shape.softcap, sinks, slopes)
    out = compute(q, k, v, TreeRow.of(row, device), shape)
    leaves = [q, k, v] + ([] if sinks is None else [sinks])
    weight = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.float() * weight).sum(), leaves)]


def assert_same(found, wanted, bound: float) -> None:
    assert len(found) == len(wanted)
    for ours, right in zip(found, wanted, strict=True):
        assert right.norm() > 0
        error = float((ours.float().cpu() - right.float().cpu()).norm() / right.float().norm().cpu())
        assert error < bound


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 16, 128]), st.sampled_from([None, 3, 20]), st.integers(0, 30))
def test_the_blocks_are_those_of_the_dense_mask(seed, block, window, padding):
    row = random_row(seed)
    row = padded(row, len(row) + padding)
    seen = visible(row)
    if window is not None:
        seen &= row.depth[:, None] - row.depth[None, :] < window
    count = -(-len(row) // block)
    whole = np.zeros((count * block, count * block), bool)
    whole[: len(row), : len(row)] = seen
    by_block = whole.reshape(count, block, count, block)
    some, every = by_block.any((1, 3)), by_block.all((1, 3))
    found = blocks_of(row, window, block)
    assert not (found.partial & found.full).any()
    assert not (some & ~(found.partial | found.full)).any(), "a block with something in it is left out"
    assert not (found.full & ~every).any(), "a block with something hidden is taken for full"
    if window is None:
        assert np.array_equal(found.partial | found.full, some)
        if block > 1:
            assert np.array_equal(found.full, every)


def test_a_window_leaves_blocks_out_and_long_paths_have_full_ones():
    row = build_rows([make_example("long", np.arange(1024) % 90, 1)], 1024)[0]
    assert blocks_of(row).full.sum() == 8 * 7 / 2
    narrow = blocks_of(row, window=BLOCK)
    assert (narrow.partial | narrow.full).sum() == 8 + 7
    assert blocks_of(row, window=3 * BLOCK).full.any()


@pytest.mark.parametrize("name", SHAPES)
def test_flex_equals_the_dense_mask_in_output_and_gradients(name, flex_gradients):
    row = random_row(3, examples=12)
    assert len(row) > 2 * BLOCK - 20, "several blocks"
    row = padded(row, 3 * BLOCK)
    wanted = outputs(dense_attention, row, SHAPES[name])
    assert_same(outputs(flex_tree_attention, row, SHAPES[name]), wanted, 2e-6)
    assert_same(outputs(segment_attention, row, SHAPES[name]), wanted, 2e-6)


@pytest.mark.parametrize("family", ["mistral-window", "gemma2-window-softcap", "gpt-oss-sinks", "bloom", "qwen3"])
def test_models_compute_the_same_logits_by_flex(family):
    (row,) = build_rows(branching_examples(), 512)
    dense = TreeLM(make_model(ON_TREES[family]), DENSE)
    flex = TreeLM(make_model(ON_TREES[family]), FLEX, row_step=BLOCK)
    assert flex.why_not is None
    assert flex.backend_failed is None
    with torch.no_grad():
        wanted, found = (lm.logits(lm.place(row)) for lm in (dense, flex))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_the_kernel_is_compiled_once_for_all_rows_of_a_length(monkeypatch):
    made = []

    def compiler(graph, _inputs):
        made.append(graph)
        return graph.forward

    kernel = torch.compile(attention_flex.flex_attention, dynamic=False, backend=compiler)
    monkeypatch.setattr(attention_flex, "_kernel", lambda _kind: kernel)
    for shape, wanted in ((Shape(), 1), (Shape(window=5), 2)):
        for seed in range(3):
            row = padded(random_row(seed, examples=6), 2 * BLOCK)
            q, k, v = (torch.randn(1, 4, len(row), 16) for _ in range(3))
            tree = TreeRow.of(row, CPU)
            found = flex_tree_attention(q, k, v, tree, shape)
            assert_same([found], [dense_attention(q, k, v, tree, shape)], 2e-6)
            assert len(made) == wanted


def test_flex_says_what_it_cannot_compute():
    narrow = torch.empty(1, 4, 8, 8, device="meta")
    assert "no dropout" in (flex_refuses(narrow, Shape(dropout=0.1)) or "")
    assert "narrower than 16" in (flex_refuses(narrow, Shape()) or "")
    assert flex_refuses(torch.empty(1, 4, 8, 80, device="meta"), Shape()) is None


def test_sequences_are_the_paths_of_a_row_without_branches():
    paths = [make_example(str(n), np.full(size, n), 1) for n, size in enumerate([5, 9, 2])]
    (row,) = build_rows(paths, 64)
    bounds, longest = sequences(TreeRow.of(padded(row, 300), CPU)) or (torch.empty(0), 0)
    assert bounds.tolist() == [0, 5, 14, 16, 144, 272, 300]
    assert bounds.dtype == torch.int32
    assert longest == BLOCK
    branching = TreeRow.of(random_row(0), CPU)
    assert path_starts(branching.row) is None
    assert sequences(branching) is None
    with pytest.raises(ValueError, match="branches"):
        varlen_attention(*(torch.zeros(1, 2, len(branching.row), 8) for _ in range(3)), branching, Shape())


def test_varlen_hands_the_kernel_paths_and_a_window_that_counts_as_the_kernel_does(monkeypatch):
    """The kernel is CUDA's; in its place, its documented meaning: key k is seen from q iff q - left <= k <= q."""

    def meaning(q, k, v, bounds, _bounds, _longest, _longest_key, *, scale, window_size, enable_gqa):
        assert enable_gqa
        assert window_size[1] == 0
        done = []
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            index = torch.arange(stop - start)
            distance = index[:, None] - index[None, :]
            mask = (distance >= 0) & ((window_size[0] < 0) | (distance <= window_size[0]))
            parts = (x[start:stop].transpose(0, 1) for x in (q, k, v))
            done.append(
                torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
            )
        return torch.cat(done, dim=1).transpose(0, 1)

    monkeypatch.setattr(attention_varlen, "varlen_attn", meaning)
    monkeypatch.setattr(attention_varlen, "_parameters", lambda: {"enable_gqa", "window_size"})
    (row,) = build_rows([make_example(str(n), np.full(size, n), 1) for n, size in enumerate([5, 19, 2])], 64)
    for name in ("plain", "scaled", "window"):
        wanted = outputs(dense_attention, row, SHAPES[name])
        assert_same(outputs(varlen_attention, row, SHAPES[name]), wanted, 2e-6)


def test_varlen_says_what_it_cannot_compute():
    tree = TreeRow.of(random_row(0), CPU)
    assert varlen_refuses(torch.empty(1, 4, 8, 8), tree, Shape()) == "it runs on CUDA alone"


def test_what_no_kernel_takes_is_computed_by_segments_and_said(capsys):
    row = random_row(1)
    compute = first_that_can(("varlen",))
    assert_same(outputs(compute, row, Shape()), outputs(dense_attention, row, Shape()), 2e-6)
    assert "attention by segments" in capsys.readouterr().err


def test_a_backend_that_computes_something_else_is_given_up_for_segments():
    def wrong(query, key, value, tree, shape):
        return segment_attention(query, key, value, tree, shape) * 1.1

    register("graft_wrong", wrong)
    lm = TreeLM(make_model(ON_TREES["llama"]), "graft_wrong")
    assert lm.on_trees
    assert "differ from those one by one" in (lm.backend_failed or "")
    assert lm.base.config._attn_implementation == SEGMENTS
    bloom = TreeLM(make_model(ON_TREES["bloom"]), "graft_wrong")
    assert bloom.on_trees
    assert bloom.backend_failed


def test_the_choice_by_device():
    assert pick_attention("auto", CPU).backend == SEGMENTS
    assert not pick_attention("auto", CPU).padded
    assert pick_attention("dense", CPU).backend == DENSE
    for setting in ("flex", "varlen"):
        with pytest.raises(ConfigError, match=f"attention={setting} cannot be used: .*use attention=auto"):
            pick_attention(setting, CPU)


@pytest.mark.parametrize("budget", [8, 512, 2048, 4096, 5000, 32768])
def test_row_lengths_are_few_and_hold_the_budget(budget):
    step = row_step(budget)
    assert step % STEP == 0
    assert -(-budget // step) <= ROW_LENGTHS
    assert step < budget / ROW_LENGTHS + STEP


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mixtral-moe"])
def test_padding_changes_neither_loss_nor_gradients(family):
    examples = branching_examples()
    weight = total_weight(examples)
    found = []
    for step in (1, 100):
        lm = TreeLM(make_model(ON_TREES[family]), row_step=step)
        loss = 0.0
        for row in lm.rows(examples, 40):
            tree = lm.place(row)
            assert tree.ids.shape[1] % step == 0
            share = row_loss(lm, tree).nll / weight
            share.backward()
            loss += float(share.detach())
        found.append((loss, {name: p.grad for name, p in lm.model.named_parameters() if p.grad is not None}))
    (loss, gradients), (padded_loss, padded_gradients) = found
    assert padded_loss == pytest.approx(loss, abs=1e-6)
    assert gradients.keys() == padded_gradients.keys()
    for name, gradient in gradients.items():
        error = float((padded_gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-7))
        assert error < 1e-5, name


def test_padding_is_short_paths_that_nothing_sees():
    row = random_row(2)
    size = len(row)
    longer = padded(row, size + 300)
    assert visible(longer)[:size, size:].sum() == visible(longer)[size:, :size].sum() == 0
    assert np.array_equal(visible(longer)[:size, :size], visible(row))
    assert longer.weight[size:].sum() == 0
    assert longer.depth[size:].max() == 127
    assert padded(row, size) is row
    with pytest.raises(ValueError, match="cannot be padded"):
        padded(row, size - 1)


GPU = torch.device("cuda")
CUDA_KINDS = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("NOT TESTED: no CUDA device")
    return GPU


@pytest.mark.gpu
@CUDA_KINDS
@pytest.mark.parametrize("name", SHAPES)
def test_flex_on_a_gpu(gpu, name, dtype, bound):
    row = padded(random_row(3, examples=12), 3 * BLOCK)
    wanted = outputs(dense_attention, row, SHAPES[name], size=32)
    assert_same(outputs(flex_tree_attention, row, SHAPES[name], dtype, gpu, size=32), wanted, bound)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "size"), [((28, 4), 128), ((14, 2), 64), ((12, 12), 80), ((8, 4), 256)])
def test_flex_takes_the_heads_of_real_models(gpu, heads, size):
    row = padded(random_row(3, examples=12), 3 * BLOCK)
    wanted = outputs(dense_attention, row, Shape(), heads=heads, size=size)
    assert_same(outputs(flex_tree_attention, row, Shape(), torch.bfloat16, gpu, heads, size), wanted, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["plain", "scaled", "window"])
@pytest.mark.parametrize(("heads", "size"), [((4, 2), 32), ((28, 4), 128)])
def test_varlen_on_a_gpu(gpu, name, heads, size):
    (row,) = build_rows([make_example(str(n), np.full(long, n), 1) for n, long in enumerate([5, 190, 2, 300])], 512)
    row = padded(row, 640)
    wanted = outputs(dense_attention, row, SHAPES[name], heads=heads, size=size)
    found = outputs(varlen_attention, row, SHAPES[name], torch.bfloat16, gpu, heads, size)
    assert_same(found, wanted, 2e-2)


@pytest.mark.gpu
def test_flex_compiles_once_for_rows_of_one_length(gpu):
    for seed in range(3):
        row = padded(random_row(seed, examples=6), 3 * BLOCK)
        outputs(flex_tree_attention, row, Shape(window=9), torch.bfloat16, gpu, size=64)
        if seed == 0:
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen2", "gemma2-window-softcap", "gpt-oss-sinks", "bloom"])
def test_trees_on_a_gpu_are_exact(gpu, family):
    config = ON_TREES[family]
    config = config.__class__(
        **(config.to_dict() | {"hidden_size": 64} | ({"head_dim": 16} if "head_dim" in config.to_dict() else {}))
    )
    choice = pick_attention("auto", gpu)
    assert choice.backend != SEGMENTS
    lm = TreeLM(make_model(config).to(gpu), choice.backend, row_step=BLOCK)
    assert lm.on_trees
    assert lm.backend_failed is None
