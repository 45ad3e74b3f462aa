"""One small comparison that tests of its parts share. Read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyrolora.diagnostics.experiment import run
from pyrolora.recipe import Recipe
from tests.recipes import write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small recipe, two layers and three steps."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole comparison, LoRA, MAP and mean field with two seeds and four draws: its folder and its results."""
    output = tmp_path_factory.mktemp("compare")
    return output, run([Recipe.read(recipe)], ["MAP", "MeanField"], seeds=[0, 1], output=output, num_draws=4)
