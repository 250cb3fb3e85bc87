"""Memory and time of one LoRA step at a vocabulary of 150,000: graft against TRL's SFTTrainer, each setting alone.

    python bench/memory.py                       # two rounds, about a quarter of an hour on one core
    python bench/memory.py --side graft --setting "1024, selective"

Every setting runs in a process of its own (what one leaves behind must not count for the next), the two sides by turns,
round after round. Both train the same conversations with the same adapter, in fp32, 8 of them in one optimizer step
(bench/train.py). What is measured is the peak resident set, less what was resident before the model was loaded,
less the bytes of the weights: activations, logits, gradients, optimizer state and what the allocator leaves about.
The seconds are processor time of the second step: the machine may be busy otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
MATERIAL = ROOT.parent / "shared" / "material"
VOCABULARY = 150_000
STEPS = 2
GRAFT = ["512, none", "512, full", "512, selective", "4096, none", "4096, selective", "4096, full"]
"""Row budget and checkpointing."""
TRL = ["1 x 8, chunked_nll, none", "1 x 8, chunked_nll, full", "8 x 1, chunked_nll, none"]
"""Micro-batch and accumulation, loss and checkpointing. 8 at a time take as much without the chunked loss, 4.4 GiB."""


def make_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(MATERIAL / "tokenizers" / "minimind-v3")
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def measure(side: str, setting: str, work: Path) -> dict[str, float]:
    """In a process of its own: MiB above the weights, and seconds per step."""
    import torch
    from train import GraftSide, fixed_steps, make_data, peer_rows, run_peer
    from transformers import AutoTokenizer

    from graft.config.train import load_train
    from graft.model.device import keep_freed_memory, memory_gib
    from graft.model.memory.remember import remember
    from graft.runs import RunFolder
    from graft.train.prepare import prepare

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = work / "model"
    data = make_data("plain", work, AutoTokenizer.from_pretrained(folder))
    row_tokens = setting.split(", ", maxsplit=1)[0] if side == "graft" else "4096"
    settings = load_train(
        None,
        [f"model={folder}", f"data={data}", "encode.max_length=512", f"row_tokens={row_tokens}", f"max_steps={STEPS}",
         "batch_size=8", "warmup=0"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        prepared = fixed_steps(prepare(settings, RunFolder(Path(out))), 8, STEPS)
        conversations = {f"plain:{n}": json.loads(line) for n, line in enumerate(data.read_text().splitlines(), 1)}
        rows, tokens = peer_rows(conversations, prepared, STEPS, False)
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
        before = resident()
        if side == "graft":
            keep_freed_memory()
            ours = GraftSide(settings, prepared)
            remember(ours.lm.model, setting.split(", ")[1])  # type: ignore[arg-type]
            ends = []
            for step in range(STEPS):
                ours._step(step, STEPS)
                ends.append(time.process_time())
        else:
            micro, loss, kept = int(setting.split(" ", maxsplit=1)[0]), *setting.split(", ")[1:]
            ends = []
            run_peer(
                None, rows, tokens, settings, micro, loss,
                lambda step: ends.append(time.process_time()), out, checkpointing=kept == "full",
            )  # fmt: skip
    peak = memory_gib(torch.device("cpu")) * 1024
    return {"mib": peak - before - weights, "seconds": ends[-1] - ends[-2], "tokens": sum(tokens) / len(tokens)}


def resident() -> float:
    """MiB."""
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024


def in_a_process(side: str, setting: str, work: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--setting", setting, "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_turns(rounds: int, work: Path, out: Path) -> None:
    """Every setting once per round, the sides taking turns; the file is written anew after each."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {"graft": {}, "trl": {}}
    for _ in range(rounds):
        for number in range(max(len(GRAFT), len(TRL))):
            for side, settings in (("graft", GRAFT), ("trl", TRL)):
                if number < len(settings):
                    once = in_a_process(side, settings[number], work)
                    found[side].setdefault(settings[number], []).append(once)
                    print(f"{side:5} {settings[number]:28} {once['mib']:7.0f} MiB {once['seconds']:6.2f} s", flush=True)
                    if all(found.values()):
                        write(found, out)


def write(found: dict[str, dict[str, list[dict[str, float]]]], out: Path) -> None:
    mib = {
        side: {setting: statistics.median(once["mib"] for once in rounds) for setting, rounds in settings.items()}
        for side, settings in found.items()
    }
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    result = {
        "what": f"LoRA step of 8 conversations, vocabulary {VOCABULARY}: peak resident set above weights, fp32",
        "device": f"CPU, {threads} threads, {platform.processor() or platform.machine()}",
        "commit": commit.strip(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
        "rounds": found,
        "median_mib": mib,
        "least": _compare(mib, ""),
        "least_with_everything_kept": _compare(mib, ", none"),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def _compare(mib: dict[str, dict[str, float]], ending: str) -> dict[str, Any]:
    """Each side's setting with the least memory, of those that end so, and graft's share of TRL's."""
    least: dict[str, Any] = {}
    for side, settings in mib.items():
        kept = {setting: size for setting, size in settings.items() if setting.endswith(ending)}
        if not kept:  # the first round is under way
            return {}
        least[side] = min(kept, key=lambda setting: kept[setting])
    return least | {"ratio": mib["graft"][least["graft"]] / mib["trl"][least["trl"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["graft", "trl"])
    parser.add_argument("--setting")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "memory.json")
    args = parser.parse_args()
    if args.side and args.work:
        print(json.dumps(measure(args.side, args.setting, args.work)))
        return
    with tempfile.TemporaryDirectory() as work:
        make_model(Path(work) / "model")
        if args.side:
            print(in_a_process(args.side, args.setting, Path(work)))
            return
        by_turns(args.rounds, Path(work), args.out)


if __name__ == "__main__":
    main()
