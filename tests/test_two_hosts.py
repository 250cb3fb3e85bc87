"""Two hosts: network namespaces with addresses and names of their own, a wire between them, torchrun in each.

A run over both is the run of one process; where the wire is cut in the middle both ends say so and end in time, and the
run that goes on afterwards is the unbroken one.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_conversations, make_model_folder, write_rows
from together import together

from graft.config.train import Train, load_train
from graft.runs import RunFolder
from graft.train.loop import train

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "launch/two_nodes.sh"
IN_TIME = 120
"""Seconds within which a run must have ended everywhere after one host is cut off."""
AS_HOST = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
"""A name of its own, and the names and addresses of both, for whoever starts in a namespace."""


@dataclass
class Host:
    """A network namespace, and what was started in it."""

    namespace: str
    name: str
    address: str
    names: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    def ip(self, *words: str) -> None:
        made = subprocess.run(["ip", "-n", self.namespace, *words], capture_output=True, text=True, check=False)
        assert made.returncode == 0, (words, made.stderr)

    def start(self, words: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
        """A program on this host, all of whose processes end with the test."""
        with log.open("w") as said:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount",
                 "sh", "-c", AS_HOST, self.name, str(self.names), *words],
                stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1"} | environment,
            )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """End what still runs in the namespace, the launchers' children too, which have sessions of their own."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=False
        ).stdout
        for number in found.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)
        for process in self.started:
            process.wait(20)
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts that reach each other and nothing else."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            pytest.skip(f"NOT TESTED: two hosts need `{tool}` (Debian: iproute2, util-linux)")
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n10.213.77.1 first-host\n10.213.77.2 second-host\n")
    pair = [
        Host(f"graft-{os.getpid()}-{number}", f"{name}-host", f"10.213.77.{number}", names)
        for number, name in ((1, "first"), (2, "second"))
    ]
    first, second = pair
    try:
        for host in pair:
            made = subprocess.run(["ip", "netns", "add", host.namespace], capture_output=True, text=True, check=False)
            if made.returncode:
                pytest.skip(f"NOT TESTED: no network namespaces here ({made.stderr.strip()})")
        first.ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", second.namespace)
        for host in pair:
            host.ip("address", "add", f"{host.address}/30", "dev", "wire")
            host.ip("link", "set", "lo", "up")
            host.ip("link", "set", "wire", "up")
        yield pair
    finally:
        for host in pair:
            host.end()


def recipe_for(base: Path, folder: Path) -> Path:
    data = write_rows(folder / "data.jsonl", make_conversations())
    recipe = {
        "model": str(base), "data": data, "batch_size": 8, "lr": 5e-3, "device": "cpu", "split": {"val": 0.2},
        "encode": {"max_length": 128}, "row_tokens": 128,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def alone(recipe: Path, *settings: str) -> RunFolder:
    return train(load_train(recipe, [f"out={recipe.parent / 'alone'}", *settings]))


def unbroken_by_two(recipe: Path, *settings: str) -> RunFolder:
    """The run by two processes on this host."""
    out = recipe.parent / "unbroken"
    assert together(2, run_as, load_train(recipe, [f"out={out}", *settings])) == [str(out)] * 2
    return RunFolder(out)


def run_as(rank: int, settings: Train) -> str:
    return str(train(settings).root)


def start_on(hosts: list[Host], recipe: Path, out: Path, *settings: str) -> tuple[list[subprocess.Popen], Path]:
    """The run by launch/two_nodes.sh with one process on each host, and where they write what they say."""
    logs = Path(tempfile.mkdtemp(dir=recipe.parent))
    torchrun = logs.with_suffix(".programs") / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    environment = {
        "PATH": f"{torchrun.parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "wire", "NODES": str(len(hosts)),
        "FIRST": hosts[0].address, "GPUS": "1", "RESTARTS": "0", "RUN_ID": logs.name,
    }  # fmt: skip
    words = ["bash", str(SCRIPT), str(recipe), str(out), *settings]
    return [host.start(words, environment, logs / host.name) for host in hosts], logs


def ended(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit codes.

    Raises:
        subprocess.TimeoutExpired: one has not ended in time.
    """
    until = time.monotonic() + seconds
    return [process.wait(max(0.1, until - time.monotonic())) for process in processes]


def said(logs: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(logs.iterdir())}


def steps_of(run: RunFolder) -> int:
    if not run.metrics.exists():
        return 0
    return max(
        (json.loads(line)["step"] for line in run.metrics.read_text().splitlines() if line[-1:] == "}"), default=0
    )


def assert_same_course(one: RunFolder, other: RunFolder) -> None:
    """Loss and gradient norm of every step, and every validation, within 1e-6; the same adapter."""
    wanted, found = one.read_metrics(), other.read_metrics()
    assert {row["kind"] for row in wanted} == {"train", "val"}
    for rows in (wanted, found):
        rows.sort(key=lambda row: (row["step"], row["kind"]))
    assert [(row["step"], row["kind"]) for row in found] == [(row["step"], row["kind"]) for row in wanted]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in found if name in row], [row[name] for row in wanted if name in row], rtol=1e-6
        )
    ours, theirs = (load_file(run.final / "adapter_model.safetensors") for run in (other, one))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models") / "llama")


def test_a_run_over_two_hosts_is_that_of_one_process(hosts, base, tmp_path):
    recipe, settings = recipe_for(base, tmp_path), ("epochs=1.5", "eval_every=3")
    processes, logs = start_on(hosts, recipe, tmp_path / "two", *settings)
    assert ended(processes, 240) == [0, 0], said(logs)
    spoken = said(logs)
    assert spoken["first-host"].count("2 processes, weights spread") == 1
    assert "processes" not in spoken["second-host"]
    assert_same_course(alone(recipe, *settings), RunFolder(tmp_path / "two"))


@pytest.mark.parametrize("cut", ["first", "second"])
def test_a_host_that_is_cut_off_ends_the_run_on_both_and_it_goes_on_later(hosts, base, tmp_path, cut):
    recipe, settings = recipe_for(base, tmp_path), ("max_steps=150", "epochs=1000", "eval_every=50", "save_every=10")
    run = RunFolder(tmp_path / "two")
    processes, logs = start_on(hosts, recipe, run.root, *settings)
    until = time.monotonic() + 240
    while steps_of(run) < 25:
        assert time.monotonic() < until, said(logs)
        assert [process.poll() for process in processes] == [None, None], said(logs)
        time.sleep(0.02)
    lost = hosts[("first", "second").index(cut)]
    lost.ip("link", "set", "wire", "down")
    began = time.monotonic()
    try:
        codes = ended(processes, IN_TIME)
    except subprocess.TimeoutExpired:
        pytest.fail(f"still running {IN_TIME} s after {lost.name} was cut off: {said(logs)}")
    print(f"ended after {time.monotonic() - began:.0f} s with {codes}: {said(logs)}")
    assert 0 not in codes, said(logs)
    assert 25 <= steps_of(run) < 150, "the run was over before it was cut off"
    for name, text in said(logs).items():
        assert "--resume" in text, (name, text)
    lost.ip("link", "set", "wire", "up")
    processes, again = start_on(hosts, recipe, run.root, *settings)
    assert ended(processes, 240) == [0, 0], said(again)
    assert "resuming after step" in said(again)["first-host"]
    # Of two processes too: in 150 large steps the rounding of one and of two grows apart to 1e-4.
    assert_same_course(unbroken_by_two(recipe, *settings), run)
