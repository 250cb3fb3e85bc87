"""`graft train`."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.options import ModelToTrain, RecipeAndSettings, TrainingData, sort_words
from graft.errors import ConfigError, InputError

if TYPE_CHECKING:
    from graft.runs import RunFolder


def train(
    words: RecipeAndSettings = None,
    model: ModelToTrain = None,
    data: TrainingData = None,
    val: Annotated[list[str] | None, typer.Option(help="Validation data; else 5 % of the data are held out.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Test data, kept for graft eval.")] = None,
    out: Annotated[str | None, typer.Option(help="Run folder; else runs/MODEL-DATA.")] = None,
    method: Annotated[str | None, typer.Option(help="lora (default), full, freeze or peft.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data (default 3).")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default 2e-4 for lora, 2e-5 for full).")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations per optimizer step (default 16).")] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", "--processes", min=1, help="Processes of this host that share the run, one per GPU."),
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Begin a new run with the weights of this run, adapter or model folder.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|RUN|CHECKPOINT",
            help="Continue a run exactly where it was: in this folder, from this checkpoint of it, or with auto the "
            "newest that is not finished.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model on conversations.

    Examples:

    graft train --model Qwen/Qwen2.5-0.5B-Instruct --data train.jsonl

    graft train recipe.yaml lora.r=8 lr=1e-4

    graft train recipe.yaml --gpus 8

    graft train --resume runs/my-run

    graft train recipe.yaml --resume auto
    """
    from graft.config.train import load_train
    from graft.console import note

    recipe, overrides = sort_words(words or [])
    flags: dict[str, object] = {
        "model": model, "data": data, "val": val, "test": test, "out": out, "method": method, "epochs": epochs,
        "lr": lr, "batch_size": batch_size, "init_from": init_from,
    }  # fmt: skip
    recipe, begun = _what_to_resume(resume, init_from, recipe, out, model is not None or bool(data))
    flags |= begun
    settings = load_train(recipe, overrides, {key: None if value == [] else value for key, value in flags.items()})

    from graft.tokens.there import refuse_missing

    if "WORLD_SIZE" not in os.environ:  # of several processes those that read it look, and tell the others
        refuse_missing(settings)
    if gpus is not None and gpus > 1:
        from graft.train.processes.launch import launch

        raise typer.Exit(launch(gpus, settings))

    from graft.train.loop import train as run_training

    run = run_training(settings)
    note(f"done: {run.final}")
    note(f"next: {_next_steps(run)}")


def _what_to_resume(
    resume: str | None, init_from: str | None, recipe: Path | None, out: str | None, described: bool
) -> tuple[Path | None, dict[str, object]]:
    """The recipe, and the flags that `--resume` stands for. `described`: the run is by its model and data.

    Raises:
        ConfigError: what is given does not go with --resume.
        InputError: there is no such run.
    """
    if resume is None:
        return recipe, {}
    if init_from is not None:
        raise ConfigError(
            "--resume continues a run exactly, --init-from begins one with weights alone; give one of them"
        )
    if resume == "auto" and (recipe is not None or described):
        return recipe, {"resume": "auto"}
    if recipe is not None:
        raise ConfigError("--resume takes its settings from the run folder; leave the recipe out, or use auto")
    root, there = _run_to_resume(resume, out)
    return root / "config.yaml", {"resume": there, "out": str(root)}


def _run_to_resume(named: str, out: str | None) -> tuple[Path, bool | str]:
    """The folder of a run, and where in it to go on: from its newest checkpoint, or from the one that was named.

    Raises:
        InputError: there is no such run.
    """
    from graft.runs import RunFolder, newest_run

    if named == "auto":
        place = Path("runs") if out is None else Path(out)
        found = newest_run(place) if out is None else RunFolder(place)
        if found is None or not found.exists():
            raise InputError(f"{place}: no run there to resume; start one with a recipe, or with --model and --data")
        return found.root, True
    folder = Path(named)
    root = folder.parent.parent
    if not RunFolder(folder).exists() and folder.name.startswith("step-") and RunFolder(root).exists():
        if not folder.is_dir():
            raise InputError(f"{named}: there is no such checkpoint; {root / 'checkpoints'} has those that are left")
        return root, str(folder)
    if not RunFolder(folder).exists():
        raise InputError(f"{named}: no run there to resume (it has no config.yaml); name the folder of a run")
    return folder, True


def _next_steps(run: RunFolder) -> str:
    """Commands that work for this run as they stand."""
    steps = [f"graft {command} {shlex.quote(str(run.root))}" for command in ("chat", "eval", "plot")]
    if run.held_out is None:  # eval would have nothing to ask
        steps[1] += " --data FILE"
    return "   ".join(steps)
