"""Greedy answers per second against transformers' `generate`: same model, prompts, stop set and limit of new tokens.

    python bench/generate.py              # every case, about ten minutes on one core
    python bench/generate.py --case system400 --rounds 3 --out bench/results/generate.json

The peer is given left-padded batches of prompts sorted by length, the longest first, at the fastest of several batch
sizes, tried in this run (`calibration`). The two then alternate, round by round; times are the process's own (one
thread), so that a busy machine does not count. Both must give the same ids, or the case fails.

The Qwen2-shaped model is random. So that its answers end at different lengths, as real ones do, every 48th id of its
vocabulary ends an answer; the demo's base is trained and ends its answers itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rows import MATERIAL, ROOT
from train import make_data, make_model_folder
from transformers import AutoModelForCausalLM, GenerationConfig

import graft.demo.world
from graft.config.data import Source
from graft.config.train import Sampling
from graft.data.load import load_sources
from graft.model.answers.generate import generate_batch
from graft.model.answers.room import Generated
from graft.model.trees import TreeLM
from graft.tokens.load import load_renderer
from graft.tokens.prefixes import group_prompts
from graft.use.predict import questions_of

DEMO = Path(graft.demo.world.__file__).parent
CASES = {
    "demo": ("the demo's test questions, its base model", None, 256, 32),
    "system400": ("queries of banking77 behind one 400-token system prompt", "labels-system400", 48, 10),
    "mixed": ("domain-bloom's questions, answers of up to 64 tokens", "plain", 64, 64),
}
BATCH_SIZES = (16, 64)

Answers = list[list[int]]


def ours(folder: Path, prompts: Sequence[Sequence[int]], stops: Sequence[int], most: int) -> Callable[[], Answers]:
    """Graft's side: all prompts at once."""
    lm = TreeLM(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    assert lm.on_trees
    sampling = Sampling(max_new_tokens=most)

    def answer() -> Answers:
        found: list[Generated] = generate_batch(lm, prompts, stops, sampling)
        return [list(generated.ids) for generated in found]

    return answer


def peers(folder: Path, prompts: Sequence[Sequence[int]], stops: Sequence[int], most: int) -> Callable[[int], Answers]:
    """Transformers' side, by batch size."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad = stops[0]
    settings = GenerationConfig(do_sample=False, max_new_tokens=most, eos_token_id=list(stops), pad_token_id=pad)
    model.generation_config = GenerationConfig()
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))

    def answer(batch_size: int) -> Answers:
        answers: Answers = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(prompts[index]) for index in chosen)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + list(prompts[i]) for i in chosen])
            lengths = torch.tensor([[len(prompts[i])] for i in chosen])
            mask = (torch.arange(longest)[None] >= longest - lengths).long()
            out = model.generate(ids, attention_mask=mask, generation_config=settings)
            for index, row in zip(chosen, out[:, longest:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in stops), len(row))
                answers[index] = row[:end]
        return answers

    return answer


def timed(work: Callable[[], Answers]) -> tuple[float, Answers]:
    began = time.process_time()
    answers = work()
    return time.process_time() - began, answers


def measure(case: str, work: Path, rounds: int, few: int | None) -> dict[str, Any]:
    said, data, count, most = CASES[case]
    folder = DEMO / "base"
    path = DEMO / "data" / "test.jsonl"
    if data is not None:
        folder = work / "model"
        make_model_folder(folder)
        path = make_data(data, work, load_renderer(str(folder)).tokenizer)
    renderer = load_renderer(str(folder))
    questions = questions_of(load_sources([Source(path=str(path))]).conversations)[0][: few or count]
    prompts = [renderer.prompt_ids(question.messages) for question in questions]
    stops = sorted(renderer.stop_ids)
    if data is not None:
        stops = sorted({*stops, *range(0, len(renderer.tokenizer), 48)})
    graft_answers, peer = ours(folder, prompts, stops, most), peers(folder, prompts, stops, most)
    calibration: dict[int, float] = {}
    wanted: Answers = []
    for size in [size for size in BATCH_SIZES if size < len(prompts)] + [len(prompts)]:
        calibration[size], wanted = timed(lambda size=size: peer(size))
    best = min(calibration, key=lambda size: calibration[size])
    if graft_answers() != wanted:
        raise SystemExit(f"{case}: the two sides give different answers")
    seconds: dict[str, list[float]] = {"graft": [], "transformers": []}
    for _ in range(rounds):
        seconds["graft"].append(timed(graft_answers)[0])
        seconds["transformers"].append(timed(lambda: peer(best))[0])
    rates = {
        side: {
            "median": len(prompts) / statistics.median(found),
            "min": len(prompts) / max(found),
            "max": len(prompts) / min(found),
        }
        for side, found in seconds.items()
    }
    lengths = [len(answer) for answer in wanted]
    return {
        "what": said,
        "prompts": len(prompts),
        "prompt_tokens_mean": statistics.mean(map(len, prompts)),
        "answer_tokens_mean": statistics.mean(lengths),
        "answer_tokens_max": max(lengths),
        "stems": [[group.stem, len(group.order)] for group in group_prompts(prompts)],
        "peer_batch_size": best,
        "calibration_seconds": calibration,
        "rounds": rounds,
        "answers_per_s": rates,
        "ratio_of_medians": rates["graft"]["median"] / rates["transformers"]["median"],
        "same_ids": True,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--case", choices=CASES, action="append")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--prompts", type=int, help="Fewer prompts than the case has.")
    arguments.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "generate.json")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    if not MATERIAL.is_dir():
        raise SystemExit(f"{MATERIAL}: the benchmark's data is not there")
    results = {}
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory() as work:
            results[case] = measure(case, Path(work), options.rounds, options.prompts)
        print(case, json.dumps(results[case], indent=1))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    found = {
        "device": platform.processor() or platform.machine(),
        "threads": 1,
        "commit": commit.stdout.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "cases": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
