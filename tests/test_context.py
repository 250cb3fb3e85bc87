"""A row split over processes: the numbers of one process, whatever the model, the backend and what is trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import CPU, SHAPES, assert_same, random_row
from test_attention_parts import long_branches
from test_ranks import assert_same_course, numbers, run_on, settings_for
from tiny import (
    BY_MASKS,
    GROUPED,
    ON_TREES,
    ONE_PER_ROW,
    SIZES,
    branching_examples,
    make_example,
    make_model,
    make_model_folder,
    write_rows,
)
from together import together
from transformers import Llama4TextConfig, LlamaConfig, MixtralConfig, Phi3Config

from graft.errors import ConfigError
from graft.model.attention.attend import Shape
from graft.model.attention.flex import BLOCK, FLEX, blocks_of, flex_tree_attention
from graft.model.attention.parts import Parts
from graft.model.attention.pieces import Pieces
from graft.model.attention.segments import TreeRow, dense_attention, segment_attention
from graft.model.device import pick_precision
from graft.model.processes import context as context_module
from graft.model.processes.context import Context, Share
from graft.model.processes.ranks import Ranks, ranks_from_environment
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import trainable
from graft.runs import RunFolder
from graft.tokens.deal import Prices
from graft.tokens.split_row import BLOCKS, held_by, nodes_of, split_row
from graft.tokens.tree import build_rows, padded, segments, total_weight, visible
from graft.train.costs.checkpointing import activation_bytes_per_token
from graft.train.loop import train
from graft.train.loss import row_loss
from graft.train.processes.together import refuse_with_ranks
from graft.train.step import Stepper
from graft.types import Row

FP32 = pick_precision("fp32", CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama-tied", tie_word_embeddings=True)


def cut_for(row: Row, processes: int) -> Row:
    step = processes * BLOCKS
    return padded(row, -(-len(row) // step) * step)


def shares_of(row: Row, processes: int) -> list[Share]:
    return [Share(Context(processes, index, None), row, CPU) for index in range(processes)]


def test_every_node_is_held_once_and_each_process_has_as_many():
    row = cut_for(random_row(0, examples=20), 4)
    shares = shares_of(row, 4)
    assert len({len(share.nodes) for share in shares}) == 1
    assert sorted(np.concatenate([share.nodes for share in shares])) == list(range(len(row)))
    for share in shares:
        assert np.array_equal(share.nodes[share.place[share.nodes]], share.nodes)
        assert all(share.of_all[i] == shares[i].held for i in range(4))
    with pytest.raises(ValueError, match="equal blocks"):
        split_row(random_row(0, examples=3), 7, Prices())


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_the_split_is_even_in_work(processes):
    rng = np.random.default_rng(0)
    prices = Prices(node=100, pair=1, target=30)
    stem = rng.integers(3, 97, 1500)
    rows = {
        "a document": [make_example("d", rng.integers(3, 97, 4000), 1)],
        "a document and its answer": [make_example("d", rng.integers(3, 97, 4000), 3600)],
        "answers to a document": [
            make_example(str(n), np.concatenate([stem, rng.integers(3, 97, 200)]), 1500) for n in range(8)
        ],
        "conversations": [make_example(str(n), rng.integers(3, 97, rng.integers(50, 400)), 40) for n in range(20)],
    }
    for name, examples in rows.items():
        row = cut_for(build_rows(examples, 10_000)[0], processes)
        predicts = np.zeros(len(row))
        np.add.at(predicts, row.parent[(row.weight != 0) & (row.parent >= 0)], 1)
        cost = prices.node + prices.pair * (row.depth + 1.0) + prices.target * predicts
        owner = split_row(row, processes, prices)
        work = [cost[nodes_of(held_by(owner, len(row), process))].sum() for process in range(processes)]
        assert max(work) <= 1.06 * np.mean(work), name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.sampled_from([None, 5]), st.sampled_from([None, 8]))
def test_parts_and_pieces_of_all_processes_are_what_is_seen_and_nothing_twice(seed, processes, window, chunk):
    row = cut_for(random_row(seed), processes)
    by_parts, by_pieces = (np.zeros((len(row), len(row)), int) for _ in range(2))
    for share in shares_of(row, processes):
        parts = Parts.of(segments(row), share.held)
        for queries, keys in (block for run in parts.runs for block in run):
            asked, among = queries.stop - queries.start, keys.stop - keys.start
            by_parts[share.nodes[queries], keys] += np.tri(asked, among, among - asked, dtype=int)
        for queries, keys in parts.below:
            by_parts[share.nodes[queries], keys] += 1
        for piece in Pieces.of(segments(row), share.held, window, chunk).pieces:
            keys = np.concatenate([np.arange(part.start, part.stop) for part in piece.keys])
            asked, among = piece.size
            assert np.array_equal(row.depth[keys], piece.first + np.arange(among)), "a path, from its first depth on"
            by_pieces[np.ix_(share.nodes[piece.queries], keys)] += np.tri(asked, among, among - asked, dtype=int)
    seen = visible(row)
    assert np.array_equal(by_parts, seen.astype(int))
    assert by_pieces.max() == 1
    assert not (by_pieces & ~seen).any()
    if window is not None:
        seen &= row.depth[:, None] - row.depth[None, :] < window
    if chunk is not None:
        seen &= row.depth[:, None] // chunk == row.depth[None, :] // chunk
    assert not (seen & ~by_pieces.astype(bool)).any()


def split_outputs(compute, row: Row, shape: Shape, processes: int, heads=(4, 2), size: int = 8):
    """As `outputs` of test_attention, each process's queries by themselves: outputs joined, gradients added up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, len(row), size, generator=generator) for h in (heads[0], heads[1], heads[1]))
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    sinks = None if shape.sinks is None else shape.sinks.clone().requires_grad_()
    shape = Shape(shape.scaling, shape.window, shape.softcap, sinks, shape.slopes, chunk=shape.chunk)
    out = torch.zeros(1, heads[0], len(row), size)
    for share in shares_of(row, processes):
        nodes = torch.from_numpy(share.nodes)
        found = compute(q[:, :, nodes], k, v, TreeRow.of(row, CPU, share), shape)
        out = out.index_copy(2, nodes, found)
    leaves = [q, k, v] + ([] if sinks is None else [sinks])
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def whole_outputs(row: Row, shape: Shape):
    from test_attention import outputs

    if shape.chunk is None:
        return outputs(dense_attention, row, shape)
    return outputs(lambda q, k, v, tree, _: dense_attention(q, k, v, tree, shape), row, shape)


