"""One measurement on a GPU in a process of its own: a training step of graft or of its peer, or one kernel.

    python bench/gpu_side.py '{"what": "step", "side": "graft", "model": "llama2-7b", ...}'

The last line printed is a JSON object; `bench/gpu.py` calls this and says what the fields are. A process for each keeps
one side's patches, compiled code and memory out of the other's. Weights are random and made on the device.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from graft.config.train import Train, load_train
from graft.model.attention.attend import Shape
from graft.model.attention.pick import row_step
from graft.model.attention.segments import BACKENDS, TreeRow
from graft.model.device import pick_device, pick_precision, prepare_device
from graft.model.logit_shape import LogitShape
from graft.model.tuned.adapters import add_lora, trainable
from graft.tokens.tree import build_rows, padded, segments, sharing, total_weight
from graft.train.computing import pick_computing, tree_model
from graft.train.loss import linear_nll
from graft.train.step import Stepper
from graft.train.updates.optim import make_optimizer
from graft.types import Example

SHAPES = {
    "llama2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=16384,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=32768,
    ),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "tiny": LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    ),
}  # fmt: skip
PREFIX = 400
"""Tokens of the system prompt that the conversations of the shared case have in common."""


def examples_of(case: dict[str, Any], vocabulary: int, step: int) -> list[Example]:
    """The conversations of one step, of random ids; half of each is the answer.

    `data`: "even" (all of `length` tokens), "mixed" (lengths as real instructions have them: log-normal, median a fifth
    of `length`, at most `length`), "shared" (the same, after a common prompt of PREFIX tokens).
    """
    rng = np.random.default_rng(step)
    length, count = case["length"], case["batch"]
    sizes = np.full(count, length)
    if case["data"] != "even":
        sizes = np.clip(np.exp(rng.normal(np.log(length / 5), 0.8, count)), 8, length).astype(int)
    prefix = np.random.default_rng(-1 % 2**32).integers(3, vocabulary, min(PREFIX, length // 2))
    made = []
    for number, size in enumerate(sizes):
        ids = rng.integers(3, vocabulary, size).astype(np.int32)
        if case["data"] == "shared":
            ids = np.concatenate([prefix, ids])[:length].astype(np.int32)
        weights = np.ones(len(ids), np.float32)
        weights[: max(1, len(ids) - size // 2)] = 0
        made.append(Example(f"{step}-{number}", 0, ids, weights, int((weights == 0).sum())))
    return made


def make_model(case: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, made where they will be used; with "nf4" the decoder's linear layers are quantised."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[case["model"]], dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    if case["method"] == "qlora":
        quantise(model.base_model, device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return model


def quantise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Every linear layer becomes bitsandbytes' NF4 with doubly quantised constants, one at a time."""
    import bitsandbytes

    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            made = bitsandbytes.nn.Linear4bit(
                child.in_features, child.out_features, child.bias is not None, dtype, quant_type="nf4", device="meta"
            )
            made.weight = bitsandbytes.nn.Params4bit(
                child.weight.detach().cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            made.bias = child.bias
            setattr(module, name, made.to(device))
        else:
            quantise(child, device, dtype)


def settings_of(case: dict[str, Any], device: torch.device) -> Train:
    lora = "full" if case["method"] == "full" else "lora"
    given = [f"{name}={case[name]}" for name in ("attention", "compile", "kernels") if name in case]
    budget = [f"encode.max_length={case['length']}", f"row_tokens={case['row_tokens']}"]
    return load_train(None, ["model=none", "data=none", f"method={lora}", f"device={device}", *budget, *given])


def tuned(case: dict[str, Any], settings: Train, device: torch.device) -> tuple[Any, Any]:
    """The model with what is trained of it, as `graft train` would have it, and its number formats."""
    precision = pick_precision("auto", device)
    model = make_model(case, device, precision.trained if case["method"] == "full" else precision.frozen)
    if case["method"] == "full":
        model.requires_grad_(True)
        return model, precision
    model.requires_grad_(False)
    if case["checkpointing"]:
        model.enable_input_require_grads()
    return add_lora(model, settings.lora, 0), precision


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graft_step(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    settings = settings_of(case, device)
    model, precision = tuned(case, settings, device)
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    lm = tree_model(model, settings, pick_computing(settings, device))
    parameters = trainable(model)
    optimizer = make_optimizer(parameters, {id(lm.base.get_input_embeddings().weight)}, settings)
    stepper = Stepper(lm, parameters, optimizer, precision, settings.clip, 0)
    model.train()
    seconds, tokens, losses, ratios = [], [], [], []
    for step in range(case["warmup"] + case["steps"]):
        wait(device)
        started = time.perf_counter()
        examples = examples_of(case, SHAPES[case["model"]].vocab_size, step)
        rows = lm.rows(examples, settings.row_budget)
        weight = total_weight(examples)
        of_rows = [stepper.accumulate(row, (step, number), weight) for number, row in enumerate(rows)]
        nll = stepper.update(of_rows, weight, step + 1).nll
        wait(device)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(example.ids) for example in examples))
        losses.append(nll / weight)
        ratios.append(sharing(examples, rows).ratio)
    return summed(case, seconds, tokens, losses, device) | {
        "sharing": statistics.mean(ratios), "on_trees": lm.on_trees, "why_not": lm.why_not,
        "backend": lm.base.config._attn_implementation, "backend_failed": lm.backend_failed,
    }  # fmt: skip


