"""Real small models on real data, whole runs: what validation did, how long it took. Not a comparison with a peer.

    python bench/real_small.py            # all cases, about fifteen minutes on two cores

Writes bench/results/real_small.json and, for the Bloom case, the loss curve as bench/results/domain_bloom.png. The
answers to its test set are only counted: they stand beside questions that are not ours to publish.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared" / "material"
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT / "tests"))

SMALL = {
    "tinystories-656k, 1,000 alpaca rows": ("tinystories-656k", "stanford_alpaca/alpaca_5000.json", 1000),
    "zh-poem-750k, domain-bloom": ("zh-poem-750k", "domain-bloom/domain.train.json", 1666),
}


def graft(*words: object) -> None:
    """Run a command of graft as a user would."""
    subprocess.run([sys.executable, "-m", "graft", *map(str, words)], check=True)


def validations(run: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == "val"]


def small(work: Path, method: str, model: str, source: str, count: int) -> dict[str, Any]:
    text = (MATERIAL / "data" / source).read_text(encoding="utf-8")
    rows = json.loads(text) if text.startswith("[") else map(json.loads, text.splitlines())
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in islice(rows, count)))
    run = work / "run"
    started = time.perf_counter()
    rate = "lr=2e-3" if method == "lora" else "lr=5e-4"
    graft(
        "train",
        "--model",
        MATERIAL / "models" / model,
        "--data",
        data,
        "--out",
        run,
        f"method={method}",
        rate,
        "epochs=1",
    )
    return {"seconds": time.perf_counter() - started, "validation": validations(run)}


def bloom(work: Path, steps: int) -> dict[str, Any]:
    """The recipe of domain-bloom on a Bloom-shaped model of 20 M random parameters, for so many steps."""
    from test_material_runs import make_bloom

    data, run = MATERIAL / "data" / "domain-bloom", work / "run"
    base = make_bloom(work / "bloom", MATERIAL)
    started = time.perf_counter()
    graft(
        "train", ROOT / "recipes" / "domain-bloom.yaml", f"model={base}", f"data={data / 'domain.train.json'}",
        f"test={data / 'domain.test.json'}", f"out={run}", f"max_steps={steps}",
    )  # fmt: skip
    seconds = time.perf_counter() - started
    graft("plot", run, "--out", RESULTS / "domain_bloom.png")
    out = work / "predictions.jsonl"
    graft("predict", run, "--data", data / "domain.test.json", "--out", out, "--max-new-tokens", 64)
    answered = len(out.read_text().splitlines())
    return {"seconds": seconds, "steps": steps, "validation": validations(run), "predictions": answered}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bloom-steps", type=int, default=100)
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, case in SMALL.items():
        for method in ("lora", "full"):
            with tempfile.TemporaryDirectory() as work:
                found[f"{name}, {method}"] = small(Path(work), method, *case)
    with tempfile.TemporaryDirectory() as work:
        found["Bloom-shaped, 20 M, domain-bloom's recipe"] = bloom(Path(work), args.bloom_steps)
    (RESULTS / "real_small.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, case in found.items():
        first, last = case["validation"][0], case["validation"][-1]
        print(f"{name}: validation loss {first['loss']:.3f} -> {last['loss']:.3f}, {case['seconds']:.0f} s")


if __name__ == "__main__":
    main()
