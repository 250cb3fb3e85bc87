"""Every shipped recipe parses, and its keys are settings."""

from pathlib import Path

import pytest

from graft.config.train import load_train

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses(recipe):
    assert load_train(recipe).model


@pytest.mark.parametrize("name", ["pretrain.yaml", "recipe.yaml"])
def test_the_demos_recipes_parse(name):
    assert load_train(ROOT / "src" / "graft" / "demo" / name, ["model=m", "data=d", "out=o"]).epochs
