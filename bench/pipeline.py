"""Importing, cleaning and splitting as commands, with time and peak memory; `bench/data.py` runs them.

python bench/pipeline.py ROWS.jsonl OUT             # the peer's side alone, in this process
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FILES = (
    "domain-bloom/domain.train.json", "domain-self-instruct/train_data_家庭教育.jsonl",
    "llamafactory_demos/v1_sft_demo.jsonl", "llamafactory_demos/alpaca_en_demo.json",
)  # fmt: skip
"""English and Chinese, about 1 kB each row; 500 of each file."""


def compare(rows: int, rounds: int, workers: int, near: bool, with_peer: bool) -> dict[str, Any]:
    """Each command's rows/s, processor time and peak memory: medians over the rounds; the sides take turns."""
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = work / "rows.jsonl"
        write_rows(source, rows)
        graft = [sys.executable, "-m", "graft", "data"]
        for number in range(rounds):
            imported, cleaned = work / "imported.jsonl", work / "cleaned.jsonl"
            steps = [] if near else ["--skip", "near"]
            commands = {"import": [*graft, "import", str(source), "--out", str(imported), "--max-rejected", "1"]}
            for count in dict.fromkeys((1, workers)):
                given = [str(imported), "--out", str(cleaned), "--max-rejected", "1", "--workers", str(count), *steps]
                commands[f"clean, {count} workers"] = [*graft, "clean", *given]
            if with_peer:
                commands["datasets.map"] = [sys.executable, __file__, str(source), str(work / "peer")]
            for name, command in commands.items():
                runs.setdefault(name, []).append(measured(command))
                print(f"round {number} {name}: {runs[name][-1]}", flush=True)
            for path in (work / "peer", work / "hf"):
                shutil.rmtree(path, ignore_errors=True)
        size = source.stat().st_size
    found = {
        name: {
            "rows_per_s": rows / statistics.median(run["seconds"] for run in of_one),
            "seconds_min": min(run["seconds"] for run in of_one),
            "seconds_max": max(run["seconds"] for run in of_one),
            "rows_per_cpu_s": rows / statistics.median(run["cpu_seconds"] for run in of_one),
            "peak_gib": max(run["peak_gib"] for run in of_one),
        }
        for name, of_one in runs.items()
    }
    result: dict[str, Any] = {"rows": rows, "bytes": size, "rounds": rounds, "near": near, "commands": found}
    if with_peer:
        # The peer reads the file itself: against it stand both of our commands.
        both = 1 / found["import"]["rows_per_s"] + 1 / found["clean, 1 workers"]["rows_per_s"]
        result["ratio_one_process"] = 1 / both / found["datasets.map"]["rows_per_s"]
    return result


def split(rows: int) -> dict[str, Any]:
    """`graft data split --check` once: time, processor time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "rows.jsonl"
        write_rows(source, rows)
        command = [sys.executable, "-m", "graft", "data", "split", str(source), "--out", f"{folder}/parts", "--check"]
        return {"rows": rows, "bytes": source.stat().st_size, "finished": True, **measured(command)}


def write_rows(path: Path, rows: int) -> None:
    from rows import mutated, real_conversations

    from graft.data.write import write_conversations

    chosen = [conversation for name in FILES for conversation in real_conversations([name])[:500]]
    random.Random(0).shuffle(chosen)
    write_conversations(path, mutated(chosen, rows))


def measured(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds and peak memory (GiB, all its processes together) of a command that must succeed."""
    import psutil

    started, before, peak = time.perf_counter(), children_seconds(), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                everyone = (watched, *watched.children(recursive=True))
                peak = max(peak, sum(one.memory_info().rss for one in everyone))
            time.sleep(0.1)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read().decode()[-2000:]}")
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "cpu_seconds": children_seconds() - before, "peak_gib": peak / 2**30}


def children_seconds() -> float:
    """User and system time of all children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peer(source: str, out: str) -> None:
    """The same cleaning functions under `datasets.map`, one process."""
    import datasets

    from graft.config.clean import Clean, Exact, Near
    from graft.data.clean.pipeline import clean_batch
    from graft.data.write import as_row
    from graft.types import Conversation, Message, Origin

    steps = tuple(step for step in Clean().steps if not isinstance(step, Exact | Near))
    seen: set[bytes] = set()

    def clean(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        conversations: list[Any] = [
            Conversation(name, Origin(source, 1), tuple(Message(turn["role"], turn["content"]) for turn in turns))
            for name, turns in zip(batch["id"], batch["messages"], strict=True)
        ]
        kept: dict[str, list[Any]] = {"id": [], "messages": []}
        for item, key in clean_batch(conversations, steps, True, True, 3, None)[0]:
            if isinstance(item, Conversation) and key not in seen:
                seen.add(key)
                kept["id"].append(item.id)
                kept["messages"].append(as_row(item)["messages"])
        return kept

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=f"{out}.cache")
    cleaned = rows.map(
        clean, batched=True, batch_size=256, remove_columns=rows.column_names, load_from_cache_file=False
    )
    cleaned.save_to_disk(out)
    shutil.rmtree(f"{out}.cache", ignore_errors=True)


if __name__ == "__main__":
    peer(sys.argv[1], sys.argv[2])
