"""Write docs/models.md: every causal-LM architecture of the installed transformers, and how graft trains it.

Each is made tiny and random from its config class (tests/architectures.py), trained for two steps with every weight and
for two with LoRA, and compared with transformers' own forward on one example at a time (tests/steps_compared.py). Each
runs in a process of its own on one core; what is done is kept beside the table, so that a run which was stopped goes on
where it was. Run from the repository's root, about ten minutes:

    python scripts/make_models_table.py
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402
from architectures import ARCHITECTURES, NOT_MADE  # noqa: E402
from steps_compared import Compared, compare  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

DOC = ROOT / "docs" / "models.md"
STATE = ROOT / "docs" / "models.part.jsonl"
START, END = "<!-- table: scripts/make_models_table.py -->", "<!-- end of table -->"
SECONDS = 120
"""Longest time for one architecture."""


def known_model(architecture: str) -> str:
    """The checkpoint that transformers' documentation names for an architecture; empty where it names none."""
    config = CONFIG_MAPPING[architecture]
    source = inspect.getsource(sys.modules[config.__module__])
    named = re.findall(r'@auto_docstring\(\s*checkpoint="([^"]+)".*?\)\s*(?:@\w+\s*)*class (\w+)', source, re.DOTALL)
    return next((checkpoint for checkpoint, name in named if name == config.__name__), "")


def in_own_process(architecture: str) -> Compared:
    """Compare in a fork, whose memory goes with it.

    Raises:
        RuntimeError: it failed or took too long; a row of the table must be measured.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.alarm(SECONDS)
        try:
            answer = asdict(compare(architecture))
        except BaseException as error:  # the parent must hear of everything
            answer = {"failed": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text or json.dumps({"failed": f"took more than {SECONDS} s"}))
    if "failed" in answer:
        raise RuntimeError(f"{architecture}: {answer['failed']}")
    return Compared(**answer)


def measure(names: list[str]) -> dict[str, Compared]:
    """All of them, in order; what an earlier, stopped run has done is taken from its file."""
    done: dict[str, Compared] = {}
    if STATE.is_file():
        for line in STATE.read_text(encoding="utf-8").splitlines():
            name, values = json.loads(line)
            done[name] = Compared(**values)
    for number, name in enumerate(names):
        if name in done:
            continue
        started = time.monotonic()
        found = Compared("refused", NOT_MADE[name]) if name in NOT_MADE else in_own_process(name)
        print(f"{number + 1}/{len(names)} {name}: {found.way} {found.why} ({time.monotonic() - started:.1f} s)")
        done[name] = found
        with STATE.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, asdict(found)]) + "\n")
    return {name: done[name] for name in names}


def table(found: dict[str, Compared]) -> str:
    """The table in Markdown, with how many architectures go each way above it."""
    counts = Counter(row.way for row in found.values())
    said = ", ".join(f"{counts[way]} {way}" for way in ("on trees", "one per row", "refused"))
    lines = [
        f"{len(found)} architectures of transformers {transformers.__version__}, torch {torch.__version__}: {said}.",
        "",
        "| architecture | a model of it | way | loss | gradient | why not on trees |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found.items():
        numbers = ("", "") if row.way == "refused" else (f"{row.loss:.0e}", f"{row.gradient:.0e}")
        lines.append(f"| {' | '.join((name, known_model(name), row.way, *numbers, row.why.replace('|', '/')))} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is asked for; with all of it, put the table between its two marks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architectures", nargs="*", help="measure and print these alone")
    asked = parser.parse_args().architectures
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if asked:
        for name in asked:
            print(name, in_own_process(name))
        return
    text = table(measure(list(ARCHITECTURES)))
    doc = DOC.read_text(encoding="utf-8")
    DOC.write_text(re.sub(f"{START}.*{END}", lambda _: f"{START}\n{text}\n{END}", doc, flags=re.DOTALL), "utf-8")
    with contextlib.suppress(FileNotFoundError):
        STATE.unlink()
    print(f"{DOC}: {text.splitlines()[0]}")


if __name__ == "__main__":
    main()
