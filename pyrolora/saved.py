"""Folders of fits: a posterior with its recipe beside it, and the checkpoints of the fit that makes it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyrolora.construct import RecipeError
from pyrolora.inference import processes
from pyrolora.inference.archive import read_meta, write_json
from pyrolora.inference.checkpoints import last_checkpoint
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from pyrolora.tasks.base import Task

logger = logging.getLogger("pyrolora")


def save(posterior: Posterior, recipe: Recipe, folder: Path) -> Path:
    """Saves a posterior with its recipe beside it, from which task and base are rebuilt."""
    posterior.save_pretrained(folder)
    if processes.rank() == 0:
        recipe.write(folder / "recipe.yaml")
    return folder


def load(folder: Path) -> tuple[Posterior, Task]:
    """The inverse of `save`: the posterior on its base model, and its task.

    Raises:
        RecipeError: No recipe in the folder, or one that cannot be built.
        ArchiveError: No posterior, a damaged one, or one of another base model.
    """
    recipe = recipe_of(folder)
    task = recipe.build_task()
    return posterior_of(folder, recipe, task), task


def recipe_of(folder: Path) -> Recipe:
    """The recipe beside a saved posterior.

    Raises:
        RecipeError: There is none.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder}: no recipe.yaml there; give a folder that pyrolora fit wrote")
    return Recipe.read(folder / "recipe.yaml")


def posterior_of(folder: Path, recipe: Recipe, task: Task) -> Posterior:
    """A saved posterior on its base model, over a task that is built already, on this process's device."""
    base: Any = recipe.load_base(task, seed=read_meta(folder)["seed"])
    if not getattr(base, "is_quantized", False):  # those are where their loader has put them
        base.to(processes.device())
    return Posterior.from_pretrained(folder, base, task=task)


def prepare(folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Makes a folder's checkpoints those of this fit: to resume, they must be; otherwise older ones go.

    Of several processes the first does so while the others wait.

    Args:
        folder: Of the checkpoints.
        identity: What a fit depends on: recipe, guide, seed.
        resume: Whether to go on from the last checkpoint.

    Raises:
        RecipeError: Checkpoints of another fit.
    """
    path = folder / "fit.json"
    plain = json.loads(json.dumps(identity, default=str))
    # The members of an ensemble have folders of their own.
    if resume and any(map(last_checkpoint, [folder, *folder.rglob("member-*")])):
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != plain:
            raise RecipeError(f"{folder} is of another recipe, guide or seed; without --resume the fit begins anew")
        return
    if resume:
        logger.info("%s holds no complete checkpoint; the fit begins anew", folder)
    if processes.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(path, plain)
    processes.wait()
