"""Tiny random models and made-up examples that several tests share."""

import copy

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
    StableLmConfig,
)

from graft.types import Example

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}

ON_TREES = {
    "llama": LlamaConfig(**GROUPED),
    "llama-tied": LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(head_dim=8, **GROUPED),
    "mistral-window": MistralConfig(sliding_window=7, **GROUPED),
    "gemma": GemmaConfig(head_dim=8, **GROUPED),
    "gemma2-window-softcap": Gemma2Config(head_dim=8, sliding_window=7, **GROUPED),
    "gemma3-window": Gemma3TextConfig(head_dim=8, sliding_window=7, **GROUPED),
    "phi3": Phi3Config(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "bloom-6-heads": BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6),
    "mixtral-moe": MixtralConfig(num_local_experts=4, **GROUPED),
    "qwen3-moe": Qwen3MoeConfig(head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, **GROUPED),
    "gpt-oss-sinks": GptOssConfig(head_dim=8, num_local_experts=4, sliding_window=7, **GROUPED),
    "cohere-logit-scale": CohereConfig(**GROUPED),
    "granite-logit-scale": GraniteConfig(logits_scaling=3.0, **GROUPED),
}
ONE_PER_ROW = {
    "rwkv": RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "stablelm": StableLmConfig(**GROUPED),
}


def make_model(config, seed: int = 0) -> PreTrainedModel:
    """Random weights, three times as wide as usual: attention and logits must matter for a test to notice them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval()


def make_example(name: str, ids, prompt_len: int, weight=1.0, turn: int = 0) -> Example:
    ids = np.asarray(ids, np.int32)
    weights = np.full(len(ids), weight, np.float32)
    weights[: max(1, prompt_len)] = 0
    return Example(name, turn, ids, weights, prompt_len)


def branching_examples(seed: int = 1) -> list[Example]:
    """Seven examples: a shared system prompt, two shared questions, a one-token answer, a lone one, an exact copy."""
    rng = np.random.default_rng(seed)

    def some(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, count).astype(np.int32)

    system, first, second, other = some(11), some(9), some(6), some(5)
    paths = [(system, first), (system, first), (system, second), (system, second), (other, some(3)), (some(2), some(1))]
    answers = [some(8), some(1), some(9), some(9), some(12), some(3)]
    examples = []
    for number, (path, answer) in enumerate(zip(paths, answers, strict=True)):
        prompt = np.concatenate(path)
        ids = np.concatenate([prompt, answer])
        weight = np.zeros(len(ids), np.float32)
        weight[len(prompt) :] = rng.random(len(answer)) + 0.5  # unequal weights
        examples.append(Example(str(number), 0, ids, weight, len(prompt)))
    return [*examples, Example("copy", 0, examples[0].ids, examples[0].weights, examples[0].prompt_len)]
