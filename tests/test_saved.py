from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyrolora.construct import RecipeError
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from pyrolora.saved import load, prepare, recipe_of, save
from tests.recipes import write_recipe


def test_load_is_the_inverse_of_save(tmp_path: Path) -> None:
    """Law: posterior, task and recipe come back from the folder; a folder without a recipe is named."""
    recipe = Recipe.read(write_recipe(tmp_path))
    task = recipe.build_task()
    program, guide = recipe.build_program(task, seed=1), MeanField()
    guide.bind(program)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1)
    before = Posterior(program, guide, seed=1)
    folder = save(before, recipe, tmp_path / "saved")
    posterior, found = load(folder)
    assert posterior.seed == 1 and posterior.program.task is found and len(found.train) == len(task.train)
    assert found.test is not None and task.test is not None
    torch.testing.assert_close(posterior.predict(found.test, 2).mean, before.predict(task.test, 2).mean)
    assert recipe_of(folder).priors == recipe.priors
    with pytest.raises(RecipeError, match=r"no recipe\.yaml there"):
        load(tmp_path / "none")


def test_prepare_keeps_checkpoints_of_the_same_fit_only(tmp_path: Path) -> None:
    """Law: older checkpoints go unless the same fit is resumed; another's are not resumed."""
    folder = tmp_path / "checkpoints"
    prepare(folder, {"seed": 0}, False)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    prepare(folder, {"seed": 0}, True)
    assert (folder / "checkpoint-1").exists()
    with pytest.raises(RecipeError, match="another recipe, guide or seed"):
        prepare(folder, {"seed": 1}, True)
    prepare(folder, {"seed": 1}, False)
    assert not (folder / "checkpoint-1").exists() and json.loads((folder / "fit.json").read_text()) == {"seed": 1}
