"""Memory of one long row over 1, 2 and 4 processes (`context_ranks`), and how evenly real rows are split.

    python bench/context.py                                   # some minutes on two cores
    python bench/context.py --tokens 2048 --out /tmp/context.json

Each case runs in processes of its own, of one thread each: a LoRA step over one row (real text as one document, every
token a target) on a random Qwen2-shaped model in fp32, with `shard_ranks=1`, so that all hold the same weights. What is
measured is the peak resident set of the step less what was resident before it, of the process with the most:
activations, gradients of them, logits, buffers of messages, and what the allocator leaves about. Their losses and
gradient norms are compared. Processor time is given beside it; it is that of a machine that may be busy otherwise.

The balance is computed, not measured: operations of the dearest process over the mean, from nodes, visible pairs and
targets at the prices of two models, for rows of real conversations and documents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import socket
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from scaling import MATERIAL, ROOT, make_data
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from graft.config.train import Train, load_train
from graft.model.device import pick_precision, prepare_device
from graft.model.processes.ranks import ranks_from_environment
from graft.model.tuned.adapters import trainable
from graft.runs import RunFolder
from graft.tokens.deal import Prices
from graft.tokens.split_row import BLOCKS, held_by, nodes_of, split_row
from graft.tokens.tree import build_rows, padded, targets
from graft.train.load import load_for_training
from graft.train.prepare import Prepared, prepare
from graft.train.tuning import embeddings_of, make_stepper
from graft.train.updates.optim import make_optimizer
from graft.types import Example, Row

CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH, INNER, LAYERS = 8, (2, 8), 256, 704, 6
PROCESSES = (1, 2, 4)
KEPT = ("none", "full", "none, whole keys kept")
"""`checkpointing`; the last is `none` without collecting keys and values again in the backward pass."""
PRICES = {
    "8 B": Prices(2 * 7.0e9, 4 * 32 * 4096, 2 * 0.53e9),
    "0.5 B": Prices(2 * 0.36e9, 4 * 24 * 896, 2 * 0.136e9),
}
"""Llama-3.1-8B's shape and Qwen2.5-0.5B's, rounded."""


def make_model_folder(folder: Path, key_heads: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / "minimind-v3")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=key_heads, max_position_embeddings=65536,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def settings_for(folder: Path, tokens: int, *changes: str) -> Train:
    common = [
        f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", "encode.max_length=1024", "max_steps=1",
        f"row_tokens={tokens}", "device=cpu", "precision=fp32", "shard_ranks=1", "lora.dropout=0",
    ]  # fmt: skip
    return load_train(None, [*common, *changes])


def prepared_in(folder: Path, key_heads: int, tokens: int) -> Prepared:
    """Model and data in a folder; the data encoded."""
    make_model_folder(folder / "model", key_heads)
    make_data(folder / "data.jsonl")
    os.environ["GRAFT_CACHE"] = str(folder / "cache")
    return prepare(settings_for(folder, tokens), RunFolder(folder / "run"))


def real_examples(prepared: Prepared) -> list[Example]:
    return list(prepared.train.examples(range(len(prepared.train))))


def document(examples: list[Example], tokens: int, answer: int) -> Example:
    """Real text as one example, the last tokens of which are targets."""
    ids = np.resize(np.concatenate([example.ids for example in examples]), tokens).astype(np.int32)
    weights = np.zeros(tokens, np.float32)
    weights[-answer:] = 1
    return Example("document", 0, ids, weights, tokens - answer)


def one_of(size: int, rank: int, port: int, settings: Any, prepared: Prepared, kept: str, answers: Any) -> None:
    """A process of a case; puts what it found."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    prepare_device(CPU)
    ranks.join(CPU)
    precision = pick_precision(settings.precision, CPU)
    lm = load_for_training(settings, precision, CPU, None, prepared, ranks).lm
    if lm.context is not None and "whole" in kept:
        lm.context.asks_again = False
    parameters = trainable(lm.model)
    optimizer = make_optimizer(parameters, embeddings_of(lm, settings), settings)
    stepper = make_stepper(lm, parameters, optimizer, precision, settings, ranks)
    lm.model.train()
    tokens = settings.row_budget
    (row,) = lm.rows([document(real_examples(prepared), tokens, tokens - 1)], tokens)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    used = processor_seconds()
    sums = stepper.update([stepper.accumulate(row, (0, 0), tokens - 1.0)], tokens - 1.0, 1)
    found = {
        "mib": resident("VmHWM") - before,
        "processor_s": processor_seconds() - used,
        "loss": sums.nll / (tokens - 1),
        "norm": sums.norm,
    }
    answers.put(found)
    ranks.leave()


