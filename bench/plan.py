"""The predicted peak memory and step time of a run against what a run of its own process measures.

    python bench/plan.py                       # three sizes, five methods: half an hour
    python bench/plan.py --size 5M --size 40M --method qlora --checkpointing full

Each case trains a few steps by `graft train` in a new process and takes its largest resident set from the kernel. The
models are random, of Llama's and Qwen2's shape; the data is made up. What is predicted is predicted in another new
process, by `graft plan --json`, as a user would. Times are wall time, so only those of a quiet machine mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "5M": ("llama", {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "vocab_size": 1024}),
    "40M": ("qwen2", {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
                      "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True}),
    "160M": ("llama", {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12,
                       "num_attention_heads": 10, "num_key_value_heads": 5, "vocab_size": 150000,
                       "tie_word_embeddings": True}),
}  # fmt: skip
METHODS = {
    "lora": ["method=lora"],
    "qlora": ["method=lora", "quantize=nf4"],
    "int8": ["method=lora", "quantize=int8"],
    "fp8": ["method=lora", "quantize=fp8"],
    "full": ["method=full"],
}
WORDS = ["tree", "node", "token", "row", "leaf", "root", "path", "branch"]


def make_model(size: str, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    tokens = {"pad_token": special[0], "eos_token": special[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.save_pretrained(folder)
    family, shape = SIZES[size]
    config = AutoConfig.for_model(family, **shape, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def make_data(path: Path) -> None:
    chance = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"{chance.choice(WORDS)}{chance.randrange(99)}" for _ in range(count))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(120):
            question, answer = text(chance.randrange(20, 60)), text(chance.randrange(40, 120))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def graft(words: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """What a graft command prints, and its largest resident set in bytes."""
    command = [sys.executable, __file__, "--child", json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    *printed, last = done.stdout.splitlines()
    return "\n".join(printed), int(last)


def child(words: list[str]) -> None:
    import torch

    from graft.cli.main import main as run_graft
    from graft.model.device import memory_gib

    sys.argv = ["graft", *words]
    try:
        run_graft()
    except SystemExit as ended:
        if ended.code:
            raise
    print(int(memory_gib(torch.device("cpu")) * 2**30))


def case(
    size: str, method: str, row_tokens: int, checkpointing: str, batch: int, steps: int, work: Path
) -> dict[str, Any]:
    run = work / f"run-{size}-{method}-{row_tokens}-{checkpointing}"
    words = [
        f"model={work / size}", f"data={work / 'data.jsonl'}", *METHODS[method], f"row_tokens={row_tokens}",
        f"checkpointing={checkpointing}", "encode.max_length=1024", f"max_steps={steps}",
        f"batch_size={batch}", "split.val=0", "device=cpu", "precision=fp32",
    ]  # fmt: skip
    environment = os.environ | {"GRAFT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    predicted = json.loads(graft(["plan", *words, "--json"], environment)[0])
    _, peak = graft(["train", *words, f"out={run}"], environment)
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    steps = [row for row in lines if row["kind"] == "train"]
    seconds = steps[-1]["tokens_computed"] / steps[-1]["tokens_per_s"]
    return {
        "size": size, "method": method, "row_tokens": row_tokens, "checkpointing": checkpointing,
        "heaviest_row_nodes": predicted["heaviest_row_nodes"], "predicted_bytes": predicted["peak_bytes"],
        "parts": predicted["bytes"], "moments": predicted["moments_bytes"], "measured_bytes": peak,
        "memory_error": predicted["peak_bytes"] / peak - 1,
        "predicted_s_per_step": predicted["seconds_per_step"], "measured_s_per_step": seconds,
        "time_error": predicted["seconds_per_step"] / seconds - 1,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--method", choices=list(METHODS), action="append")
    parser.add_argument("--batch", type=int, default=8, help="conversations per step")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--checkpointing", choices=["none", "selective", "full"], action="append")
    parser.add_argument("--budget", type=int, action="append", help="row_tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "plan.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    result: dict[str, Any] = {
        "what": "predicted peak resident set and step time against those of a run's first steps",
        "device": f"CPU, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads, {platform.machine()}",
        "load_average": os.getloadavg()[0],
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "cases": [],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_data(work / "data.jsonl")
        for size in args.size or list(SIZES):
            make_model(size, work / size)
            for method in args.method or list(METHODS):
                for row_tokens in args.budget or [2048]:
                    for checkpointing in args.checkpointing or ["none"]:
                        found = case(size, method, row_tokens, checkpointing, args.batch, args.steps, work)
                        result["cases"].append(found)
                        args.out.write_text(json.dumps(result, indent=1) + "\n")  # a long run leaves what it has
                        print(
                            f"{size} {method} {row_tokens} {checkpointing}: predicted "
                            f"{found['predicted_bytes'] / 2**20:.0f} MiB, measured "
                            f"{found['measured_bytes'] / 2**20:.0f} MiB ({found['memory_error']:+.1%}); "
                            f"{found['predicted_s_per_step']:.1f} s per step, measured "
                            f"{found['measured_s_per_step']:.1f} s ({found['time_error']:+.0%})",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
