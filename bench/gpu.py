"""Everything that needs a GPU, in one script: the checks, then the figures against TRL with liger-kernel.

    python bench/gpu.py                           # all parts, about 25 minutes on an H200
    python bench/gpu.py --parts checks attention  # some of them; results of earlier calls stay in the file
    python bench/gpu.py --minutes 9               # begins no measurement that would not end in time; call again
    python bench/gpu.py --tiny --out tiny.json    # the same way through it on a CPU, in a few minutes: no figures

Parts, in order:

- peak        the device's bf16 matrix-product and copy rates: every "share" below is one of these
- checks      the tests marked `gpu`
- attention   segments, flex and varlen, forward and backward, on rows of long, short and branching trees
- loss        the output layer's loss with its gradient, ours and liger-kernel's, at two vocabularies
- llama-7b    Llama-2-7B's shape, LoRA r 16 on all linear layers, bf16, at 2,048 and 8,192 tokens, against TRL
- qwen-7b     Qwen2.5-7B's shape, likewise
- real        Llama-2-7B's shape on lengths as instructions have them, alone and after a shared prompt, against TRL
- options     Llama-2-7B's shape on such lengths: each attention, compiled layers, liger's kernels or none
- qlora       Llama-2-7B's shape on an NF4 base, one row of 2,048 tokens, checkpointed, against TRL
- full        Qwen2.5-1.5B's shape, every weight, fp32 masters, against TRL

Results go to bench/results/gpu.json and, where $OUT is set, to $OUT/gpu.json, after every measurement; one that was
made is not made again unless `--again`. On a machine that is bare each time, give the earlier file back with `--out`.
`share` is model operations (see `model_flops` in gpu_side.py) over time over the matrix-product rate measured by `peak`
in the same file.

A machine without a network needs, installed beforehand: torch >= 2.9 with CUDA and triton, transformers >= 5, peft,
accelerate, numpy, pydantic, rich, pyyaml, jinja2, psutil; for `checks` pytest and hypothesis; for the peer trl,
datasets and liger-kernel; for `qlora` bitsandbytes. What is missing is said, and the rest is measured. The wheels that
a machine with torch, transformers and peft may lack, about 10 MiB in all and bitsandbytes about 60 MiB more:

    pip download --no-deps --only-binary=:all: --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \\
        --platform manylinux_2_28_x86_64 --python-version 3.12 -d wheels trl==1.16.0 datasets==5.2.0 dill==0.4.1 \\
        multiprocess==0.70.19 xxhash liger-kernel==0.8.5 pydantic==2.14.3 pydantic-core==2.50.4 annotated-types
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIDE = ROOT / "bench" / "gpu_side.py"
RESULTS = ROOT / "bench" / "results" / "gpu.json"
SECONDS = {"peak": 40, "attention": 60, "loss": 40, "step": 100}
"""What a measurement is expected to take at most, so that none begins that would not end."""
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "bitsandbytes", "datasets")

Case = dict[str, Any]


def step(model: str, method: str, side: str, length: int, batch: int, row_tokens: int, data: str, **more: Any) -> Case:
    """One training step's measurement; see gpu_side.py."""
    return {
        "what": "step", "model": model, "method": method, "side": side, "length": length, "batch": batch,
        "row_tokens": row_tokens, "data": data, "checkpointing": False, "warmup": 3, "steps": 6,
    } | more  # fmt: skip


def against(name: str, model: str, method: str, length: int, batch: int, rows: int, data: str, **more: Any) -> Any:
    """The same for graft and for its peer, under names that end in theirs."""
    return {f"{name}/{side}": step(model, method, side, length, batch, rows, data, **more) for side in ("graft", "trl")}


def parts() -> dict[str, dict[str, Case]]:
    """Every measurement by part and name."""
    kernels = {}
    for name, data, length, batch in (
        ("long", "even", 4096, 2),
        ("short", "mixed", 1024, 32),
        ("branching", "shared", 1024, 32),
    ):
        for backend in ("segments", "flex", "varlen"):
            if (name, backend) != ("branching", "varlen"):
                kernels[f"attention/{name}/{backend}"] = {
                    "what": "attention", "backend": f"graft_{backend}", "data": data, "length": length, "batch": batch,
                    "heads": [32, 8, 128], "warmup": 3, "steps": 10,
                }  # fmt: skip
    losses: dict[str, Case] = {}
    for vocabulary, width in ((32000, 4096), (152064, 3584)):
        for by in ("graft", "liger"):
            sizes = [8192, width, vocabulary]
            losses[f"loss/{vocabulary}/{by}"] = {"what": "loss", "by": by, "sizes": sizes, "warmup": 3, "steps": 10}
    options: dict[str, Case] = {}
    for attention in ("segments", "flex", "varlen"):
        options[f"options/attention-{attention}"] = {"attention": attention, "kernels": "none"}
    options["options/no-liger"] = {"kernels": "none"}
    options["options/liger"] = {"kernels": "liger"}
    options["options/compiled"] = {"compile": "true"}
    seven = ("llama2-7b", "lora")
    return {
        "peak": {"peak": {"what": "peak"}},
        "checks": {},
        "attention": kernels,
        "loss": losses,
        "llama-7b": against("llama-7b/2048", *seven, 2048, 8, 8192, "even")
        | against("llama-7b/8192", *seven, 8192, 2, 8192, "even"),
        "qwen-7b": against("qwen-7b/2048", "qwen2.5-7b", "lora", 2048, 8, 8192, "even")
        | against("qwen-7b/8192", "qwen2.5-7b", "lora", 8192, 2, 8192, "even"),
        "real": against("real/mixed", *seven, 2048, 64, 8192, "mixed")
        | against("real/shared", *seven, 2048, 64, 8192, "shared"),
        "options": {name: step(*seven, "graft", 2048, 16, 8192, "mixed", **chosen) for name, chosen in options.items()},
        "qlora": against("qlora/2048", "llama2-7b", "qlora", 2048, 1, 2048, "even", checkpointing=True),
        "full": against("full/2048", "qwen2.5-1.5b", "full", 2048, 8, 8192, "even"),
    }