def resident(what: str) -> float:
    """MiB."""
    with Path("/proc/self/status").open(encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(what)) / 1024


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def in_processes(folder: Path, prepared: Prepared, kept: str, tokens: int, size: int) -> list[dict[str, float]]:
    """What each of so many processes found; they are forked, so that nothing is imported again."""
    settings = settings_for(folder, tokens, f"context_ranks={size}", f"checkpointing={kept.split(',', maxsplit=1)[0]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = multiprocessing.get_context("fork")
    answers = forks.Queue()
    processes = [
        forks.Process(target=one_of, args=(size, rank, port, settings, prepared, kept, answers)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def memory(tokens: int) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for key_heads in KEY_HEADS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepared = prepared_in(folder, key_heads, tokens)
            of_one: dict[str, dict[str, float]] = {}
            for kept in KEPT:
                way = kept.split(",")[0]
                for size in PROCESSES if kept == way else PROCESSES[1:]:
                    found = in_processes(folder, prepared, kept, tokens, size)
                    most = max(found, key=lambda its: its["mib"])
                    one = of_one.setdefault(way, most)
                    cases.append(
                        {
                            "key_heads": key_heads,
                            "kept": kept,
                            "processes": size,
                            "mib": round(most["mib"], 1),
                            "of_one": round(most["mib"] / one["mib"], 3),
                            "processor_s_of_each": sorted(round(its["processor_s"], 2) for its in found),
                            "loss": most["loss"],
                            "norm": most["norm"],
                            "loss_and_norm_apart": max(abs(most[key] / one[key] - 1) for key in ("loss", "norm")),
                        }
                    )
                    print(json.dumps(cases[-1]), flush=True)
    return cases


def balance() -> dict[str, Any]:
    """Operations of the dearest process over the mean."""
    with tempfile.TemporaryDirectory() as name:
        chats = real_examples(prepared_in(Path(name), 2, 16384))
    stem = document(chats, 12000, 1).ids
    rows = {
        "raw document of 16,000": [document(chats, 16000, 15999)],
        "document of 15,600 and an answer of 400": [document(chats, 16000, 400)],
        "8 answers to a document of 12,000": [_behind(stem, example) for example in chats[:8]],
        "conversations": chats[:70],
        "conversations behind a system prompt of 400": [_behind(stem[:400], example) for example in chats[:60]],
        "documents of 8,000, 4,000, 2,000 and conversations": [
            document(chats[n:], size, size // 4) for n, size in enumerate((8000, 4000, 2000))
        ]
        + chats[:10],
    }
    found: dict[str, Any] = {}
    for name, examples in rows.items():
        row = build_rows(examples, 16384)[0]
        found[name] = {"nodes": len(row)} | {
            f"{size} processes, {model}": round(_unevenness(row, size, prices), 4)
            for size in (2, 4, 8)
            for model, prices in PRICES.items()
        }
        print(name, found[name], flush=True)
    return found


def _behind(stem: np.ndarray[Any, Any], example: Example) -> Example:
    nothing = np.zeros(len(stem), np.float32)
    ids, weights = np.concatenate([stem, example.ids]), np.concatenate([nothing, example.weights])
    return Example(example.conversation, 0, ids.astype(np.int32), weights, len(stem) + example.prompt_len)


def _unevenness(row: Row, size: int, prices: Prices) -> float:
    step = size * BLOCKS
    row = padded(row, -(-len(row) // step) * step)
    cost = prices.node + prices.pair * (row.depth + 1.0)
    np.add.at(cost, row.parent[targets(row)], prices.target)
    owner = split_row(row, size, prices)
    loads = [float(cost[nodes_of(held_by(owner, len(row), process))].sum()) for process in range(size)]
    return max(loads) / float(np.mean(loads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    even, cases = balance(), memory(asked.tokens)
    if asked.out is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
        report = {
            "what": f"a LoRA step (fp32) over one row of {asked.tokens} tokens: peak resident set above the one before "
            "it, of the process with the most",
            "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}; times of a machine that was busy otherwise",
            "commit": commit.stdout.strip(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "model": f"Qwen2-shaped: width {WIDTH}, feed-forward {INNER}, {LAYERS} layers, {HEADS} heads",
            "cases": cases,
            "balance": even,
        }
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
