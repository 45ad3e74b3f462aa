"""Commands that compare posteriors, and show what came of it."""

from __future__ import annotations

import json
from pathlib import Path

from pyrolora.construct import RecipeError
from pyrolora.diagnostics.experiment import run
from pyrolora.diagnostics.results import table
from pyrolora.inference.processes import rank
from pyrolora.recipe import Recipe
from pyrolora.report.html import write_picture, write_report


def compare(
    recipes: list[Path],
    *,
    guides: list[str],
    posteriors: list[Path],
    seeds: int = 3,
    baseline: str | None = None,
    output: Path = Path("runs/compare"),
    draws: int = 16,
    processes: int = 1,
) -> None:
    """Fits several guides with several seeds and reports what really differs.

    Writes results.json, results.parquet and report.html. Plain LoRA (no
    priors, the mode) is always among the methods of a recipe. Finished fits
    are not repeated: call again after an interruption, or with more of
    anything. Methods are compared on the same data: recipes and saved
    posteriors must have the same test split.

    Examples:
      pyrolora compare models/minilm-commonsense.yaml --guides MAP MeanField
      pyrolora compare a.yaml b.yaml --guides MAP --seeds 5 --processes 2
      pyrolora compare one.yaml another.yaml
      pyrolora compare --posteriors runs/map runs/mf --output runs/two

    Args:
        recipes: YAML files; none to compare saved posteriors only.
        guides: Guides to fit under each recipe: of the list below, or configurations that it names. Without it,
            and without posteriors, each recipe's own: those under its key `guides`.
        posteriors: Folders that `pyrolora fit` wrote, to be evaluated with the rest.
        seeds: Number of seeds: 0, 1, ...
        baseline: Name of the method that the others are compared with; without it, the first.
        output: Folder for results, report and posteriors.
        draws: Number of draws at test.
        processes: How many fits run at once, each on its share of the cores; 1 under torchrun.
    """
    if seeds < 1:
        raise RecipeError(f"--seeds is at least 1, not {seeds}")
    results = run(
        [Recipe.read(recipe) for recipe in recipes],
        guides,
        seeds=range(seeds),
        output=output,
        posteriors=posteriors,
        num_draws=draws,
        baseline=baseline,
        processes=processes,
    )
    if rank() > 0:
        return
    if results["cells"]:
        page = write_report(results, output / "report.html")
        write_picture(results, output / "reliability.png")
        print(table(results))
        print(f"results in {output / 'results.json'}, report in {page}")
    if failed := results["failed"]:
        lines = "".join(f"\n  {name}: {message}" for name, message in failed.items())
        raise RecipeError(f"{len(failed)} failed; called again, only these are tried anew:{lines}")


def report(folders: list[Path]) -> None:
    """Writes report.html again from a comparison's results.json.

    Works on an interrupted comparison too.

    Example:
      pyrolora report runs/compare

    Args:
        folders: What `pyrolora compare` wrote; each gets its report.
    """
    for folder in folders:
        path = folder / "results.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: give a folder that pyrolora compare wrote")
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecipeError(f"{path} is damaged: {error}") from error
        print(write_report(results, folder / "report.html"))
        print(write_picture(results, folder / "reliability.png"))
