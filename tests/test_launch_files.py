"""The files in launch/: each is run with stand-ins for the programs that it calls, and what it asks of them is parsed.

What reaches torchrun goes through torchrun's own parser, and what reaches graft through graft's own commands and
settings, so an option or setting that does not exist is found here.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from tiny import make_conversations, make_model_folder, write_rows
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import get_args_parser

from graft.cli.main import app
from graft.cli.options import sort_words
from graft.config.train import Train, load_train
from graft.runs import RunFolder

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("one_node.sh", "two_nodes.sh", "slurm.sbatch")
MANIFESTS = ("kubernetes.yaml", "kubeflow.yaml", "skypilot.yaml")

SBATCH_OPTIONS = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "output", "signal",
    "requeue", "open-mode",
}  # fmt: skip
"""Options of sbatch's manual page that we use; there is no sbatch here to ask."""

STAND_INS = {
    # what torchrun was given, for the test to read
    "torchrun": "#!{python}\nimport json, os, sys\njson.dump(sys.argv[1:], open(os.environ['TOLD'], 'w'))\n"
    "json.dump(dict(os.environ), open(os.environ['TOLD'] + '.env', 'w'))\n",
    "srun": '#!/bin/bash\nwhile [[ $1 == --* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac; done\nexec "$@"\n',
    "scontrol": '#!/bin/bash\n[ "$1 $2" = "show hostnames" ] && printf "node-1\\nnode-2\\n"\n',
    "nvidia-smi": '#!/bin/bash\n[ "$1" = --list-gpus ] && printf "GPU %d\\n" 0 1 2 3 4 5 6 7\n',
}
GIVEN = {
    # what each scheduler sets by itself
    "two_nodes.sh": {"FIRST": "node-1"},
    "slurm.sbatch": {
        "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    },
    "kubernetes.yaml": {"JOB_COMPLETION_INDEX": "1", "POD_IP": "10.0.0.2"},
    "kubeflow.yaml": {
        "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "graft-node-0-0.graft",
        "PET_MASTER_PORT": "29500",
    },
    "skypilot.yaml": {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    },
}  # fmt: skip


def cores() -> int:
    return len(os.sched_getaffinity(0))


def manifest(name: str) -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8")))


def pod_of(name: str) -> dict:
    """The pod that a Kubernetes file describes: its containers, volumes and so on."""
    if name == "kubernetes.yaml":
        return manifest(name)[1]["spec"]["template"]["spec"]
    patch = manifest(name)[0]["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    return patch["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def command_of(name: str) -> tuple[list[str], dict[str, str]]:
    """What a file has its scheduler start, and the environment that it sets."""
    if name in SCRIPTS:
        return ["bash", str(LAUNCH / name)], {}
    if name == "skypilot.yaml":
        (task,) = manifest(name)
        return ["bash", "-c", task["run"]], task["envs"]
    container = pod_of(name)["containers"][0] if name == "kubernetes.yaml" else manifest(name)[0]["spec"]["trainer"]
    values = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    return [*container["command"], *container["args"]], values


def filled_in(words: list[str], values: dict[str, str]) -> list[str]:
    """`$(NAME)` as Kubernetes fills it in; what it does not know it leaves."""
    return [re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), word) for word in words]