def shrunk(case: Case) -> Case:
    """The same case so small that a CPU runs it in seconds."""
    small = {"cpu": True, "model": "tiny", "warmup": 1, "steps": 2}
    if "length" in case:
        small |= {"length": max(32, case["length"] // 64), "batch": min(4, case["batch"])}
        small["row_tokens"] = 2 * small["length"]
    if "heads" in case:
        small["heads"] = [4, 2, 16]
    if "sizes" in case:
        small["sizes"] = [64, 64, 512]
    dropped = {"attention", "kernels"} if case["what"] == "step" else set()  # a CPU has none to choose from
    return {key: value for key, value in case.items() if key not in dropped} | small


def missing_for(name: str, case: Case) -> str | None:
    """What a measurement lacks here."""
    wanted = []
    if case.get("side") == "trl":
        wanted += ["trl", "datasets"] + ([] if case.get("cpu") else ["liger_kernel"])
    if case.get("method") == "qlora":
        wanted.append("bitsandbytes")
    if case.get("kernels") == "liger" or case.get("by") == "liger":
        wanted.append("liger_kernel")
    if name.endswith("/varlen") and case.get("cpu"):
        return "CUDA"
    absent = [package for package in wanted if find_spec(package) is None]
    return ", ".join(absent) or None


def measure(case: Case, limit: float) -> Case:
    """Run one measurement in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    command = [sys.executable, str(SIDE), json.dumps(case)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, env=environment, cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": "\n".join(done.stderr.strip().splitlines()[-12:])}
    found: Case = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def check(limit: float) -> Case:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_attention.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [*command, "tests/test_compile.py", "tests/test_device.py"],
            capture_output=True, text=True, timeout=limit, check=False, env=environment, cwd=ROOT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    return {"exit": done.returncode, "said": done.stdout.strip().splitlines()[-60:]}


def write(results: Case, files: list[Path]) -> None:
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def with_share(found: Case, peak: Case | None) -> Case:
    """Add the share of the measured matrix-product rate."""
    if peak and "model_tflops" in found and "matmul_tflops" in peak:
        return found | {"share": round(found["model_tflops"] / peak["matmul_tflops"], 4)}
    return found


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def say(name: str, found: Case) -> None:
    keys = ("tokens_per_s", "share", "peak_gib", "ms", "matmul_tflops", "exit", "failed", "missing")
    print(name, *(f"{key} {found[key]}" for key in keys if key in found), sep="  ", flush=True)


def main() -> None:
    every = parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(every), default=list(every))
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing that would end later than this")
    parser.add_argument("--again", action="store_true", help="measure again what the results hold already")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to see that the script runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    until = time.monotonic() + 60 * args.minutes
    files = [args.out] + ([Path(os.environ["OUT"]) / args.out.name] if "OUT" in os.environ else [])
    results: Case = json.loads(args.out.read_text()) if args.out.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False).stdout
    results |= {"commit": commit.strip(), "versions": versions()}
    measured: dict[str, Case] = results.setdefault("measured", {})
    for part in args.parts:
        cases = every[part] or {part: {"what": part}}
        for name, case in cases.items():
            left = until - time.monotonic()
            if "failed" not in measured.get(name, {"failed": ""}) and not args.again:
                continue
            if left < SECONDS.get(case["what"], 120) and not args.tiny:
                print(f"{name}: no time left; call again", flush=True)
                continue
            asked = shrunk(case) if args.tiny else case
            missing = missing_for(name, asked)
            if missing:
                found: Case = {"missing": missing}
            elif part == "checks":
                found = check(left)
            else:
                found = with_share(measure(asked, min(left, 4 * SECONDS[case["what"]])), measured.get("peak"))
            measured[name] = found | {"case": asked}
            say(name, found)
            write(results, files)


if __name__ == "__main__":
    main()
