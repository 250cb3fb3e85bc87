"""How long a run that goes on at step 1,000,000 waits for its first batch: the plan alone, and the log that is cut.

    python bench/resume.py

Processor time of one process, medians of five, for 10 million conversations; every plan is made anew, as by a resumed
run. What reading, hashing and mapping the data takes is the same at every step and is not in it.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from graft.runs import drop_last_rows
from graft.tokens.plan import Plan

ROOT = Path(__file__).resolve().parents[1]
CONVERSATIONS, BATCH, STEP = 10_000_000, 16, 1_000_000
ROUNDS = 5


def seconds_to_step(repeats: tuple[float, ...], step: int) -> float:
    plan = Plan(repeats, BATCH, epochs=3, seed=0)
    begun = time.process_time()
    plan.step(step)
    return time.process_time() - begun


def seconds_to_cut(folder: Path) -> float:
    """A log of a million lines, of which the last thousand came after the checkpoint."""
    path = folder / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, STEP + 1001):
            file.write(
                json.dumps({"kind": "train", "step": step, "loss": 1.234567, "lr": 1e-4, "grad_norm": 0.5}) + "\n"
            )
    begun = time.process_time()
    drop_last_rows(path, lambda row: row["step"] <= STEP)
    return time.process_time() - begun


def main() -> None:
    repeats = (1.0,) * CONVERSATIONS
    weighted = tuple(np.random.default_rng(0).choice([0.25, 1.0, 2.0], CONVERSATIONS).tolist())
    taken: dict[str, list[float]] = {"first step": [], "step 1,000,000": [], "step 1,000,000, weighted sources": []}
    for _ in range(ROUNDS):
        taken["first step"].append(seconds_to_step(repeats, 0))
        taken["step 1,000,000"].append(seconds_to_step(repeats, STEP))
        taken["step 1,000,000, weighted sources"].append(seconds_to_step(weighted, STEP))
    with tempfile.TemporaryDirectory() as folder:
        taken["log of a million lines cut"] = [seconds_to_cut(Path(folder)) for _ in range(3)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    found: dict[str, Any] = {
        "what": "processor seconds until the conversations of a step are known",
        "conversations": CONVERSATIONS, "batch_size": BATCH, "epoch_of_the_step": STEP // (CONVERSATIONS // BATCH),
        "median_seconds": {name: round(statistics.median(values), 3) for name, values in taken.items()},
        "largest_seconds": {name: round(max(values), 3) for name, values in taken.items()},
        "ceiling_seconds": 5.0,
        "commit": commit.stdout.strip(), "python": platform.python_version(), "numpy": np.__version__,
        "machine": platform.machine(),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    (ROOT / "bench" / "results" / "resume.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
