"""Generation: a batch answers what single runs answer, whatever the family, padding or folder settings."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from graft.config.train import Sampling
from graft.errors import InputError
from graft.model.answers import padded, room
from graft.model.answers.generate import generate_batch, generate_in_batches
from graft.model.answers.room import Generated, context_limit
from graft.model.answers.stream import PromptMemory, Stream

VOCAB = 96


def _tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    gated = {**shape, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, **own}
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**gated))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**gated, sliding_window=8))
    elif family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**gated, head_dim=8, sliding_window=8))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **own))
    elif family == "gptneox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=48, max_position_embeddings=64, **own))
    elif family == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, **own))
    else:
        raise AssertionError(family)
    with torch.no_grad():  # tiny random models repeat one token; larger weights make the answers differ
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4 if "embed" in name or "wte" in name else 3)
    return model.eval()


FAMILIES = ["llama", "mistral", "gemma2", "gpt2", "gptneox", "bloom"]


@pytest.fixture(scope="module")
def llama():
    return _tiny("llama")


def _prompts(count: int = 8, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 24, (count,), generator=draw).tolist()
    return [torch.randint(2, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def _obvious(model, prompt: list[int], stop_ids, most: int) -> Generated:
    """One prompt, no padding, no cache, everything computed again for each token."""
    ids, answer = list(prompt), []
    with torch.no_grad():
        while len(answer) < most:
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stop_ids:
                return Generated(tuple(answer), True)
            answer.append(token)
            ids.append(token)
    return Generated(tuple(answer), False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_greedy_batch_of_mixed_lengths_is_exactly_the_single_runs(family):
    model, prompts = _tiny(family), _prompts(10)
    free = [_obvious(model, prompt, (), 12) for prompt in prompts]
    stop_ids = (free[0].ids[5], free[1].ids[7])  # tokens that do come up, so that some rows end early
    wanted = [_obvious(model, prompt, stop_ids, 12) for prompt in prompts]
    got = generate_batch(model, prompts, stop_ids, Sampling(max_new_tokens=12), pad_id=1)
    assert got == wanted
    assert len({answer.ids for answer in wanted}) > 3
    assert {answer.stopped for answer in wanted} == {True, False}


def test_the_comparison_can_fail_padding_that_is_seen_changes_answers(llama, monkeypatch):
    prompts = _prompts(10)
    wanted = [_obvious(llama, prompt, (), 12) for prompt in prompts]
    right = padded._left_pad

    def visible_padding(*arguments):
        ids, mask, positions = right(*arguments)
        return ids, torch.ones_like(mask), positions

    monkeypatch.setattr(padded, "_left_pad", visible_padding)
    assert generate_batch(llama, prompts, (), Sampling(max_new_tokens=12)) != wanted


def test_padding_with_any_id_even_a_stop_id_changes_nothing(llama):
    prompts = _prompts(6)
    stop = _obvious(llama, prompts[0], (), 4).ids[3]
    sampling = Sampling(max_new_tokens=10)
    answers = [generate_batch(llama, prompts, (stop,), sampling, pad_id=pad) for pad in (0, stop, 95)]
    assert answers[0] == answers[1] == answers[2]
    assert any(answer.stopped for answer in answers[0])


def test_every_stop_id_ends_an_answer_and_is_left_out(llama):
    prompt = _prompts(1)[0]
    free = _obvious(llama, prompt, (), 10).ids
    for stop in set(free):
        first = free.index(stop)
        (answer,) = generate_batch(llama, [prompt], (1, stop), Sampling(max_new_tokens=10))
        assert answer == Generated(free[:first], True)


def test_settings_of_the_model_folder_do_not_leak(llama):
    prompts = _prompts(4)
    greedy, beams = Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, num_beams=3)
    before = [generate_batch(llama, prompts, (1,), sampling) for sampling in (greedy, beams)]
    likely = before[0][0].ids[0]
    own = llama.generation_config
    llama.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, eos_token_id=likely, suppress_tokens=[likely], min_new_tokens=8, max_length=3
    )
    try:
        after = [generate_batch(llama, prompts, (1,), sampling) for sampling in (greedy, beams)]
        assert llama.generation_config.temperature == 5.0
    finally:
        llama.generation_config = own
    assert after == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_greedy_equals_transformers_generate(family):
    model, prompts = _tiny(family), _prompts(5)
    settings = GenerationConfig(do_sample=False, max_new_tokens=9, eos_token_id=1, pad_token_id=0)
    for prompt, answer in zip(prompts, generate_batch(model, prompts, (1,), Sampling(max_new_tokens=9)), strict=True):
        out = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        assert list(answer.ids) == [token for token in out if token != 1]


def test_repetition_penalty_equals_transformers(llama):
    prompts = _prompts(5)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=12, repetition_penalty=1.5, eos_token_id=1, pad_token_id=0
    )
    wanted = [
        llama.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    got = generate_batch(llama, prompts, (1,), Sampling(max_new_tokens=12, repetition_penalty=1.5))
    assert [list(answer.ids) for answer in got] == [[token for token in answer if token != 1] for answer in wanted]
    assert got != generate_batch(llama, prompts, (1,), Sampling(max_new_tokens=12))


def test_beams_of_a_batch_are_those_of_single_runs_and_score_no_worse_than_greedy(llama):
    prompts = _prompts(5)
    sampling = Sampling(max_new_tokens=6, num_beams=4)
    together = generate_batch(llama, prompts, (1,), sampling)
    assert together == [generate_batch(llama, [prompt], (1,), sampling)[0] for prompt in prompts]
    greedy = generate_batch(llama, prompts, (), Sampling(max_new_tokens=6))
    free = generate_batch(llama, prompts, (), sampling)
    assert any(beam != best for beam, best in zip(free, greedy, strict=True))
    for prompt, beam, best in zip(prompts, free, greedy, strict=True):
        assert _log_likelihood(llama, prompt, beam.ids) >= _log_likelihood(llama, prompt, best.ids) - 1e-4


def _log_likelihood(model, prompt, answer) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + index, token]) for index, token in enumerate(answer))


def test_a_sampled_answer_depends_on_seed_and_prompt_only(llama):
    prompts = _prompts(8)
    sampling = Sampling(max_new_tokens=10, temperature=1.0, top_p=0.95, seed=3)
    together = generate_batch(llama, prompts, (1,), sampling)
    torch.manual_seed(99)  # the global generator plays no part
    assert together == [generate_batch(llama, [prompt], (1,), sampling)[0] for prompt in prompts]
    assert together == generate_batch(llama, prompts[::-1], (1,), sampling)[::-1]
    assert together != generate_batch(llama, prompts, (1,), sampling.model_copy(update={"seed": 4}))


def test_sampling_draws_from_the_models_distribution_after_top_k_and_top_p():
    from graft.model.answers.pick import _draw

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    uniform = torch.linspace(0, 0.9999, 4000)
    rows = logits.expand(len(uniform), -1)

    def shares(top_k: int, top_p: float) -> list[float]:
        drawn = _draw(rows.clone(), uniform, top_k, top_p)
        return [round(float((drawn == token).float().mean()), 2) for token in range(4)]

    assert shares(0, 1.0) == [0.5, 0.3, 0.15, 0.05]
    assert shares(2, 1.0) == [0.62, 0.38, 0.0, 0.0]  # 0.5 / 0.8 and 0.3 / 0.8
    assert shares(0, 0.6) == [0.62, 0.38, 0.0, 0.0]  # 0.5 is not enough, so the token that crosses 0.6 is kept
    assert shares(0, 0.4) == [1.0, 0.0, 0.0, 0.0]
    assert shares(1, 1.0) == [1.0, 0.0, 0.0, 0.0]


def test_the_context_limit_shortens_answers_row_by_row_and_refuses_full_prompts():
    model = _tiny("gpt2")  # a table of 64 positions: one step too far would be an index error
    assert context_limit(model) == 64
    long, short = [*range(2, 66)], [5, 6, 7]
    prompts = [long[:60], short]
    answers = generate_batch(model, prompts, (), Sampling(max_new_tokens=10))
    assert [len(answer.ids) for answer in answers] == [4, 10]
    assert answers == [_obvious(model, long[:60], (), 4), _obvious(model, short, (), 10)]
    many = generate_batch(model, [long[:60], *[short] * 7], (), Sampling(max_new_tokens=30))
    assert [len(answer.ids) for answer in many] == [4] + [30] * 7
    with pytest.raises(InputError, match=r"64 tokens and the model's context is 64"):
        generate_batch(model, [long], (), Sampling(max_new_tokens=10))
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        generate_batch(model, [short, []], (), Sampling())


def test_batches_keep_to_rows_and_memory_and_cover_every_prompt_once(llama, monkeypatch):
    prompts = _prompts(30)
    monkeypatch.setattr(padded, "BATCH_ROWS", 8)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, key heads, head size, bytes
    per_row = 4 * VOCAB * 4
    monkeypatch.setattr(room, "free_bytes", lambda device: 2 * (per_token * 150 + per_row * 8))
    batches = [
        [index for index, _ in batch] for batch in generate_in_batches(llama, prompts, (), Sampling(max_new_tokens=4))
    ]
    assert sorted(index for batch in batches for index in batch) == list(range(30))
    assert all(len(batch) <= 8 for batch in batches)
    for batch in batches:
        bytes_ = len(batch) * (per_row + per_token * (max(len(prompts[i]) for i in batch) + 4))
        assert bytes_ <= per_token * 150 + per_row * 8
    assert max(len(batch) for batch in batches) == 8
    assert len(batches) > 4  # the memory bound, not only the row bound, was at work


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_is_the_batch_answer_and_later_turns_use_the_memory(family):
    model, memory = _tiny(family), PromptMemory()
    sampling = Sampling(max_new_tokens=7)
    prompt = _prompts(1, seed=2)[0]
    for turn in range(3):
        stream = Stream(model, prompt, (1,), sampling, memory)
        reused = len(memory.ids)
        answer = list(stream)
        assert Generated(tuple(answer), stream.stopped) == _obvious(model, prompt, (1,), 7)
        assert (reused > 0) == (turn > 0)
        prompt = [*prompt, *answer, 5, 6]
    rewound = [*prompt[: len(prompt) // 2], 9]  # /undo: the memory must be cut, or dropped, never reused wrongly
    assert list(Stream(model, rewound, (1,), sampling, memory)) == list(_obvious(model, rewound, (1,), 7).ids)


def test_a_stream_that_is_left_early_keeps_a_good_memory(llama):
    memory, prompt = PromptMemory(), _prompts(1)[0]
    stream = Stream(llama, prompt, (), Sampling(max_new_tokens=20), memory)
    begun = [next(stream) for _ in range(3)]
    follow = [*prompt, *begun[:2], 7, 8]
    assert list(Stream(llama, follow, (), Sampling(max_new_tokens=5), memory)) == list(
        _obvious(llama, follow, (), 5).ids
    )


def test_an_interrupt_inside_the_model_does_not_leave_half_a_memory(llama, monkeypatch):
    memory, prompt = PromptMemory(), _prompts(1)[0]
    stream = Stream(llama, prompt, (), Sampling(max_new_tokens=20), memory)
    begun = [next(stream), next(stream)]
    last = llama.model.layers[-1]
    original = last.forward

    def interrupted(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.setattr(last, "forward", original)
    follow = [*prompt, *begun, 4]
    assert list(Stream(llama, follow, (), Sampling(max_new_tokens=5), memory)) == list(
        _obvious(llama, follow, (), 5).ids
    )


def test_training_mode_and_attention_are_put_back(llama):
    from graft.model.attention import segments as attention

    prompts = _prompts(3)
    wanted = generate_batch(llama, prompts, (), Sampling(max_new_tokens=4))
    llama.train()
    llama.set_attn_implementation(attention.SEGMENTS)
    try:
        assert generate_batch(llama, prompts, (), Sampling(max_new_tokens=4)) == wanted
        assert llama.training
        assert llama.config._attn_implementation == attention.SEGMENTS
    finally:
        llama.eval()
        llama.set_attn_implementation("sdpa")


def test_an_adapter_answers_as_its_merged_model(llama):
    from copy import deepcopy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(deepcopy(llama), settings).eval()
    prompts, sampling = _prompts(5), Sampling(max_new_tokens=6)
    answers = generate_batch(adapted, prompts, (1,), sampling)
    with adapted.disable_adapter():
        assert generate_batch(adapted, prompts, (1,), sampling) == generate_batch(llama, prompts, (1,), sampling)
    assert answers != generate_batch(llama, prompts, (1,), sampling)
    assert answers == generate_batch(adapted.merge_and_unload(), prompts, (1,), sampling)


def test_a_recurrent_model_answers_without_padding(material):
    model = AutoModelForCausalLM.from_pretrained(material / "models" / "tiny-rwkv4-660k").eval()
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 200, (length,), generator=draw).tolist() for length in (4, 6, 4, 9, 6, 4)]
    wanted = [_obvious(model, prompt, (0,), 5) for prompt in prompts]
    assert generate_batch(model, prompts, (0,), Sampling(max_new_tokens=5)) == wanted
    assert [tuple(Stream(model, prompt, (0,), Sampling(max_new_tokens=5))) for prompt in prompts] == [
        answer.ids for answer in wanted
    ]
    assert len({answer.ids for answer in wanted}) > 1
