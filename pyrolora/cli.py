"""The command line: ``pyrolora COMMAND``. Signatures become options."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import CLI

from pyrolora.adapters.sites import AdapterError
from pyrolora.diagnostics.compare import Evaluation, evaluate_posterior
from pyrolora.diagnostics.experiment import check_methods, run, save
from pyrolora.inference.archive import ArchiveError
from pyrolora.inference.fit import fit as fit_program
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.trainer import NonFiniteError
from pyrolora.priors.base import PriorError
from pyrolora.recipe import Recipe, RecipeError
from pyrolora.report.html import write_report
from pyrolora.tasks.data import DataError

ERRORS = (RecipeError, ArchiveError, AdapterError, PriorError, DataError, NonFiniteError, FileNotFoundError)


def sites(recipe: Path) -> None:
    """Shows a recipe's adapter sites: name, shape, number of parameters and prior.

    Site names are what the patterns of priors and of --options.random match.

    Args:
        recipe: A YAML file, models/minilm-commonsense.yaml for instance.
    """
    read = Recipe.read(recipe)
    program = read.build_program(read.build_task())
    print(program.sites)


def fit(
    recipe: Path,
    guide: str = "MeanField",
    output: Path = Path("runs/posterior"),
    seed: int = 0,
    options: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    temperature: float | None = None,
    resume: bool = False,
) -> None:
    """Fits a guide to a recipe's program and saves the posterior.

    Example: pyrolora fit models/minilm-commonsense.yaml --guide MeanField --output runs/mean-field
    With other settings: --options.noise example --training.num_train_epochs 3 --temperature 0.3

    Args:
        recipe: A YAML file.
        guide: How the posterior is approximated: a class of pyrolora.guides, MAP or MeanField for instance.
        output: Folder for the posterior and its checkpoints (one an epoch).
        seed: Of initial weights, data order and noise.
        options: The guide's arguments, over those of the recipe.
        training: transformers.TrainingArguments, over those of the recipe.
        temperature: β of the objective; 1 is the ELBO. Default: the recipe's.
        resume: Continue from the last complete checkpoint in the output folder.
    """
    read = _with(Recipe.read(recipe), guide, options, training, temperature)
    chosen = read.build_guide(guide)
    program = read.build_program(read.build_task(), seed=seed)
    arguments = read.arguments(output / "checkpoints", seed=seed)
    posterior = fit_program(program, chosen, args=arguments, temperature=read.temperature, resume=resume)
    save(posterior, read, output)
    last = next(row for row in reversed(posterior.history) if "elbo" in row)
    print(f"{posterior}\nelbo {last['elbo']:.4f} = data {last['data']:.4f} − kl {last['kl']:.4f} nats per example")
    print(f"saved in {output}; next: pyrolora evaluate {output}")


def evaluate(
    folder: Path, split: str = "test", draws: int = 16, seed: int = 0, format: Literal["table", "json"] = "table"
) -> None:
    """Scores a saved posterior on a split of its task, with and without temperature scaling.

    Args:
        folder: What `pyrolora fit` wrote.
        split: test, validation, or the name of an out-of-distribution split.
        draws: Number of draws; 0 scores the posterior's mean weights.
        seed: Of the draws.
        format: table, or json for programs.
    """
    posterior = _load(folder)
    task = posterior.program.task
    assert task is not None
    splits = {"test": task.test, "validation": task.validation, **task.ood}
    data = splits.get(split)
    if data is None:
        there = ", ".join(name for name, found in splits.items() if found is not None)
        raise RecipeError(f"{folder}: no split {split!r}; there are {there}")
    scaling = task.validation if split != "validation" else None
    result = evaluate_posterior(posterior, data, validation=scaling, num_draws=draws, seed=seed)
    if format == "json":
        print(json.dumps({"split": split, **result.to_dict()}, indent=2))
    else:
        print(_table(result, split))


def compare(
    recipe: Path,
    guides: list[str],
    seeds: int = 3,
    output: Path = Path("runs/compare"),
    draws: int = 16,
) -> None:
    """Fits several guides with several seeds, and writes results.json and report.html.

    Plain LoRA (flat priors) is always among them, as the baseline. Finished fits are not repeated.
    Example: pyrolora compare models/minilm-commonsense.yaml --guides MAP MeanField --seeds 3

    Args:
        recipe: A YAML file.
        guides: Classes of pyrolora.guides.
        seeds: Number of seeds: 0, 1, ...
        output: Folder for results, report and posteriors.
        draws: Number of draws at test.
    """
    check_methods(guides)
    results = run(Recipe.read(recipe), guides, range(seeds), output, num_draws=draws)
    report = write_report(results, output / "report.html")
    print(f"results in {output / 'results.json'}, report in {report}")


def predict(folder: Path, file: Path, draws: int = 16, seed: int = 0, output: Path | None = None) -> None:
    """Predicts new rows with uncertainty; prints a table or writes CSV, JSON Lines or Parquet.

    Args:
        folder: What `pyrolora fit` wrote.
        file: Rows in the form of the recipe's data (.jsonl, .csv, .parquet); labels are not needed.
        draws: Number of draws.
        seed: Of the draws.
        output: A .csv, .jsonl or .parquet file; without it a table is printed.
    """
    posterior = _load(folder)
    task = posterior.program.task
    assert task is not None
    table = posterior.predict(task.tokenise(str(file)), draws, seed=seed).to_pandas()
    if output is None:
        print(table.to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    elif output.suffix == ".csv":
        table.to_csv(output, index=False)
    elif output.suffix == ".jsonl":
        table.to_json(output, orient="records", lines=True, force_ascii=False)
    elif output.suffix == ".parquet":
        table.to_parquet(output)
    else:
        raise RecipeError(f"--output {output}: the ending is .csv, .jsonl or .parquet")


def export(folder: Path, output: Path, draws: int = 0, seed: int = 0) -> None:
    """Writes ordinary PEFT adapters: the posterior's mean, and on request draws.

    Each loads with peft.PeftModel.from_pretrained, or in a server that takes several adapters.

    Args:
        folder: What `pyrolora fit` wrote.
        output: Gets mean/, draw-0/, draw-1/, ...
        draws: Number of draws beside the mean.
        seed: Of the draws.
    """
    posterior = _load(folder)
    print(posterior.export_peft(output / "mean"))
    for i in range(draws):
        print(posterior.export_peft(output / f"draw-{i}", draw=i, seed=seed))


def report(folder: Path) -> None:
    """Writes report.html again from a comparison's results.json.

    Args:
        folder: What `pyrolora compare` wrote.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a folder that pyrolora compare wrote")
    print(write_report(json.loads(path.read_text()), folder / "report.html"))


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``pyrolora`` command."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pyrolora").setLevel(logging.INFO)
    commands = [sites, fit, evaluate, compare, predict, export, report]
    try:
        CLI(commands, args=arguments, as_positional=True, description=__doc__)
    except ERRORS as error:
        sys.exit(f"pyrolora: {error}")


def _with(
    recipe: Recipe,
    guide: str,
    options: dict[str, Any] | None,
    training: dict[str, Any] | None,
    temperature: float | None,
) -> Recipe:
    guides = {**recipe.guides, guide: {**recipe.guides.get(guide, {}), **(options or {})}}
    chosen = recipe.temperature if temperature is None else temperature
    merged = {**recipe.training, **(training or {})}
    return dataclasses.replace(recipe, guides=guides, training=merged, temperature=chosen)


def _load(folder: Path) -> Posterior:
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder}: no recipe.yaml there; give a folder that pyrolora fit wrote")
    recipe = Recipe.read(folder / "recipe.yaml")
    task = recipe.build_task()
    model = task.load_base_model(recipe.base_path(), dtype=recipe.dtype)
    return Posterior.from_pretrained(folder, model, task=task)


def _table(result: Evaluation, split: str) -> str:
    lines = [f"{split}: {result.num_examples} examples, {result.num_draws} draw(s)"]
    for name, estimate in result.metrics.items():
        scaled = result.scaled_metrics[name].value if result.scaled_metrics else None
        after = "" if scaled is None else f"   τ = {result.scaling:.2f}: {scaled:.4f}"
        lines.append(f"  {name:13s} {estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]{after}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
