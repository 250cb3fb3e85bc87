"""Runs that are killed with SIGKILL at random moments, resumed until they are done, and compared with an unbroken one.

    python bench/kills.py                          # 200 kills; about half an hour of one busy core
    python bench/kills.py --kills 20 --out -       # the short form, which the tests run too

Half of the kills come at a moment drawn evenly from the length of a life; the other half are aimed: a life kills
itself at a random event of one phase (loading, stepping, saving, evaluating). The events of saving are the system's
own: every file that is opened for writing, every rename, removal, folder and fsync below the run folder, and the middle
of a tensor file. Each life is a process of its own, forked from one that has imported everything but computed nothing,
and starts as a user would start it: `resume=auto`, always the same settings.

After each kill the newest complete checkpoint must be at least as new as the one before it. When a run is done, its
trajectory (conversations of every step, learning rate, loss, norm, validations) and its final weights must be those of
the unbroken run, bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch
from safetensors.torch import load_file
from tiny import make_conversations, make_model_folder, write_rows

from graft.config.train import Train, load_train
from graft.model.files import load as model_load
from graft.model.files import save as model_save
from graft.runs import RunFolder
from graft.train import loop, validate
from graft.train.saving import checkpoint, save
from graft.train.step import Stepper

PHASES = ("loading", "stepping", "saving", "evaluating")
EVENTS = {"loading": 6, "stepping": 30, "saving": 200, "evaluating": 9}
"""About so many events of a phase happen in a whole life; a life that meets fewer goes on to its end."""
NOTHING = ("tokens_per_s", "memory_gib")
"""Measured, not computed."""


def settings_for(folder: Path, out: str, method: str) -> Train:
    return load_train(None, [
        f"model={folder / 'model'}", f"data={folder / 'data.jsonl'}", f"out={folder / out}", f"method={method}",
        "batch_size=4", "epochs=4", "lr=5e-3", "split.val=0.2", "encode.max_length=128", "eval_every=4", "save_every=2",
        "keep_last=1", "keep_optimizer=1", "trace=true", "row_tokens=128", "resume=auto",
    ])  # fmt: skip


def live(settings: Train, aim: tuple[str, int] | None) -> None:
    """One life in a process of its own: train to the end, or die at the event that is aimed at."""
    torch.set_num_threads(1)
    if aim is not None:
        aim_at(*aim, str(settings.out))
    loop.train(settings)


def aim_at(phase: str, number: int, folder: str) -> None:
    """From here on the `number`th event of a phase ends this process at once."""
    left = [number]

    def event() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(holder: Any, name: str) -> None:
        own = getattr(holder, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            event()
            return own(*args, **kwargs)

        setattr(holder, name, called)

    if phase == "loading":
        for name in (
            "prepare_together",
            "foresee",
            "load_for_training",
            "make_optimizer",
            "rehearse_save",
            "write_settings",
        ):
            before(loop, name)
    elif phase == "stepping":
        before(Stepper, "accumulate")
        before(Stepper, "update")
    elif phase == "evaluating":
        before(validate, "row_loss")
    else:
        before(os, "fsync")
        for module in (save, model_save):
            half_written(module, event)

        def watch(name: str, args: tuple[Any, ...]) -> None:
            written = name == "open" and isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
            changed = written or name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
            if changed and str(args[0]).startswith(folder):
                event()

        sys.addaudithook(watch)


def half_written(module: Any, event: Any) -> None:
    """A tensor file that gets to its middle, where a kill may come."""
    own = module.write_mapping

    def write(path: Path, tensors: Any) -> None:
        own(path, tensors)
        size = path.stat().st_size
        os.truncate(path, size // 2)
        event()
        own(path, tensors)

    module.write_mapping = write


def start(settings: Train, aim: tuple[str, int] | None, log: Path) -> int:
    """A life; its process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 2)
            live(settings, aim)
            code = 0
        finally:
            os._exit(code)
    return process


