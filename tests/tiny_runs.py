"""Settings of tiny runs, and what two runs that must be the same are compared by."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import make_conversations, write_rows

from graft.config.train import Train, load_train
from graft.model.device import pick_device
from graft.model.processes.ranks import ALONE
from graft.runs import RunFolder
from graft.train.processes.together import Here
from graft.train.processes.watchdog import Watchdog


def settings_for(base: Path, tmp_path: Path, *overrides: str, out: str = "run") -> Train:
    data = tmp_path / "data.jsonl"
    if not data.exists():
        write_rows(data, make_conversations())
    common = [
        f"model={base}", f"data={data}", f"out={tmp_path / out}", "batch_size=8", "epochs=2", "lr=5e-3",
        "split.val=0.2", "encode.max_length=128", "lora.dropout=0.1", "eval_every=3",
    ]  # fmt: skip
    return load_train(None, [*common, *overrides])


def losses(run: RunFolder) -> list[tuple[int, float, float, float]]:
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in run.read_metrics() if r["kind"] == "train"]


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    (file,) = run.final.glob("*model.safetensors")
    return load_file(file)


def assert_same_run(one: RunFolder, other: RunFolder) -> None:
    assert losses(one) == losses(other)
    assert len(losses(one)) > 3
    weights, others = final_weights(one), final_weights(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def alone(settings: Train, run: RunFolder) -> Here:
    """Where a lone process is."""
    return Here(ALONE, pick_device(settings.device), Watchdog(ALONE, run.checkpoints))