def run_file(name: str, folder: Path, out: Path, *more: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """What torchrun is given by a launch file, with the environment it then has."""
    programs = folder / "programs"
    if not programs.exists():
        programs.mkdir()
        for program, text in STAND_INS.items():
            (programs / program).write_text(text.replace("{python}", sys.executable))
            (programs / program).chmod(0o755)
        (folder / "graft/bin").mkdir(parents=True)
        (folder / "graft/bin/activate").write_text("")
        (folder / "recipe.yaml").write_text((ROOT / "recipes/lora.yaml").read_text(encoding="utf-8"))
    told = folder / "told.json"
    told.unlink(missing_ok=True)
    words, sets = command_of(name)
    if name in SCRIPTS:
        words += [str(folder / "recipe.yaml"), str(out), *more]
    else:
        sets |= {"RECIPE": str(folder / "recipe.yaml"), "OUT": str(out)}
        words = filled_in(words, sets)
    plain = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(folder), "TOLD": str(told)}
    done = subprocess.run(
        words, env=plain | GIVEN.get(name, {}) | sets | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(told.read_text()), json.loads(told.with_suffix(".json.env").read_text())


def settings_of(words: list[str]) -> Train:
    """What graft makes of the words after `graft`; they are parsed by its own command line first."""
    group = typer.main.get_command(app)
    command = group.get_command(group.make_context("graft", ["--help"], resilient_parsing=True), words[0])
    command.make_context(words[0], list(words[1:]))
    recipe, overrides = sort_words(words[1:])
    return load_train(recipe, overrides)


@pytest.mark.parametrize("name", [*SCRIPTS, *MANIFESTS])
def test_a_launch_file_asks_for_what_exists(name, tmp_path, monkeypatch):
    out = tmp_path / "a run"
    words, environment = run_file(name, tmp_path, out)
    for key in [key for key in os.environ if key.startswith("PET_")]:
        monkeypatch.delenv(key)
    for key, value in environment.items():
        if key.startswith("PET_"):  # torchrun's own way to be told its options
            monkeypatch.setenv(key, value)
    asked = get_args_parser().parse_args(words)
    assert (asked.module, asked.training_script) == (True, "graft")
    assert str(asked.nproc_per_node) == "8"
    assert str(asked.nnodes) == ("1:1" if name == "one_node.sh" else "2")
    assert asked.max_restarts == (0 if name in ("skypilot.yaml", "kubeflow.yaml") else 3)
    if name not in ("one_node.sh", "kubeflow.yaml", "skypilot.yaml"):
        assert asked.rdzv_backend == "c10d"
        assert asked.rdzv_endpoint.split(":")[0] in ("node-1", "graft-0.graft")
    settings = settings_of(asked.training_script_args)
    assert settings.out == str(out)
    assert settings.resume == "auto"
    threads = int(environment["OMP_NUM_THREADS"])
    assert threads == (8 if name in ("slurm.sbatch", "kubernetes.yaml", "kubeflow.yaml") else max(1, cores() // 8))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert LaunchConfig(1, 1, 8).shutdown_timeout >= 540


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_passes_settings_on(name, tmp_path):
    words, _ = run_file(name, tmp_path, tmp_path / "run", "lr=3e-4", "shard_ranks=host")
    settings = settings_of(get_args_parser().parse_args(words).training_script_args)
    assert (settings.lr, settings.shard_ranks) == (3e-4, "host")


def test_what_does_not_exist_would_be_found(tmp_path):
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--rdzv-nowhere", "x", "-m", "graft"])
    with pytest.raises(Exception, match="no_such_setting"):
        settings_of(["train", str(ROOT / "recipes/lora.yaml"), "no_such_setting=1"])
    with pytest.raises(Exception, match="no-such-option"):
        settings_of(["train", str(ROOT / "recipes/lora.yaml"), "--no-such-option", "1"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_its_words_says_how_it_is_used(name):
    for words in ([], ["recipe.yaml"]):
        done = subprocess.run(["bash", str(LAUNCH / name), *words], capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "usage: " in done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    if shutil.which("shellcheck") is None:
        pytest.skip("NOT TESTED: shellcheck is absent (Debian: shellcheck)")
    done = subprocess.run(["shellcheck", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_slurm_is_asked_for_what_it_knows():
    lines = re.findall(r"^#SBATCH (.*)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        found = re.fullmatch(r"--([a-z-]+)(=\S+)?", line)  # a comment behind an option would be part of it
        assert found, line
        assert found[1] in SBATCH_OPTIONS, line


def test_the_pods_of_a_job_find_each_other_and_their_disks():
    service, job = manifest("kubernetes.yaml")
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = pod_of("kubernetes.yaml")
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(values["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(values["GPUS"])
    wanted = set(re.findall(r"\$([A-Z_]+)", container["args"][0]))
    assert wanted == {"NODES", "GPUS", "RECIPE", "OUT", "POD_IP", "JOB_COMPLETION_INDEX"}
    assert wanted - values.keys() == {"JOB_COMPLETION_INDEX"}
    assert f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500" in container["args"][0]


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubeflow.yaml"])
def test_a_pod_has_the_disks_it_mounts_the_time_to_save_and_no_root(name):
    pod = pod_of(name)
    (container,) = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert set(mounted.values()) == {"/runs", "/cache", "/dev/shm"}
    _, values = command_of(name)
    assert values["OUT"].startswith("/runs/")
    assert pod["terminationGracePeriodSeconds"] > int(values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert f"USER {pod['securityContext']['runAsUser']}" in (LAUNCH / "Dockerfile").read_text()


def test_the_image_is_made_of_what_the_checkout_has():
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line and not line.startswith("#")]
    instructions = [line.split(None, 1) for line in lines]
    assert instructions[0] == ["FROM", "nvidia/cuda:13.0.2-base-ubuntu24.04"]
    assert {kind for kind, _ in instructions} <= {"FROM", "RUN", "ENV", "COPY", "USER", "VOLUME", "WORKDIR", "CMD"}
    copied = [source for kind, rest in instructions if kind == "COPY" for source in rest.split()[:-1]]
    assert {"src", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert project["readme"] in copied
    assert set(project["license-files"]) <= set(copied)
    assert [rest for kind, rest in instructions if kind == "USER"] == ["1000:1000"]
    assert json.loads(next(rest for kind, rest in instructions if kind == "VOLUME")) == ["/cache", "/runs"]
    assert json.loads(instructions[-1][1]) == ["graft", "--help"]


@pytest.mark.slow
def test_one_node_runs_and_goes_on(tmp_path):
    """The script with the real torchrun: two processes, and the same line once more."""
    base = make_model_folder(tmp_path / "llama")
    data = write_rows(tmp_path / "data.jsonl", make_conversations())
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    (programs / "torchrun").chmod(0o755)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(base), "data": data, "device": "cpu", "epochs": 1.0}))
    run = RunFolder(tmp_path / "run")
    words = ["bash", LAUNCH / "one_node.sh", recipe, run.root, "encode.max_length=128"]
    plain = os.environ | {"GPUS": "2", "PATH": f"{programs}:{os.environ['PATH']}"}
    for times in (1, 2):
        done = subprocess.run(words, env=plain, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("2 processes, weights spread") == 1
        assert ("resuming after step" in done.stderr) == (times == 2)
        assert (run.final / "adapter_model.safetensors").is_file()
        shutil.rmtree(run.final)