def wait(process: int, seconds: float | None) -> tuple[int, bool]:
    """Exit status of a life, and whether it was killed from here after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    killed = False
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status, killed and os.WIFSIGNALED(status)
        if end is not None and time.monotonic() >= end and not killed:
            os.kill(process, signal.SIGKILL)
            killed = True
        time.sleep(0.001)


def course(run: RunFolder) -> list[Any]:
    """Everything that was logged and computed: metrics, and the conversations of each step."""
    metrics = [{key: value for key, value in row.items() if key not in NOTHING} for row in run.read_metrics()]
    return [metrics, [json.loads(line) for line in run.trace.read_text().splitlines()]]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    (file,) = run.final.glob("*model.safetensors")
    return load_file(file)


def newest_step(run: RunFolder) -> int:
    """Of the newest checkpoint that is complete by its manifest and whose tensors load; -1 without one."""
    checkpoint.clear_up(run)  # as the next start would
    for path in checkpoint.checkpoints(run):
        if checkpoint.find_damage(path) is None and checkpoint.has_optimizer(path):
            checkpoint.load_state(path)
            return checkpoint.step_of(path)
    return -1


class Campaign:
    """Kills, counted."""

    def __init__(self, folder: Path, method: str, seed: int) -> None:
        self.folder = folder
        self.method = method
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.lives = self.runs = 0
        self.faults: list[str] = []
        begun = time.monotonic()
        status, _ = wait(start(settings_for(folder, "unbroken", method), None, folder / "log"), None)
        if status != 0:
            raise SystemExit(f"the unbroken run failed: {(folder / 'log').read_text()}")
        self.length = time.monotonic() - begun
        self.unbroken = RunFolder(folder / "unbroken")

    def one_run(self, wanted: int) -> None:
        """Kill a run until it is done, or until there have been so many kills; then let it end, and compare."""
        name = f"killed-{self.runs}"
        settings = settings_for(self.folder, name, self.method)
        run = RunFolder(self.folder / name)
        newest = -1
        while not run.finished():
            aim, seconds, phase = None, None, "to the end"
            if self.kills.total() < wanted:
                phase = self.random.choice((*PHASES, *["any moment"] * len(PHASES)))
                if phase == "any moment":
                    seconds = self.random.uniform(0, self.length)
                else:
                    aim = phase, self.random.randint(1, EVENTS[phase])
            status, _ = wait(start(settings, aim, self.folder / "log"), seconds)
            self.lives += 1
            if os.WIFSIGNALED(status):
                self.kills[phase] += 1
            elif status != 0:
                said = (self.folder / "log").read_text()[-2000:]
                self.faults.append(f"{name}: a life ended with {os.WEXITSTATUS(status)}: {said}")
                return
            now = newest_step(run)
            if now < newest:
                self.faults.append(f"{name}: step {newest} was saved, after a kill in {phase} step {now} is the newest")
            newest = now
        self.runs += 1
        self.compare(run)

    def compare(self, run: RunFolder) -> None:
        if course(run) != course(self.unbroken):
            self.faults.append(f"{run.root.name}: another course")
        mine, theirs = weights(run), weights(self.unbroken)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in theirs):
            self.faults.append(f"{run.root.name}: other weights")


def run_campaign(kills: int, seed: int, method: str, folder: Path, seconds: float | None = None) -> dict[str, Any]:
    """So many kills of runs in a folder, or as many as fit into the time; what happened."""
    make_model_folder(folder / "model")
    write_rows(folder / "data.jsonl", make_conversations())
    os.environ["GRAFT_CACHE"] = str(folder / "cache")
    begun = time.monotonic()
    campaign = Campaign(folder, method, seed)
    while campaign.kills.total() < kills and not campaign.faults:
        if seconds is not None and time.monotonic() - begun > seconds:
            break
        campaign.one_run(kills)
        print(f"{method}: {campaign.kills.total()} kills, {campaign.runs} runs", file=sys.stderr, flush=True)
    steps = len(campaign.unbroken.trace.read_text().splitlines())
    return {
        "method": method, "kills": campaign.kills.total(), "kills_by_phase": dict(sorted(campaign.kills.items())),
        "lives": campaign.lives, "runs_finished_and_compared": campaign.runs, "steps_per_run": steps,
        "faults": campaign.faults, "seconds": round(time.monotonic() - begun, 1), "seed": seed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after about so long")
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "kills.json"))
    given = parser.parse_args()
    model_load.transformers.logging.set_verbosity_error()
    shares = {"lora": (given.kills + 1) // 2, "full": given.kills // 2}
    results = []
    for method, kills in shares.items():
        with tempfile.TemporaryDirectory(prefix="graft-kills-") as folder:
            left = None if given.seconds is None else given.seconds / len(shares)
            results.append(run_campaign(kills, given.seed, method, Path(folder), left))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    found = {
        "what": "SIGKILL at random moments, resumed until done, compared bit by bit with an unbroken run",
        "kills": sum(result["kills"] for result in results),
        "faults": sum(len(result["faults"]) for result in results),
        "campaigns": results,
        "commit": commit.stdout.strip(), "python": platform.python_version(), "torch": torch.__version__,
        "machine": platform.machine(),
    }  # fmt: skip
    text = json.dumps(found, indent=1)
    print(text)
    if given.out != "-":
        Path(given.out).write_text(text + "\n")
    sys.exit(1 if found["faults"] else 0)


if __name__ == "__main__":
    main()
