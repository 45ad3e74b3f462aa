"""Commands that look at a model and fit its posterior."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyrolora.inference import processes
from pyrolora.inference.fit import fit as fit_program
from pyrolora.recipe import Recipe
from pyrolora.saved import prepare, save


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
        guide: How the posterior is approximated: one of the list below, or a configuration that the recipe names.
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
    processes.wait()  # until the first has written it, so that whoever goes on finds it
    if processes.rank() > 0:
        return
    print(posterior)
    if last := [row for row in posterior.history if "elbo" in row][-1:]:
        print("elbo {elbo:.4f} = data {data:.4f} − kl {kl:.4f} + log prior {log_prior:.4f} nats".format(**last[0]))
    for name, row in posterior.describe().items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))
    print(f"saved in {output}; next: pyrolora evaluate {output}")