def peer_step(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """TRL's SFTTrainer over the same ids in the same steps, with liger-kernel on CUDA."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    settings = settings_of(case, device)
    model, precision = tuned(case, settings, device)
    total = case["warmup"] + case["steps"]
    rows, tokens = [], []
    for step in range(total):
        examples = examples_of(case, SHAPES[case["model"]].vocab_size, step)
        examples.sort(key=lambda example: len(example.ids))  # its micro-batches then hold little padding
        tokens.append(sum(len(example.ids) for example in examples))
        rows += [{"input_ids": e.ids.tolist(), "completion_mask": e.weights.astype(int).tolist()} for e in examples]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait(device)
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(device)
            seconds.append(time.perf_counter() - self.started)

    words = {f"<{number}>": number for number in range(8)}
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<0>")), **special)
    micro = min(case["batch"], max(1, case["row_tokens"] // case["length"]))
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, use_cpu=device.type == "cpu", bf16=precision.compute == torch.bfloat16, fp16=False,
            gradient_checkpointing=case["checkpointing"], report_to="none", per_device_train_batch_size=micro,
            gradient_accumulation_steps=case["batch"] // micro, max_steps=total, learning_rate=settings.peak_lr,
            lr_scheduler_type="constant", max_grad_norm=settings.clip, max_length=case["length"], packing=False,
            completion_only_loss=True, train_sampling_strategy="sequential", save_strategy="no", logging_steps=1,
            disable_tqdm=True, optim="adamw_torch_fused", use_liger_kernel=liger,
            loss_type="nll" if liger else "chunked_nll", dataset_num_proc=None,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    said = {"micro_batch": micro, "liger": liger, "attention": trainer.model.config._attn_implementation}
    return summed(case, seconds, tokens, losses, device) | said


def summed(
    case: dict[str, Any], seconds: list[float], tokens: list[int], losses: list[float], device: torch.device
) -> dict[str, Any]:
    """Rates over the timed steps, memory, and floating-point operations of a step as if nothing were shared."""
    skip = case["warmup"]
    rates = [n / s for n, s in zip(tokens[skip:], seconds[skip:], strict=True)]
    made = [model_flops(case, step) / s for step, s in enumerate(seconds)][skip:]
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {}
    return {
        "tokens_per_s": statistics.median(rates), "min": min(rates), "max": max(rates), "steps": len(rates),
        "first_step_s": seconds[0], "model_tflops": statistics.median(made) / 1e12,
        "first_loss": losses[0], "last_loss": losses[-1], **memory,
    }  # fmt: skip


def model_flops(case: dict[str, Any], step: int) -> float:
    """Multiply-adds twice counted, of the model's matrix products over one step's conversations, each by itself.

    Forward 2 per weight and token, the same again for the gradient of the inputs, and once more for the gradient of the
    weights where they are trained; attention 2 L^2 H D forward (causal) and twice that backward; the output layer at
    targets alone. Recomputation is not counted.
    """
    config: Any = SHAPES[case["model"]]
    d, f, head = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_attention_heads
    of_layer = d * d * 2 + 2 * d * config.num_key_value_heads * head + 3 * d * f
    passes = 3 if case["method"] == "full" else 2
    total = 0.0
    for example in examples_of(case, config.vocab_size, step):
        length, targets = len(example.ids), int((example.weights != 0).sum())
        total += config.num_hidden_layers * (2 * passes * of_layer * length + 3 * 2 * length**2 * d)
        total += 2 * passes * d * config.vocab_size * targets
    return total


def attention_kernel(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Forward and backward of one backend on one row, in milliseconds."""
    from graft.model import attention_varlen  # registered by being loaded
    from graft.model.attention import flex as attention_flex

    assert {attention_flex.FLEX, attention_varlen.VARLEN} <= BACKENDS.keys()
    examples = examples_of(case, 30000, 0)
    row = build_rows(examples, 2**20)[0]
    row = padded(row, -(-len(row) // row_step(len(row))) * row_step(len(row)))
    tree = TreeRow.of(row, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, groups, size = case["heads"]
    q, k, v = (torch.randn(1, h, len(row), size, device=device, dtype=dtype) for h in (heads, groups, groups))
    needs = device.type == "cuda" or "flex" not in case["backend"]  # on the CPU it has no gradients
    q, k, v = (x.requires_grad_(needs) for x in (q, k, v))
    compute, times = BACKENDS[case["backend"]], []
    for _ in range(case["warmup"] + case["steps"]):
        wait(device)
        started = time.perf_counter()
        out = compute(q, k, v, tree, Shape())
        if needs:
            out.backward(out.detach())
        wait(device)
        times.append((time.perf_counter() - started) * 1e3)
    timed = times[case["warmup"] :]
    return {
        "ms": statistics.median(timed), "min": min(timed), "max": max(timed), "first_ms": times[0],
        "nodes": len(row), "runs": len(segments(row).sizes), "gradient": needs,
    }  # fmt: skip


def loss_kernel(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Loss and gradient of the states through a frozen output layer, ours or liger-kernel's, in milliseconds."""
    torch.manual_seed(0)
    states, width, vocabulary = case["sizes"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(states, width, device=device, dtype=dtype, requires_grad=True)
    labels = torch.randint(vocabulary, (states,), device=device)
    weights = torch.ones(states, device=device)

    def ours() -> torch.Tensor:
        return linear_nll(hidden, head, LogitShape(), labels, weights).nll

    def ligers() -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        found: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden, labels)
        return found

    compute, times = (ours if case["by"] == "graft" else ligers), []
    prepare_device(device)  # the peak below is the loss's own, with its inputs
    for _ in range(case["warmup"] + case["steps"]):
        hidden.grad = None
        wait(device)
        started = time.perf_counter()
        loss = compute()
        loss.backward()
        wait(device)
        times.append((time.perf_counter() - started) * 1e3)
    timed = times[case["warmup"] :]
    memory = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {}
    said = {"ms": statistics.median(timed), "min": min(timed), "max": max(timed), "loss": float(loss.detach())}
    return said | memory


def peak_rates(device: torch.device) -> dict[str, Any]:
    """The bf16 matrix product's rate on random data, and the memory's: what shares are shares of."""
    size = 8192 if device.type == "cuda" else 256
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def best(compute: Any) -> float:
        times = []
        for _ in range(20):
            wait(device)
            started = time.perf_counter()
            compute()
            wait(device)
            times.append(time.perf_counter() - started)
        return statistics.median(times[5:])

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    copied = torch.empty(2**28 if device.type == "cuda" else 2**20, device=device)
    return {
        "device": name, "format": str(dtype), "matmul_tflops": 2 * size**3 / best(lambda: a @ b) / 1e12,
        "copy_gb_per_s": 2 * copied.numel() * 4 / best(copied.clone) / 1e9,
    }  # fmt: skip


def main() -> None:
    case = json.loads(sys.argv[1])
    device = pick_device("cpu" if case.get("cpu") else "auto")
    prepare_device(device)
    torch.manual_seed(0)
    if case["what"] == "peak":
        found = peak_rates(device)
    elif case["what"] == "attention":
        found = attention_kernel(case, device)
    elif case["what"] == "loss":
        found = loss_kernel(case, device)
    else:
        found = (graft_step if case["side"] == "graft" else peer_step)(case, device)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