ALL_SHAPES = SHAPES | {"chunk": Shape(chunk=8), "chunk and window": Shape(chunk=16, window=5)}


@pytest.mark.parametrize("name", ALL_SHAPES)
@pytest.mark.parametrize("processes", [2, 4])
def test_segments_of_a_split_row_equal_the_dense_mask(name, processes, monkeypatch):
    monkeypatch.setattr("graft.model.attention.pieces.MOST_QUERIES", 50)  # several pieces of a run
    for row in (cut_for(long_branches(), processes), cut_for(random_row(3, examples=12), processes)):
        wanted = whole_outputs(row, ALL_SHAPES[name])
        assert_same(split_outputs(segment_attention, row, ALL_SHAPES[name], processes), wanted, 2e-6)


@pytest.mark.parametrize("name", SHAPES)
def test_flex_and_dense_of_a_split_row_equal_the_dense_mask(name, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    row = padded(long_branches(), 8 * BLOCK)
    wanted = whole_outputs(row, SHAPES[name])
    assert_same(split_outputs(dense_attention, row, SHAPES[name], 2), wanted, 2e-6)
    assert_same(split_outputs(flex_tree_attention, row, SHAPES[name], 2), wanted, 5e-6)  # as of the whole row


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 16]), st.sampled_from([None, 3, 20]))
def test_the_blocks_of_a_share_are_those_of_the_dense_mask(seed, block, window):
    row = cut_for(random_row(seed), 3)
    seen = visible(row)
    if window is not None:
        seen &= row.depth[:, None] - row.depth[None, :] < window
    for share in shares_of(row, 3):
        rows, columns = (-(-size // block) for size in (len(share.nodes), len(row)))
        whole = np.zeros((rows * block, columns * block), bool)
        whole[: len(share.nodes), : len(row)] = seen[share.nodes]
        by_block = whole.reshape(rows, block, columns, block)
        found = blocks_of(row, window, block, share.nodes)
        assert not (found.partial & found.full).any()
        assert not (by_block.any((1, 3)) & ~(found.partial | found.full)).any(), "something seen is left out"
        assert not (found.full & ~by_block.all((1, 3))).any(), "something hidden is taken for full"


def test_attention_dropout_is_the_same_in_both_passes(monkeypatch):
    monkeypatch.setattr("graft.model.attention.pieces.MOST_QUERIES", 7)
    row = cut_for(random_row(3), 2)
    share = shares_of(row, 2)[0]
    q, k, v = (torch.randn(1, 2, len(row), 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    tree = TreeRow.of(row, CPU, share)

    def compute(q, k, v):
        torch.manual_seed(1)
        return segment_attention(q[:, :, share.queries], k, v, tree, Shape(dropout=0.4, softcap=3.0))

    assert torch.autograd.gradcheck(compute, (q, k, v), atol=1e-4)


FAMILIES = ON_TREES | BY_MASKS
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20,
            "short_factor": [1.0] * 4, "long_factor": [4.0, 6.0, 8.0, 9.0], "factor": 12.0}  # fmt: skip


def in_split_rows(rank: int, family: str, also: dict) -> list[str]:
    """Differences of a split row from the whole one, in loss and gradients added up over processes."""
    import torch.distributed as dist

    torch.manual_seed(0)
    ranks = ranks_from_environment()
    ranks.join(CPU)
    examples = branching_examples()
    config = LONG if family == "longrope" else FAMILIES[family]
    wanted = loss_and_gradients(TreeLM(make_model(config), **also), examples, None)
    context = Context.connect(ranks, 2, asks_again=True)
    lm = TreeLM(make_model(config), **also, context=context)
    assert lm.on_trees
    assert lm.backend_failed is None
    rows = lm.rows(examples, 512)
    assert len(rows) == (2 if family == "longrope" else 1)
    assert all(lm.place(row).ids.numel() <= lm.place(row, split=False).ids.numel() / 2 + 4 for row in rows)
    found = loss_and_gradients(lm, examples, dist.all_reduce)
    return [f"{name}: {value:.1e}" for name, value in differences(found, wanted).items() if not value < 1e-5]


LONG = Phi3Config(**GROUPED, rope_scaling=LONGROPE, original_max_position_embeddings=20)


def loss_and_gradients(lm: TreeLM, examples, summed) -> tuple[float, dict[str, torch.Tensor]]:
    weight = total_weight(examples)
    total = torch.zeros(())
    for row in lm.rows(examples, 512):
        loss = row_loss(lm, lm.place(row)).nll / weight
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad for name, p in lm.model.named_parameters() if p.grad is not None}
    for tensor in [total, *gradients.values()] if summed else []:
        summed(tensor)
    return float(total), gradients


def differences(found, wanted) -> dict[str, float]:
    assert found[1].keys() == wanted[1].keys()
    least = 1e-3 * torch.nn.utils.get_total_norm(list(wanted[1].values()))
    apart = {
        name: float((found[1][name] - value).norm() / value.norm().clamp_min(least))
        for name, value in wanted[1].items()
    }
    return apart | {"loss": 10 * abs(found[0] / wanted[0] - 1)}


@pytest.mark.parametrize("family", [*FAMILIES, "longrope"])
def test_a_split_row_has_the_loss_and_gradients_of_a_whole_one(family):
    assert together(2, in_split_rows, family, {}) == [[], []]


def test_flex_splits_rows_too(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()  # else the processes inherit the sizes that other tests have taught it
    for family in ("llama", "gemma2-window-softcap", "gpt-oss-sinks", "bloom"):
        assert together(2, in_split_rows, family, {"backend": FLEX, "row_step": 2 * BLOCK}) == [[], []]


def test_checkpointed_layers_collect_again_in_the_backward_pass():
    assert together(2, with_checkpoints) == [[], []]


def with_checkpoints(rank: int) -> list[str]:
    import torch.distributed as dist

    ranks = ranks_from_environment()
    ranks.join(CPU)
    examples = branching_examples()
    wanted = loss_and_gradients(TreeLM(make_model(ON_TREES["gemma2-window-softcap"])), examples, None)
    model = make_model(ON_TREES["gemma2-window-softcap"])
    lm = TreeLM(model, context=Context.connect(ranks, 2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = loss_and_gradients(lm, examples, dist.all_reduce)
    return [f"{name}: {value:.1e}" for name, value in differences(found, wanted).items() if not value < 1e-5]


def kept_per_token(rank: int, size: int) -> list[float]:
    """Bytes that a process keeps per token of a row: whole rows, split ones, and those whose keys are all kept."""
    ranks = ranks_from_environment()
    ranks.join(CPU)
    config = LlamaConfig(**SIZES)  # as many key heads as heads: what is kept of keys counts
    found = [activation_bytes_per_token(TreeLM(make_model(config)), FP32)]
    lm = TreeLM(make_model(config), context=Context.connect(ranks, size, asks_again=True))
    found.append(activation_bytes_per_token(lm, FP32))
    lm.context.asks_again = False
    return [*found, activation_bytes_per_token(lm, FP32)]


@pytest.mark.parametrize("size", [2, 4])
def test_what_a_process_keeps_falls_with_the_number(size):
    for whole, split, all_keys in together(size, kept_per_token, size):
        assert split < 1.1 * whole / size
        layers, width, bytes_of_fp32 = 2, 32, 4
        kept_of_others = 2 * layers * width * bytes_of_fp32 * (1 - 1 / size)
        assert all_keys - split == kept_of_others


def test_the_balance_of_experts_is_that_of_the_whole_step(tmp_path):
    base = make_model_folder(tmp_path / "mixtral", MixtralConfig, num_local_experts=4)
    also = ["method=full", "router_aux_loss=0.5", "encode.max_length=64", "row_tokens=64"]  # several rows per step
    alone = train(settings_for(base, tmp_path, "alone", *also))
    found = run_on(4, settings_for(base, tmp_path, "four", *also, "context_ranks=2"))
    assert_same_course(alone, found)
    balances = [
        [row["router_aux_loss"] for row in run.read_metrics() if row["kind"] == "train"] for run in (alone, found)
    ]
    np.testing.assert_allclose(*balances, rtol=1e-6)
    assert min(balances[0]) > 0


def refused_at_load(rank: int, family: str) -> str:
    ranks = ranks_from_environment()
    ranks.join(CPU)
    config = TUNED_BY_INDEX if family == "llama4" else ONE_PER_ROW[family]
    try:
        TreeLM(make_model(config), context=Context.connect(ranks, 2))
    except ConfigError as error:
        return str(error)
    return "not refused"


TUNED_BY_INDEX = Llama4TextConfig(
    head_dim=8, attention_chunk_size=8, num_local_experts=4, intermediate_size_mlp=48, floor_scale=8192, **GROUPED
)


@pytest.mark.parametrize(("family", "why"), [("rwkv", "recurrent"), ("llama4", "attn_temperature_tuning")])
def test_what_cannot_be_split_is_refused_with_the_reason(family, why):
    for said in together(2, refused_at_load, family):
        assert said.startswith("context_ranks: the model cannot compute a row in 2 processes"), said
        assert why in said, said
        assert "leave context_ranks out" in said


def test_a_split_that_is_not_exact_is_refused_by_all():
    said = together(2, with_a_fault)
    assert all("its logits then differ by" in text for text in said), said


def with_a_fault(rank: int) -> str:
    ranks = ranks_from_environment()
    ranks.join(CPU)
    collect = context_module._Kept.collect

    def wrong(self):
        keys, values = collect(self)
        return [keys, values * (1.1 if rank else 1.0)]

    context_module._Kept.collect = wrong
    try:
        TreeLM(make_model(ON_TREES["llama"]), context=Context.connect(ranks, 2))
    except ConfigError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("how", ["lora", "full", "tied lora", "tied full"])
def test_a_run_over_two_processes_to_a_row_is_that_of_one(base, tied, tmp_path, how):
    model, method = (tied, how.split()[1]) if " " in how else (base, how)
    alone = train(settings_for(model, tmp_path, "alone", f"method={method}"))
    two = run_on(2, settings_for(model, tmp_path, "two", f"method={method}", "context_ranks=2"))
    assert_same_course(alone, two)


def branching_conversations() -> list[dict]:
    """A long system prompt before all, and three answers to each question."""
    system = {"role": "system", "content": "0 1 2 3 4 5 6 7 8 9 + - = " * 2}
    return [
        {"id": f"row-{n}", "messages": [
            system,
            {"role": "user", "content": f"What is {n // 3} + {n // 3} + 1? " * 2},
            {"role": "assistant", "content": f"{n} {n + 1} {n * n}" * (1 + n % 3)},
        ]}
        for n in range(40)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        ["context_ranks=2"],
        ["context_ranks=4"],
        ["context_ranks=2", "shard_ranks=1"],
        ["context_ranks=2", "shard_ranks=2"],
        ["context_ranks=4", "shard_ranks=2"],
        ["context_ranks=2", "checkpointing=full"],
        ["context_ranks=2", "checkpointing=full", "checkpoint_every=2"],
        ["context_ranks=2", "trees=false"],
        ["context_ranks=4", "trees=false", "method=full"],
        ["context_ranks=2", "loss=dft"],
        ["context_ranks=2", "label_smoothing=0.1"],
        ["context_ranks=2", "checkpointing=selective"],
        ["context_ranks=2", "checkpointing=auto"],
        ["context_ranks=2", "optimizer=adafactor", "method=full"],
        ["context_ranks=2", "attention=dense"],
    ],
    ids=" ".join,
)
def test_a_run_over_four_processes_is_that_of_one(base, tmp_path, settings):
    write_rows(tmp_path / "data.jsonl", branching_conversations())
    shared = ("trees", "method", "loss", "label", "checkpoint", "optimizer")
    alone = train(settings_for(base, tmp_path, "alone", *[text for text in settings if text.startswith(shared)]))
    four = run_on(4, settings_for(base, tmp_path, "four", *settings))
    assert_same_course(alone, four)
    size = int(settings[0][-1])
    traced = [json.loads(line) for line in four.trace.read_text().splitlines()]
    assert {row["rank"] for step in traced for row in step["rows"]} == set(range(0, 4, size))
    sharing = max(row["sharing"] for row in four.read_metrics() if row["kind"] == "train")
    assert sharing == 1 if "trees=false" in settings else sharing > 1.2
    computed = [row["tokens_computed"] for row in four.read_metrics() if row["kind"] == "train"]
    assert computed == [sum(row["nodes"] for row in step["rows"]) for step in traced]


@pytest.mark.parametrize(
    ("setting", "within"), [("precision=bf16", 1e-2), ("precision=fp16", 1e-2), ("quantize=nf4", 1e-5)]
)
def test_other_formats_are_one_run_too(base, tmp_path, setting, within):
    alone = train(settings_for(base, tmp_path, "alone", setting))
    two = run_on(2, settings_for(base, tmp_path, "two", setting, "context_ranks=2"))
    np.testing.assert_allclose(numbers(two), numbers(alone), rtol=within)


def test_noise_of_a_group_is_that_of_one_process(base, tmp_path):
    alone = train(settings_for(base, tmp_path, "alone", "neftune_alpha=5"))
    two = run_on(2, settings_for(base, tmp_path, "two", "neftune_alpha=5", "context_ranks=2"))
    assert_same_course(alone, two)
    quiet = train(settings_for(base, tmp_path, "quiet"))
    assert abs(numbers(quiet)[:, 1] / numbers(alone)[:, 1] - 1).max() > 1e-4


def test_dropout_is_drawn_for_each_node_by_itself_and_again_the_same(base, tmp_path):
    runs = [
        run_on(2, settings_for(base, tmp_path, name, "lora.dropout=0.3", "context_ranks=2", "max_steps=3"))
        for name in ("one", "other")
    ]
    assert np.array_equal(*map(numbers, runs))
    plain = run_on(2, settings_for(base, tmp_path, "plain", "context_ranks=2", "max_steps=3", "lora.dropout=0"))
    assert not np.array_equal(numbers(plain), numbers(runs[0]))
    assert together(2, dropped) == together(2, dropped)
    first, second = together(2, dropped)
    assert first != second


def dropped(rank: int) -> list[bool]:
    """Which features of its nodes' embeddings a process drops."""
    ranks = ranks_from_environment()
    ranks.join(CPU)
    model = make_model(ON_TREES["llama"])
    lm = TreeLM(model, context=Context.connect(ranks, 2))
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(
        lambda _m, _i, out: seen.append(torch.nn.functional.dropout(torch.ones_like(out)) == 0)
    )
    stepper = Stepper(lm, trainable(model), torch.optim.SGD(model.parameters(), 0.1), FP32, None, seed=0, ranks=ranks)
    (row,) = lm.rows(branching_examples(), 512)
    stepper.accumulate(row, (0, 0), 1.0)
    return seen[-1].flatten().tolist()


def test_a_run_goes_on_with_other_context_ranks(base, tmp_path):
    common = ("epochs=2", "save_every=1", "keep_last=99")
    alone = train(settings_for(base, tmp_path, "alone", *common))
    steps = sorted(int(folder.name.removeprefix("step-")) for folder in alone.checkpoints.iterdir())
    begun = RunFolder(tmp_path / "begun")
    shutil.copytree(alone.root, begun.root)
    for (size, ranks), last in (((2, 2), steps[1]), ((4, 2), steps[2]), ((4, 4), steps[3]), ((2, 1), steps[4])):
        shutil.rmtree(begun.final)
        for step in steps:
            if step > last:
                shutil.rmtree(begun.checkpoints / f"step-{step}", ignore_errors=True)
        run_on(size, settings_for(base, tmp_path, "begun", *common, "resume=true", f"context_ranks={ranks}"))
        assert_same_course(alone, begun)


@pytest.mark.parametrize(
    ("size", "asked", "said"),
    [
        (1, 2, "over 2 processes, but this run has 1; start it with graft train --gpus 2"),
        (4, 3, "3 processes to a row, but 4 processes cannot be divided so; choose a divisor of 4"),
        (2, 4, "4 processes to a row, but 2 processes cannot be divided so"),
    ],
)
def test_numbers_that_do_not_divide_are_refused_before_anything_is_read(base, tmp_path, size, asked, said):
    settings = settings_for(base, tmp_path, "run", f"context_ranks={asked}")
    with pytest.raises(ConfigError, match="context_ranks: .*" + said):
        refuse_with_ranks(settings, Ranks(size=size))
    refuse_with_ranks(settings, Ranks(size=4 * asked))


def test_sequences_cannot_be_split(base, tmp_path):
    with pytest.raises(ConfigError, match="attention=varlen computes whole sequences, but context_ranks 2"):
        settings_for(base, tmp_path, "run", "context_ranks=2", "attention=varlen")
