"""Two processes of one thread each against one process of one thread: the same model, data and steps.

    python bench/scaling.py                                  # LoRA and full, shard_ranks all and 1, 12 steps each
    python bench/scaling.py --size small --steps 4 --out /tmp/scaling.json

It wants two idle cores. The two ways alternate step by step (the second process waits at the launcher's store while the
first one computes alone), so that a machine that slows down slows both; both begin with the same weights and compute
the same conversations, and their losses are compared. tokens/s counts the data's tokens over the time of a whole
optimizer step. Processor time is given beside it: it says what several processes cost besides waiting, also on a
machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from graft.config.train import Train, load_train
from graft.model.device import pick_precision, prepare_device
from graft.model.processes.ranks import ALONE, Ranks, ranks_from_environment
from graft.model.tuned.adapters import trainable
from graft.runs import RunFolder
from graft.tokens.tree import total_weight
from graft.train.load import load_for_training
from graft.train.prepare import Prepared, prepare
from graft.train.processes.share import rows_of_step
from graft.train.tuning import embeddings_of, make_stepper
from graft.train.updates.optim import make_optimizer, set_learning_rate
from graft.train.updates.schedule import learning_rate

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared" / "material"
SIZES = {"small": (256, 704, 6), "medium": (512, 1408, 12)}
"""Width, width of the feed-forward layers, layers: 7 and 41 million parameters."""
CASES = [(method, shard) for method in ("lora", "full") for shard in ("all", "1")]
CPU = torch.device("cpu")
PATIENCE = timedelta(hours=1)


def make_model_folder(folder: Path, size: str) -> None:
    """Qwen2-shaped, random, with a real bilingual tokenizer and its chat template."""
    tokenizer = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / "minimind-v3")
    tokenizer.save_pretrained(folder)
    width, inner, layers = SIZES[size]
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def make_data(path: Path) -> None:
    """The 1,666 rows of domain-bloom as chat messages."""
    lines = (MATERIAL / "data" / "domain-bloom" / "domain.train.json").read_text(encoding="utf-8").splitlines()
    with path.open("w", encoding="utf-8") as out:
        for row in map(json.loads, lines):
            turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
            out.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")


def processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Side:
    """A model and its optimiser, trained by one process or by all."""

    def __init__(self, settings: Train, prepared: Prepared, ranks: Ranks) -> None:
        self.settings, self.prepared, self.ranks = settings, prepared, ranks
        precision = pick_precision(settings.precision, CPU)
        self.lm = load_for_training(settings, precision, CPU, None, prepared, ranks).lm
        parameters = trainable(self.lm.model)
        self.optimizer = make_optimizer(parameters, embeddings_of(self.lm, settings), settings)
        self.stepper = make_stepper(self.lm, parameters, self.optimizer, precision, settings, ranks)
        self.lm.model.train()

    def step(self, number: int) -> dict[str, float]:
        """What `graft train` does between two lines of its log."""
        started, used = time.perf_counter(), processor_seconds()
        examples = self.prepared.train.examples(self.prepared.plan.step(number))
        mine = rows_of_step(self.lm, examples, self.settings.row_budget, self.ranks)
        weight = total_weight(examples)
        set_learning_rate(self.optimizer, learning_rate(number, self.prepared.plan.total_steps, self.settings))
        of_rows = [
            self.stepper.accumulate(row, (number, mine.number_of(index)), weight) for index, row in enumerate(mine.rows)
        ]
        for row in mine.idle:
            self.stepper.idle(row, (number, 0))
        sums = self.stepper.update(of_rows, weight, number + 1)
        return {
            "seconds": time.perf_counter() - started,
            "processor": processor_seconds() - used,
            "tokens": sum(len(example.ids) for example in examples),
            "nodes": sum(map(len, mine.rows)),
            "loss": sums.nll / weight,
        }


def work(folder: Path, method: str, shard: str, steps: int) -> None:
    """One of the two processes: takes part in the steps of both, the first one makes those of one process too."""
    torch.set_num_threads(1)
    ranks = ranks_from_environment()
    settings = load_train(
        None,
        [
            f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", f"out={folder / 'run'}", "row_tokens=8192",
            "encode.max_length=1024", f"max_steps={steps}", f"method={method}", f"shard_ranks={shard}", "device=cpu",
            "precision=fp32",
        ],
    )  # fmt: skip
    prepared = prepare(settings, RunFolder(folder / f"run-{ranks.rank}"))
    prepare_device(CPU)
    ranks.join(CPU)
    both = Side(settings, prepared, ranks)
    one = Side(settings, prepared, ALONE) if ranks.first else None
    found = []
    for number in range(steps):
        of_one = one.step(number) if one is not None else None
        ranks.from_all(f"begin {number}", "", PATIENCE)
        mine = both.step(number)
        said = ranks.from_all(f"end {number}", json.dumps(mine), PATIENCE)
        found.append({"one": of_one, "two": [json.loads(text) for text in said]})
    if ranks.first:
        (folder / "found.json").write_text(json.dumps(found))
    ranks.leave()


def measure(size: str, method: str, shard: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model_folder(folder / "model", size)
        make_data(folder / "data.jsonl")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = os.environ | {
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "GRAFT_CACHE": str(folder / "cache"),
        }  # fmt: skip
        words = [sys.executable, __file__, "--work", name, "--case", f"{method},{shard}", "--steps", str(steps)]
        processes = [
            subprocess.Popen(words, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"{method}, shard_ranks={shard}: ended with {codes}")
        return judged(method, shard, json.loads((folder / "found.json").read_text()))


def judged(method: str, shard: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians without the first two steps, which warm things up."""
    rest = found[2:]
    one = [step["one"]["tokens"] / step["one"]["seconds"] for step in rest]
    two = [step["two"][0]["tokens"] / max(its["seconds"] for its in step["two"]) for step in rest]
    cost = [sum(its["processor"] for its in step["two"]) / step["one"]["processor"] for step in rest]
    slowest = [step["one"]["processor"] / max(its["processor"] for its in step["two"]) for step in rest]
    apart = max(abs(step["one"]["loss"] / step["two"][0]["loss"] - 1) for step in found)
    nodes = [sum(its["nodes"] for its in step["two"]) / step["one"]["nodes"] for step in rest]
    return {
        "method": method,
        "shard_ranks": shard,
        "steps": len(rest),
        "one_tokens_per_s": spread(one),
        "two_tokens_per_s": spread(two),
        "ratio": statistics.median(two) / statistics.median(one),
        "processor_time_of_two_over_one": spread(cost),
        "processor_time_of_one_over_slower_of_two": spread(slowest),
        "nodes_of_two_over_one": statistics.mean(nodes),
        "largest_relative_difference_of_loss": apart,
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="medium")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--case", help="METHOD,SHARD_RANKS: one case only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cases = [tuple(asked.case.split(","))] if asked.case else CASES
    if asked.work is not None:
        work(asked.work, *cases[0], asked.steps)
        return
    found = []
    for method, shard in cases:
        found.append(measure(asked.size, method, shard, asked.steps))
        print(json.dumps(found[-1], indent=1), flush=True)
    if asked.out is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
        width, inner, layers = SIZES[asked.size]
        report = {
            "what": "one optimizer step (fp32) by two processes of one thread against one of one thread, interleaved",
            "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}",
            "commit": commit.stdout.strip(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            "data": "domain-bloom, batch_size 16, about 225 tokens each",
            "model": f"Qwen2-shaped: width {width}, feed-forward {inner}, {layers} layers",
            "cases": found,
        }
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
