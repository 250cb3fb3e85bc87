"""Generation on trees: each answer is what transformers generates for the prompt alone, however rows are filled."""

import pytest
import torch
from tiny import GROUPED, ON_TREES, ONE_PER_ROW, VOCABULARY, make_model
from transformers import GenerationConfig, Llama4TextConfig, LlamaConfig, Phi3Config

from graft.config.train import Sampling
from graft.errors import InputError
from graft.model import device
from graft.model.answers import flight, kept, padded, room
from graft.model.answers.generate import generate_batch, generate_in_batches
from graft.model.answers.room import Budget, Generated
from graft.model.answers.stream import Stream
from graft.model.trees import TreeLM

STOPS = (5, 6)


def _some(draw: torch.Generator, count: int) -> list[int]:
    return torch.randint(7, VOCABULARY, (count,), generator=draw).tolist()


def _prompts(stem: int = 40) -> list[list[int]]:
    """A shared stem, a branch that some share beyond it, a prompt that is the beginning of others, lengths 1 to 30."""
    draw = torch.Generator().manual_seed(3)
    first, branch = _some(draw, stem), _some(draw, 20)
    tails = [branch + _some(draw, 5), branch, branch + _some(draw, 1), *(_some(draw, n) for n in (3, 30, 12, 1, 7, 9))]
    return [first + tail for tail in tails]


