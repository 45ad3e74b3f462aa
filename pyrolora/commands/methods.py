"""Commands about methods: the table of guides, ensembles of fits, calibration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from pyrolora.construct import RecipeError, classes
from pyrolora.diagnostics.temperature import calibrate as calibrated
from pyrolora.guides.base import Card, Guide
from pyrolora.guides.map import MAP
from pyrolora.inference.join import join as joined
from pyrolora.program import PyroLoRA
from pyrolora.recipe import Recipe
from pyrolora.saved import load, posterior_of, recipe_of, save


def methods(recipe: Path) -> None:
    """Lists all guides for a recipe: what is random, what it costs, where it is from.

    Parameters are those that are trained beside MAP's; numbers kept are what a
    posterior stores beside them. Costs are passes through the base model.

    Example:
      pyrolora methods models/minilm-commonsense.yaml

    Args:
        recipe: A YAML file.
    """
    read = Recipe.read(recipe)
    program = read.build_program(read.build_task())
    reference = _numbers(program, MAP())[0]
    rows: list[tuple[str, ...]] = [
        ("guide", "random", "parameters", "kept", "training", "prediction", "reference"),
    ]
    notes = []
    for name, guide in classes("guides").items():
        card: Card = guide.card  # type: ignore[attr-defined]
        try:
            trained, kept = _numbers(program, read.build_guide(name))
            numbers = (f"+{trained - reference:,}", f"{kept:,}")
        except ValueError as error:
            numbers = ("-", "-")
            notes.append(f"{name} does not fit this recipe: {error}")
        rows.append((name, card.random, *numbers, card.training, card.prediction, _reference(guide)))
    print(f"MAP has {reference:,} parameters. S draws, K classes, M members.\n")
    print("\n".join(_aligned(rows)))
    print("".join(f"\n{note}" for note in notes))


def join(folders: list[Path], *, output: Path = Path("runs/ensemble")) -> None:
    """Puts saved posteriors together as one ensemble, the mean of their predictions.

    Fit the members with a seed each, in as many processes or on as many
    machines as you like.

    Example:
      pyrolora join runs/0 runs/1 --output runs/ensemble

    Args:
        folders: What `pyrolora fit` wrote, one for each member.
        output: Folder for the ensemble.
    """
    recipe = recipe_of(folders[0])
    task = recipe.build_task()
    print(joined([posterior_of(folder, recipe, task) for folder in folders]).save_pretrained(output))
    recipe.write(output / "recipe.yaml")


def calibrate(folder: Path, *, draws: int = 16, seed: int = 0) -> None:
    """Fits the temperature of a saved posterior's predictive on the validation split.

    It is stored with the posterior: predict and evaluate use it from then on.

    Example:
      pyrolora calibrate runs/mf

    Args:
        folder: What `pyrolora fit` wrote.
        draws: Number of draws; 0 for the posterior's mean weights.
        seed: Of the draws.
    """
    posterior, task = load(folder)
    if not isinstance(task.validation, Dataset):
        raise RecipeError(f"{folder}: calibration needs a validation split; the recipe's task has none")
    found = calibrated(posterior, task.validation, num_draws=draws, seed=seed)
    save(found, recipe_of(folder), folder)
    print(f"τ = {found.scaling:.4g}, stored in {folder}")


def _numbers(program: PyroLoRA, guide: Guide) -> tuple[int, int]:
    """Trained parameters, and numbers in buffers."""
    guide.bind(program)
    return sum(p.numel() for p in guide.parameters()), sum(b.numel() for b in guide.buffers())


def _reference(guide: type) -> str:
    """The first source that the documentation of a class names, or ``-``."""
    text = " ".join((inspect.getdoc(guide) or "").partition("Source: ")[2].split())
    found = re.match(r".*?(19|20)\d\d( \([^)]*\))?", text)
    return found[0] if found else "-"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
