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
    GPTJConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
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
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "bloom-6-heads": BloomConfig(vocab_size=VOCABULARY, hidden_size=48, n_layer=2, n_head=6),
    "mixtral-moe": MixtralConfig(num_local_experts=4, **GROUPED),
    "qwen3-moe": Qwen3MoeConfig(head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2, **GROUPED),
    "gpt-oss-sinks": GptOssConfig(head_dim=8, num_local_experts=4, sliding_window=7, **GROUPED),
    "cohere-logit-scale": CohereConfig(**GROUPED),
    "granite-logit-scale": GraniteConfig(logits_scaling=3.0, **GROUPED),
}
BY_MASKS = {
    # on trees too, but the row reaches their attention with the mask; generation takes padded batches
    "stablelm-drops-arguments": StableLmConfig(**GROUPED),
    "llama4-chunks": Llama4TextConfig(
        head_dim=8,
        attention_chunk_size=8,
        num_local_experts=4,
        intermediate_size_mlp=48,
        attn_temperature_tuning=False,
        **GROUPED,
    ),
}
ONE_PER_ROW = {
    "rwkv": RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "gptj": GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=8),
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


TEXTS = [
    "What is the capital of Arvenia? The capital of Arvenia is Tolen.",
    "孩子不肯按时吃饭,怎么办? 先陪他一起准备食物。",
    "How many legs has a spider? A spider has eight legs.",
    "system user assistant tool 0 1 2 3 4 5 6 7 8 9 + - =",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHATML):
    """A byte-level BPE tokenizer trained on a few sentences, with chatml's control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model_folder(folder, config_class=LlamaConfig, **changes):
    """A model folder as transformers saves it: tiny random weights and a tokenizer that fits."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = config_class(
        **(GROUPED | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id} | changes)
    )
    make_model(config).save_pretrained(folder)
    return folder


def make_conversations(count: int = 40) -> list[dict]:
    """Rows in the messages format: one- and two-turn, English and Chinese, all different."""
    rows = []
    for n in range(count):
        messages = [
            {"role": "user", "content": f"What is {n} + 1?" if n % 2 else f"{n} 加 1 等于几?"},
            {"role": "assistant", "content": f"{n + 1}"},
        ]
        if n % 3 == 0:
            messages += [{"role": "user", "content": "and 2 more?"}, {"role": "assistant", "content": f"{n + 3}."}]
        rows.append({"id": f"row-{n}", "messages": messages})
    return rows


def write_rows(path, rows) -> str:
    import json

    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
