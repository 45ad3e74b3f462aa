"""The command line: ``pyrolora COMMAND``. The signatures of the functions here are its options."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from datasets import Dataset
from jsonargparse import ArgumentParser

from pyrolora.diagnostics.diagnose import diagnose as diagnose_posterior
from pyrolora.diagnostics.evaluation import evaluate_posterior, fit_scaling
from pyrolora.diagnostics.experiment import run
from pyrolora.diagnostics.results import table
from pyrolora.inference.archive import write_json
from pyrolora.inference.fit import fit as fit_program
from pyrolora.inference.trainer import NonFiniteError
from pyrolora.options import build_parser as parser_of
from pyrolora.recipe import Recipe, RecipeError, classes
from pyrolora.report.diagnosis import write_pictures
from pyrolora.report.html import write_picture, write_report
from pyrolora.saved import load, prepare, save

logger = logging.getLogger("pyrolora")
_logged: set[tuple[str, int]] = set()

DESCRIPTION = """\
Bayesian low-rank adapters. A recipe (YAML) states the model: base, adapters,
priors, task. A guide approximates its posterior.

A first session:
  pyrolora sites models/minilm-commonsense.yaml
  pyrolora fit models/minilm-commonsense.yaml --guide MeanField --output runs/mf
  pyrolora evaluate runs/mf
  pyrolora diagnose runs/mf
  pyrolora predict runs/mf questions.jsonl --output predictions.csv
  pyrolora compare models/minilm-commonsense.yaml --guides MAP MeanField

