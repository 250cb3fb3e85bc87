"""The numbers contract: a tree computes the same loss and the same gradients as its examples one by one."""

from functools import partial

import pytest
import torch
from tiny import BY_MASKS, GROUPED, ON_TREES, ONE_PER_ROW, branching_examples, make_model
from transformers import Llama4TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from graft.config.train import Lora
from graft.model.attention.row_mask import RowMask
from graft.model.attention.segments import DENSE, SEGMENTS, RowMissing, TreeRow
from graft.model.long_texts import LongTexts
from graft.model.trees import TreeLM
from graft.model.tuned.adapters import add_lora
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


@pytest.mark.parametrize("family", ON_TREES | BY_MASKS)
def test_a_tree_equals_one_by_one_for_loss_and_every_gradient(family):
    examples = branching_examples()
    model = make_model((ON_TREES | BY_MASKS)[family])
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    assert lm.why_not is None
    assert lm.row_in_masks == (family in BY_MASKS)
    for row_tokens, least_rows in ((512, 1), (40, 2), (29, 3)):
        found = in_rows(lm, examples, row_tokens)
        assert found[2] >= least_rows
        assert_equal_numbers(found, wanted)


@pytest.mark.parametrize(
    "family", ["llama", "mistral-window", "bloom", "gemma2-window-softcap", "gpt-oss-sinks", "llama4-chunks"]
)
def test_segments_equal_the_dense_mask(family):
    examples = branching_examples(seed=5)
    dense = in_rows(TreeLM(make_model((ON_TREES | BY_MASKS)[family]), DENSE), examples, 512)
    found = in_rows(TreeLM(make_model((ON_TREES | BY_MASKS)[family]), SEGMENTS), examples, 512)
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


def test_a_window_that_stands_in_the_mask_alone_reaches_the_attention():
    examples = branching_examples()
    model = make_model(ON_TREES["gemma2-window-softcap"])
    wanted = one_by_one(model, examples)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    lm = TreeLM(model)
    assert lm.on_trees
    assert lm.row_in_masks
    assert_equal_numbers(in_rows(lm, examples, 512), wanted)
    lm.row_in_masks = False  # by argument alone the window would be lost
    assert abs(in_rows(lm, examples, 512)[0] - wanted[0]) > 1e-4


def test_a_row_carried_by_masks_survives_gradient_checkpointing():
    examples = branching_examples()
    model = make_model(BY_MASKS["stablelm-drops-arguments"])
    wanted = one_by_one(model, examples)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    lm = TreeLM(model.train())
    assert lm.row_in_masks
    assert_equal_numbers(in_rows(lm, examples, 40), wanted)


def test_an_attention_that_asks_for_more_than_a_row_says_is_refused():
    """Whatever the probe's numbers are: picked keys, a bias or a changed mask may tell only in longer rows."""
    (row,) = build_rows(branching_examples(), 512)
    tree = TreeRow.of(row, torch.device("cpu"))
    mask = RowMask.of(tree)
    attention = ALL_ATTENTION_FUNCTIONS[SEGMENTS]
    qkv = [torch.randn(1, 2, len(row), 8) for _ in range(3)]
    plain, _ = attention(torch.nn.Identity(), *qkv, mask)
    by_argument, _ = attention(torch.nn.Identity(), *qkv, None, row=tree)
    assert torch.equal(plain, by_argument)
    assert mask[:, :, :, : len(row)].row is tree
    with pytest.raises(RowMissing, match="asks its attention for position_bias"):
        attention(torch.nn.Identity(), *qkv, mask, position_bias=torch.zeros(1))
    with pytest.raises(RowMissing, match="mask of its own"):
        attention(torch.nn.Identity(), *qkv, mask + 1)
    with pytest.raises(RowMissing, match="does not hand the row on"):
        attention(torch.nn.Identity(), *qkv, None)
    with pytest.raises(RowMissing, match="attends to"):
        attention(torch.nn.Identity(), qkv[0][:, :, :5], *qkv[1:], mask)


def test_examples_on_both_sides_of_longrope_are_not_in_one_row():
    examples = branching_examples()
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=24, **GROUPED)
    assert {len(example.ids) > 24 for example in examples} == {True, False}
    model = make_model(config)
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    assert lm.why_not is None
    found = in_rows(lm, examples, 512)
    assert found[2] == 2
    assert_equal_numbers(found, wanted)


def test_dynamic_positions_follow_from_each_text_alone():
    """Three texts beyond the context, the longest first: transformers would keep its frequencies for the others."""
    examples = sorted(branching_examples(), key=lambda example: -len(example.ids))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    make = partial(make_model, LlamaConfig(rope_parameters=rope, **GROUPED | {"max_position_embeddings": 24}))
    assert 2 < sum(len(example.ids) > 24 for example in examples) < len(examples)
    one = [one_by_one(make(), [example]) for example in examples]
    share = [total_weight([example]) / total_weight(examples) for example in examples]
    loss = sum(part * found[0] for part, found in zip(share, one, strict=True))
    gradients = {name: sum(part * found[1][name] for part, found in zip(share, one, strict=True)) for name in one[0][1]}
    lm = TreeLM(make())
    assert lm.why_not is None
    assert_equal_numbers(in_rows(lm, examples, 512), (loss, gradients))
    assert_equal_numbers(in_rows(lm, examples, 512), (loss, gradients))
    assert one_by_one(make(), examples)[0] != pytest.approx(loss, abs=1e-6), "the order would not have mattered"


def test_rows_of_a_model_that_counts_tokens_are_short_enough():
    """Llama 4 scales queries by a token's index in what it is given, anew every `floor_scale` tokens."""
    examples = branching_examples()
    config = Llama4TextConfig(
        head_dim=8, num_local_experts=4, intermediate_size_mlp=48, no_rope_layers=[0, 1], attn_temperature_tuning=True,
        floor_scale=28, attn_scale=2.0, **GROUPED,
    )  # fmt: skip
    assert {len(example.ids) >= 28 for example in examples} == {True, False}
    model = make_model(config)
    wanted = one_by_one(model, examples)
    lm = TreeLM(model)
    assert lm.why_not is None
    assert_equal_numbers(in_rows(lm, examples, 512), wanted)
    lm.long_texts = LongTexts(None, None)
    assert in_rows(lm, examples, 512)[0] != pytest.approx(wanted[0], abs=1e-6), "no row was too long"
