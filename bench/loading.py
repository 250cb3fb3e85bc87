"""Memory of each process of a run while its model is loaded and spread: peaks above what it had before.

    python bench/loading.py [--processes 2 4] [--out bench/results/loading.json]

A random Llama of some 330 million parameters, stored in bf16, is loaded and spread as `graft train` does it; the probe
of trees that follows is left out. Read from /proc/self/smaps_rollup every 20 ms: `anonymous` is memory of the process's
own, `proportional` adds its share of pages that processes have in common (the files' pages). Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graft.config.train import Train, load_train
from graft.model.device import pick_precision
from graft.model.processes.ranks import ranks_from_environment
from graft.model.processes.shard import local
from graft.train import load as loading

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from together import together

WAYS = {
    "lora, bf16": ["precision=bf16"],
    "lora, fp32": ["precision=fp32"],
    "full, fp32": ["precision=fp32", "method=full"],
    "lora, nf4": ["precision=fp32", "quantize=nf4"],
}
CONFIG = LlamaConfig(
    vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=16
)
FIELDS = {"Anonymous": "anonymous", "Pss": "proportional", "Rss": "resident"}


class NoExamples(list[Any]):
    """Data that only adapters which begin from data would look at."""

    def examples(self, _numbers: Any) -> list[Any]:
        """None."""
        return []


def now() -> dict[str, int]:
    """Bytes by kind."""
    lines = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    found = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines}
    return {name: found[field] for field, name in FIELDS.items()}


def make_model(_rank: int, folder: str) -> int:
    """Write the model; bytes of its weights. In a process of its own, whose heap the others do not begin with."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def load_and_watch(_rank: int, settings: Train) -> dict[str, int]:
    """Peaks above the beginning, and what this process holds of the weights at the end."""
    device = torch.device("cpu")
    ranks = ranks_from_environment()
    ranks.join(device)
    nothing: Any = NoExamples()
    prepared: Any = SimpleNamespace(renderer=SimpleNamespace(new_tokens=()), train=nothing)
    before, peak, done = now(), dict.fromkeys(FIELDS.values(), 0), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            for name, value in now().items():
                peak[name] = max(peak[name], value - before[name])

    loading.tree_model = lambda model, *_rest: SimpleNamespace(model=model)
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    precision = pick_precision(settings.precision, device)
    ready = loading.load_for_training(settings, precision, device, None, prepared, ranks)
    used = time.process_time() - started
    done.set()
    watcher.join()
    held = sum(local(parameter).nbytes for parameter in ready.lm.model.parameters())
    return {**peak, "held": held, "processor_ms": round(1000 * used)}


def main() -> None:
    """Measure every way with every number of processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (weights,) = together(1, make_model, folder, seconds=600)
        rows = []
        for way in given.ways:
            settings = load_train(None, [f"model={folder}", "data=none.jsonl", "device=cpu", *WAYS[way]])
            for size in given.processes:
                found = together(size, load_and_watch, settings, seconds=600)
                if not all(isinstance(each, dict) for each in found):
                    raise SystemExit(str(found))
                worst = {name: round(max(each[name] for each in found) / 2**20) for name in found[0]}
                worst["processor_ms"] = max(each["processor_ms"] for each in found)
                rows.append({"way": way, "processes": size, **worst})
                print(json.dumps(rows[-1]), flush=True)
    result = {"stored_mib": round(weights / 2**20), "unit": "MiB, largest of the processes", "rows": rows}
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