More about each command, with examples: pyrolora COMMAND --help
"""
TABLES: dict[str, Callable[[Any, Path], Any]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda table, path: table.to_parquet(path),
}


def sites(recipe: Path) -> None:
    """Shows a recipe's adapter sites: name, shape, number of parameters, prior.

    Their names are what the patterns of priors and of a guide's `random` match.

    Example:
      pyrolora sites models/minilm-commonsense.yaml

    Args:
        recipe: A YAML file.
    """
    read = Recipe.read(recipe)
    print(read.build_program(read.build_task()).sites)


def fit(
    recipe: Path,
    *,
    guide: str = "MeanField",
    output: Path = Path("runs/posterior"),
    seed: int = 0,
    options: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    temperature: float | None = None,
    resume: bool = False,
) -> None:
    """Fits a guide to a recipe's program and saves the posterior.

    Examples:
      pyrolora fit models/minilm-commonsense.yaml --guide MAP --output runs/map
      pyrolora fit models/minilm-commonsense.yaml --options.noise example
      pyrolora fit models/minilm-commonsense.yaml --training.num_train_epochs 3
      pyrolora fit models/minilm-commonsense.yaml --resume

    Args:
        recipe: A YAML file.
        guide: How the posterior is approximated; see the list below.
        output: Folder for the posterior and its checkpoints (one an epoch).
        seed: Of initial weights, data order and noise.
        options: Arguments of the guide, over the recipe's: --options.NAME VALUE.
        training: transformers.TrainingArguments, over the recipe's: --training.NAME VALUE.
        temperature: β of the objective, over the recipe's; 1 is the ELBO.
        resume: Continue from the last complete checkpoint in the output folder.
    """
    read = Recipe.read(recipe).adjusted(guide, options or {}, training or {}, temperature)
    chosen = read.build_guide(guide)
    arguments = read.arguments(output / "checkpoints", seed=seed)
    program = read.build_program(read.build_task(), seed=seed)
    prepare(output / "checkpoints", {"guide": guide, "seed": seed, **read.content(), "training": None}, resume)
    posterior = fit_program(program, chosen, args=arguments, temperature=read.temperature_of(guide), resume=resume)
    save(posterior, read, output)
    print(posterior)
    if last := [row for row in posterior.history if "elbo" in row][-1:]:
        print("elbo {elbo:.4f} = data {data:.4f} − kl {kl:.4f} + log prior {log_prior:.4f} nats".format(**last[0]))
    for name, row in posterior.describe().items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(f"saved in {output}; next: pyrolora evaluate {output}")


def evaluate(
    folder: Path, *, split: str = "test", draws: int = 16, seed: int = 0, format: Literal["table", "json"] = "table"
) -> None:
    """Scores a saved posterior on a split, with and without temperature scaling.

    The temperature is fitted on the validation split, never on the one scored.
    The test split is also told from every out-of-distribution split.

    Examples:
      pyrolora evaluate runs/mf
      pyrolora evaluate runs/mf --split validation --draws 64 --format json

    Args:
        folder: What `pyrolora fit` wrote.
        split: test, validation, train, or the name of an out-of-distribution split.
        draws: Number of draws; 0 scores the posterior's mean weights.
        seed: Of the draws.
        format: table, or json for programs.
    """
    posterior, task = load(folder)
    splits = {"test": task.test, "validation": task.validation, "train": task.train, **task.ood}
    data = splits.get(split)
    if data is None:
        there = ", ".join(name for name, found in splits.items() if found is not None)
        raise RecipeError(f"{folder}: no split {split!r}; there are {there}")
    scaling = None
    if split != "validation" and isinstance(task.validation, Dataset):
        scaling = fit_scaling(posterior, task.validation, num_draws=draws, seed=seed)
    ood = task.ood if split == "test" else {}
    result = evaluate_posterior(posterior, data, scaling=scaling, ood=ood, num_draws=draws, seed=seed)
    if format == "json":
        plain = json.dumps({"split": split, **result.to_dict()})
        print(json.dumps(json.loads(plain, parse_constant=lambda _: None), indent=2))  # JSON has no NaN
    else:
        print(f"{split}: {result}")


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
      pyrolora compare --posteriors runs/map runs/mf --output runs/two

    Args:
        recipes: YAML files; none to compare saved posteriors only.
        guides: Guides to fit under each recipe; see the list below.
        posteriors: Folders that `pyrolora fit` wrote, to be evaluated with the rest.
        seeds: Number of seeds: 0, 1, ...
        baseline: Name of the method that the others are compared with; without it, the first.
        output: Folder for results, report and posteriors.
        draws: Number of draws at test.
        processes: How many fits run at once, each on its share of the cores.
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
    page = write_report(results, output / "report.html")
    write_picture(results, output / "reliability.png")
    print(table(results))
    print(f"results in {output / 'results.json'}, report in {page}")


def predict(folder: Path, file: Path, *, draws: int = 16, seed: int = 0, output: Path | None = None) -> None:
    """Predicts new rows with uncertainty: a table on screen, or a file.

    Examples:
      pyrolora predict runs/mf questions.jsonl
      pyrolora predict runs/mf questions.csv --output predictions.parquet

    Args:
        folder: What `pyrolora fit` wrote.
        file: Rows with the columns of the recipe's data (.jsonl, .csv, .parquet, ...); labels are not needed.
        draws: Number of draws; 0 uses the posterior's mean weights.
        seed: Of the draws.
        output: A .csv, .jsonl or .parquet file; without it a table is printed.
    """
    if output is not None and output.suffix not in TABLES:
        raise RecipeError(f"--output {output}: the ending is one of {', '.join(TABLES)}")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    posterior, task = load(folder)
    table = posterior.predict(task.tokenise(str(file)), draws, seed=seed).to_pandas()
    if output is None:
        print(table.dropna(axis=1, how="all").to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        TABLES[output.suffix](table, output)
        print(f"{len(table)} predictions in {output}")


def diagnose(
    folder: Path,
    *,
    runs: list[Path],
    against: list[Path],
    draws: int = 100,
    budget: int = 40_000,
    sites: str = "*",
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Says what is fine in a saved posterior, what is not, and what to do.

    Noise, KL and rank by layer, Pareto k of guide against model, leave-one-out,
    prior sensitivity, prior and posterior predictive checks, R-hat across runs:
    on screen, in diagnosis.json and as pictures.

    Examples:
      pyrolora diagnose runs/mf
      pyrolora diagnose runs/mf --runs runs/mf-seed1 runs/mf-seed2
      pyrolora diagnose runs/mf --against runs/laplace --draws 50

    Args:
        folder: What `pyrolora fit` wrote.
        runs: Folders of the same fit with other seeds, for R-hat.
        against: Folders of other posteriors on the same data, compared by leave-one-out.
        draws: Number of draws, at least 25.
        budget: The most training rows × draws; beyond it leave-one-out sees a part of the rows.
        sites: Pattern of the random sites for k of guide against model; the others stand at their means.
        seed: Of the draws.
        output: Folder for diagnosis.json and the pictures; without it, diagnosis/ in the posterior's folder.
    """
    posterior, _ = load(folder)
    found = diagnose_posterior(
        posterior,
        runs=[load(other)[0] for other in runs],
        against={str(other): load(other)[0] for other in against},
        num_draws=draws,
        budget=budget,
        sites=sites,
        seed=seed,
    )
    print(found)
    output = output or folder / "diagnosis"
    pictures = write_pictures(found.tree, found.layers, found.checks, found.loo, output)
    write_json(output / "diagnosis.json", found.to_dict())
    print(f"\nin {output}: diagnosis.json, {', '.join(path.name for path in pictures)}")


