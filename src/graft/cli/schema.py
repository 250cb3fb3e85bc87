"""`graft schema`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Recipe(StrEnum):
    """The commands that take a recipe."""

    train = "train"
    clean = "clean"
    prompts = "prompts"
    synth = "synth"


def schema(
    recipe: Annotated[Recipe, typer.Argument(help="The command whose recipe it is.")] = Recipe.train,
) -> None:
    """Print the JSON schema of a recipe, for editors and for looking settings up.

    Examples:

    graft schema > recipe.schema.json

    graft schema synth
    """
    import json
    import sys

    from graft.config.base import Settings
    from graft.config.clean import Clean
    from graft.config.prompts import Prompts
    from graft.config.synth import Synth
    from graft.config.train import Train

    known: dict[Recipe, type[Settings]] = {
        Recipe.train: Train,
        Recipe.clean: Clean,
        Recipe.prompts: Prompts,
        Recipe.synth: Synth,
    }
    sys.stdout.write(json.dumps(known[recipe].model_json_schema(), indent=2, ensure_ascii=False) + "\n")
