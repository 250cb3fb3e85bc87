"""Options that several commands share, and what they become. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.config.engine import EngineName
from graft.errors import ConfigError

RecipeAndSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE ...]", help="A recipe and settings that override it."),
]
ModelToTrain = Annotated[str | None, typer.Option(help="Model folder or Hugging Face id.")]
TrainingData = Annotated[list[str] | None, typer.Option(help="Training data; may be given several times.")]
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="Run, model or adapter folder, or Hugging Face id.")]
BasePath = Annotated[str | None, typer.Option(help="Base model of an adapter, where it is not where the adapter says.")]
EngineOption = Annotated[
    EngineName, typer.Option(help="What computes the answers; auto is transformers, vllm is an extra.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")]
Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer in tokens.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0)]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that come to this share.", min=0, max=1)]
TopK = Annotated[int, typer.Option(help="Sample from so many tokens; 0 is all.", min=0)]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens that were used already less likely.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.", min=0)]
Thinking = Annotated[
    bool | None,
    typer.Option("--thinking/--no-thinking", help="The template's own reasoning switch, where it has one."),
]


def sort_words(words: list[str]) -> tuple[Path | None, list[str]]:
    """Tell the recipe from the overrides.

    Raises:
        ConfigError: there are several recipes.
    """
    overrides = [word for word in words if "=" in word]
    recipes = [word for word in words if "=" not in word]
    if len(recipes) > 1:
        raise ConfigError(f"one recipe at a time; found {', '.join(recipes)} (an override is written key=value)")
    return (Path(recipes[0]) if recipes else None), overrides