def export(folder: Path, *, draws: int = 0, seed: int = 0, output: Path | None = None) -> None:
    """Writes ordinary PEFT adapters: the posterior's mean, and draws on request.

    Each loads with peft.PeftModel.from_pretrained, or in a server that takes
    several adapters, where draws make an ensemble.

    Example:
      pyrolora export runs/mf --draws 8 --output adapters

    Args:
        folder: What `pyrolora fit` wrote.
        draws: Number of draws beside the mean.
        seed: Of the draws.
        output: Gets mean/, draw-0/, draw-1/, ...; without it, adapters/ in the posterior's folder.
    """
    posterior, _ = load(folder)
    output = output or folder / "adapters"
    print(posterior.export_peft(output / "mean"))
    for i in range(draws):
        print(posterior.export_peft(output / f"draw-{i}", draw=i, seed=seed))


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


COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (sites, fit, evaluate, diagnose, compare, predict, export, report)
}
# Spelt as flags usually are: several names after one --guides, nothing after --resume.
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "compare": {
        "recipes": {"nargs": "*", "type": Path, "default": [], "metavar": "RECIPE"},
        "--guides": {"nargs": "+", "default": [], "metavar": "GUIDE"},
        "--posteriors": {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"},
    },
    "diagnose": {
        f"--{name}": {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"} for name in ("runs", "against")
    },
    "report": {"folders": {"nargs": "+", "type": Path, "metavar": "FOLDER"}},
    "fit": {"--resume": {"action": "store_true"}},
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``pyrolora`` command; what the user can mend ends in one line on stderr."""
    _listen()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        chosen = build_parser().parse_args(arguments or ["--help"])
    except argparse.ArgumentError as error:
        _stop(f"{' '.join(str(error).split())}; see pyrolora --help", code=2)
    try:
        COMMANDS[chosen.subcommand](**vars(chosen[chosen.subcommand]))
    except (ValueError, OSError, NonFiniteError) as error:
        _stop(str(error), code=1)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    guides = "guides, with their options:\n" + "\n".join(_guides())
    epilogs = {name: guides for name in ("fit", "compare")}
    return parser_of(COMMANDS, description=DESCRIPTION, flags=FLAGS, epilogs=epilogs)


def _guides() -> list[str]:
    """Each guide as one would construct it, with its defaults."""
    lines = []
    for name, guide in classes("guides").items():
        parameters = inspect.signature(guide).parameters.values()
        lines.append(f"  {name}({', '.join(f'{p.name}={p.default!r}' for p in parameters)})")
    return lines


def _listen() -> None:
    """Progress of this package on stderr, without what other libraries say of their own insides."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    logging.getLogger("transformers.modeling_utils").addFilter(_first_time)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _first_time(record: logging.LogRecord) -> bool:
    """Whether a place in the code logs for the first time: a comparison loads the same base many times."""
    place = (record.pathname, record.lineno)
    first = place not in _logged
    _logged.add(place)
    return first


def _stop(message: str, *, code: int) -> NoReturn:
    print(f"pyrolora: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