def _alone(model, prompts, most: int) -> list[Generated]:
    """By transformers' own `generate`, one prompt at a time."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=list(STOPS), pad_token_id=0)
    model.generation_config = GenerationConfig()
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        stopped = ids[-1] in STOPS
        found.append(Generated(tuple(ids[: len(ids) - stopped]), stopped))
    return found


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, int, int]]:
    """Per row of new prompts: tokens fed, prompts in it, and whether the stem was known."""
    seen = []
    original = flight._Flight._logits

    def watched(self, row, nodes):
        if nodes is not None:
            seen.append((row.ids.shape[1], len(nodes), row.skip))
        return original(self, row, nodes)

    monkeypatch.setattr(flight._Flight, "_logits", watched)
    return seen


@pytest.mark.parametrize("family", ON_TREES)
def test_each_answer_is_that_of_transformers_for_the_prompt_alone(family, monkeypatch, reads):
    prompts, most = _prompts(), 12
    wanted = _alone(make_model(ON_TREES[family]), prompts, most)
    assert len({answer.ids for answer in wanted}) > 5
    lm = TreeLM(make_model(ON_TREES[family]))
    assert lm.on_trees
    assert generate_batch(lm, prompts, STOPS, Sampling(max_new_tokens=most)) == wanted
    ((fed, count, _),) = reads  # the prompts were one row, the stem and the branch in it once
    assert count == len(prompts)
    assert fed == 40 + 20 + sum((5, 1, 3, 30, 12, 1, 7, 9))
    monkeypatch.setattr(flight, "MOST_ROWS", 4)  # prompts join while others go on, behind the known stem
    assert generate_batch(lm, prompts, STOPS, Sampling(max_new_tokens=most)) == wanted
    assert {skip for _, _, skip in reads[1:]} == {0, 40}


@pytest.mark.parametrize("family", ["llama", "gemma2-window-softcap", "bloom"])
def test_prompts_without_a_stem_and_of_two_system_texts(family):
    draw = torch.Generator().manual_seed(0)
    stems = [_some(draw, 70), _some(draw, 80)]
    prompts = [stem + _some(draw, 4 + n % 5) for n in range(18) for stem in stems] + [
        _some(draw, n) for n in (1, 2, 25)
    ]
    wanted = _alone(make_model(ON_TREES[family]), prompts, 6)
    lm = TreeLM(make_model(ON_TREES[family]))
    assert generate_batch(lm, prompts, STOPS, Sampling(max_new_tokens=6)) == wanted
    assert sorted(group.stem for group in flight.group_prompts(prompts)) == [0, 70, 80]


@pytest.mark.parametrize("family", ONE_PER_ROW)
def test_a_model_that_is_not_exact_on_trees_answers_all_the_same(family):
    prompts = _prompts(10)[:4]
    lm = TreeLM(make_model(ONE_PER_ROW[family]))
    assert not lm.on_trees
    sampling = Sampling(max_new_tokens=5)
    alone = [generate_batch(make_model(ONE_PER_ROW[family]), [prompt], STOPS, sampling)[0] for prompt in prompts]
    assert generate_batch(lm, prompts, STOPS, sampling) == alone


@pytest.fixture(scope="module")
def lm():
    return TreeLM(make_model(LlamaConfig(**{**ON_TREES["llama"].to_dict(), "max_position_embeddings": 80})))


def test_the_comparison_can_fail_a_stem_that_is_one_token_off_changes_answers(lm, monkeypatch):
    prompts, sampling = _prompts(), Sampling(max_new_tokens=8)
    wanted = generate_batch(lm, prompts, STOPS, sampling)
    original = kept.NextRow._unseen

    def without_the_first_key(self, keys, window):
        unseen = original(self, keys, window).clone()
        unseen[..., 0] = True
        return unseen

    monkeypatch.setattr(kept.NextRow, "_unseen", without_the_first_key)
    assert generate_batch(lm, prompts, STOPS, sampling) != wanted


@pytest.mark.parametrize(
    "changes", [{"temperature": 1.0, "top_p": 0.95, "seed": 3}, {"repetition_penalty": 1.5}, {}], ids=str
)
def test_answers_do_not_depend_on_rows_order_or_trees(lm, monkeypatch, changes):
    prompts, sampling = _prompts(), Sampling(max_new_tokens=14, **changes)
    wanted = [generate_batch(lm.model, [prompt], STOPS, sampling)[0] for prompt in prompts]
    assert generate_batch(lm, prompts, STOPS, sampling) == wanted
    for rows in (2, 5):
        monkeypatch.setattr(flight, "MOST_ROWS", rows)
        assert generate_batch(lm, prompts[::-1], STOPS, sampling) == wanted[::-1]
    assert {len(answer.ids) for answer in wanted} != {14}


def test_equal_prompts_are_answered_once_and_each_gets_the_answer(lm, reads):
    prompts = _prompts()[:3]
    sampling = Sampling(max_new_tokens=5, temperature=1.0)
    once = generate_batch(lm, prompts, STOPS, sampling)
    assert generate_batch(lm, [*prompts, *prompts[::-1]], STOPS, sampling) == [*once, *once[::-1]]
    assert [count for _, count, _ in reads] == [3, 3]


def test_the_context_ends_answers_row_by_row(lm):
    prompts = _prompts()
    answers = generate_batch(lm, prompts, (), Sampling(max_new_tokens=20))
    assert [len(answer.ids) for answer in answers] == [min(20, 80 - len(prompt)) for prompt in prompts]
    assert {len(answer.ids) for answer in answers} == {10, 15, 19, 20}


def test_answers_are_given_out_as_they_end_and_the_attention_is_the_trees_meanwhile(lm):
    prompts = [prompt for prompt in _prompts() if len(prompt) < 60]
    own = lm.base.config._attn_implementation
    batches = []
    for batch in generate_in_batches(lm, prompts, STOPS, Sampling(max_new_tokens=14)):
        assert lm.base.config._attn_implementation == own
        assert not torch.is_inference_mode_enabled()
        batches.append([index for index, _ in batch])
    assert len(batches) > 1
    assert sorted(index for batch in batches for index in batch) == list(range(len(prompts)))


def test_rows_keep_to_the_memory_that_is_free(lm, monkeypatch, reads):
    prompts, sampling = _prompts(), Sampling(max_new_tokens=6)
    wanted = generate_batch(lm, prompts, STOPS, sampling)
    reads.clear()
    budget = Budget.of(lm.model)
    three = 3 * (budget.per_row + budget.per_token * (max(map(len, prompts)) - 40 + 6))
    monkeypatch.setattr(room, "free_bytes", lambda device: int(2 * three))
    assert generate_batch(lm, prompts, STOPS, sampling) == wanted
    assert reads[0][1] == 3


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: no")]
)
def test_running_out_of_memory_halves_the_rows_and_changes_no_answer(lm, monkeypatch, error):
    prompts, sampling = _prompts(), Sampling(max_new_tokens=9, temperature=1.0)
    wanted = generate_batch(lm, prompts, STOPS, sampling)
    tried, said = [], []
    original = flight._Flight._logits

    def small(self, row, nodes):
        tried.append(self.tried)
        if self.tried > 3:
            raise error
        return original(self, row, nodes)

    monkeypatch.setattr(flight._Flight, "_logits", small)
    monkeypatch.setattr(flight, "warn_once", said.append)
    assert generate_batch(lm, prompts, STOPS, sampling) == wanted
    assert tried[:3] == [9, 4, 2]
    assert max(tried[2:]) == 2
    assert said
    monkeypatch.setattr(flight._Flight, "_logits", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match=r"too small for one answer: the prompt has \d+ tokens and 9 may follow"):
        generate_batch(lm, prompts, STOPS, sampling)


def test_padded_batches_halve_too(lm, monkeypatch):
    prompts, sampling = _prompts(), Sampling(max_new_tokens=5)
    wanted = generate_batch(lm.model, prompts, STOPS, sampling)
    original, tried = padded._by_steps, []

    def small(model, batch, *others):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, batch, *others)

    monkeypatch.setattr(padded, "_by_steps", small)
    assert generate_batch(lm.model, prompts, STOPS, sampling) == wanted
    assert tried == [9, 4, 2, 2, 2, 2, 1]


def test_another_error_is_not_taken_for_a_lack_of_memory(lm, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(flight._Flight, "_logits", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate_batch(lm, _prompts(), STOPS, Sampling(max_new_tokens=2))


def test_positions_that_change_with_the_longest_text_are_computed_alone():
    """LongRoPE takes other frequencies for all texts of a batch when one of them is long."""
    config = _with_longrope(ON_TREES["phi3"])
    model = make_model(config)
    assert room.same_positions_up_to(model) == 48
    prompts, sampling = _prompts(20), Sampling(max_new_tokens=10)
    lm = TreeLM(make_model(config))
    answers = generate_batch(lm, prompts, STOPS, sampling)
    assert answers == [generate_batch(model, [prompt], STOPS, sampling)[0] for prompt in prompts]
    assert any(len(prompt) + 10 > 48 for prompt in prompts)
    assert any(len(prompt) + 10 <= 48 for prompt in prompts)
    crossing = [prompt for prompt in prompts if len(prompt) <= 48 < len(prompt) + 10]
    assert crossing, "no answer grows into a long text"
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = _without_a_cache(model, prompt, 10)
        assert list(answer.ids) == wanted
        assert list(Stream(model, prompt, STOPS, sampling)) == wanted


def _without_a_cache(model, prompt: list[int], most: int) -> list[int]:
    """Greedy, by the model's own forward of the whole text for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most:
        with torch.no_grad():
            token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in STOPS:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_a_model_that_counts_padding_answers_long_texts_alone():
    """Llama 4 scales queries by a token's index in what it is given, anew every `floor_scale` tokens."""
    config = Llama4TextConfig(
        head_dim=8, num_local_experts=4, intermediate_size_mlp=48, no_rope_layers=[1, 0], attn_temperature_tuning=True,
        floor_scale=16, attn_scale=3.0, **GROUPED,
    )  # fmt: skip
    model = make_model(config)
    prompts = [prompt[:length] for prompt, length in zip(_prompts(20), (9, 18, 28, 13, 3, 30), strict=False)]
    assert room.same_positions_up_to(model) == 15
    answers = generate_batch(model, prompts, STOPS, Sampling(max_new_tokens=10))
    assert [list(answer.ids) for answer in answers] == [_without_a_cache(model, prompt, 10) for prompt in prompts]


def _with_longrope(config: Phi3Config) -> Phi3Config:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 48,
    }
    return Phi3Config(**{**config.to_dict(), "rope_parameters": rope, "original_max_position_embeddings": 48})


def test_free_memory_is_read():
    assert device.free_bytes(torch.device("cpu")) > 2**20
