"""A whole comparison from one recipe: guides × seeds, fitted, evaluated and written to a folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyrolora.diagnostics.compare import evaluate_posterior
from pyrolora.guides.base import Guide
from pyrolora.guides.map import MAP
from pyrolora.inference.archive import write_json
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe, RecipeError, classes
from pyrolora.tasks.base import Task

logger = logging.getLogger("pyrolora")

BASELINE = "LoRA"
DESCRIPTIONS = {BASELINE: "plain LoRA: maximum likelihood, no priors", "MAP": "the mode under the declared priors"}


def check_methods(names: Iterable[str]) -> list[str]:
    """The methods of a comparison: names of guides, and ``LoRA`` (MAP under flat priors), the baseline, first.

    Raises:
        RecipeError: An unknown name; the right ones are listed.
    """
    known = [BASELINE, *classes("guides")]
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown method {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys([BASELINE, *names]))


def build_guide(recipe: Recipe, method: str) -> Guide:
    """The guide of a method under a recipe."""
    return MAP() if method == BASELINE else recipe.build_guide(method)


def run(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], output: Path, *, num_draws: int = 16
) -> dict[str, Any]:
    """Fits and evaluates every method with every seed; finished cells are not run again.

    Args:
        recipe: The probabilistic model.
        methods: Names of guides; plain LoRA is added as the baseline.
        seeds: Each seeds initial weights, data order and noise.
        output: Folder for ``results.json``, ``cells/`` and the posteriors ``<method>-seed<k>/``.
        num_draws: S at test.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        RecipeError: An unknown method, or a task without validation or test split.
    """
    methods = check_methods(methods)
    task = recipe.build_task()
    if task.validation is None or task.test is None:
        raise RecipeError(f"{recipe.path}: a comparison needs a validation and a test split")
    (output / "cells").mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in seeds:
        for method in methods:
            name = f"{method}-seed{seed}"
            path = output / "cells" / f"{name}.json"
            key = _key(recipe, method, seed, num_draws)
            done = _finished(path, key)
            if done is None:
                logger.info("%s, seed %d", method, seed)
                done = _cell(recipe, task, method, seed, num_draws, output / name)
                write_json(path, {"key": key, "cells": done})
            cells += done
    results = _results(recipe, task, cells, list(seeds), num_draws)
    write_json(output / "results.json", results)
    return results


def _cell(recipe: Recipe, task: Task, method: str, seed: int, num_draws: int, folder: Path) -> list[dict[str, Any]]:
    program = recipe.build_program(task, seed=seed, flat=method == BASELINE)
    arguments = recipe.arguments(None, seed=seed)
    start = time.perf_counter()
    posterior = fit(program, build_guide(recipe, method), args=arguments, temperature=recipe.temperature)
    seconds = time.perf_counter() - start
    save(posterior, recipe, folder)
    splits = {"test": task.test, **task.ood}
    return [
        _evaluated(posterior, task, split, num_draws, {"method": method, "seed": seed, "fit_seconds": seconds})
        for split, data in splits.items()
        if data is not None and (split == "test" or min(data["labels"]) >= 0)
    ]


def _evaluated(posterior: Posterior, task: Task, split: str, num_draws: int, run: dict[str, Any]) -> dict[str, Any]:
    data = task.test if split == "test" else task.ood[split]
    assert data is not None
    evaluation = evaluate_posterior(posterior, data, validation=task.validation, num_draws=num_draws).to_dict()
    seconds = evaluation.pop("predict_seconds")
    method = run["method"]
    return {
        "method": method,
        "description": DESCRIPTIONS.get(method, (type(posterior.guide).__doc__ or "").split("\n")[0]),
        "seed": run["seed"],
        "split": split,
        "cost": {
            "fit_seconds": run["fit_seconds"],
            "predict_seconds": seconds,
            "parameters": sum(p.numel() for p in posterior.guide.parameters()),
            "passes": evaluation["num_draws"],
        },
        **evaluation,
    }


def save(posterior: Posterior, recipe: Recipe, folder: Path) -> Path:
    """Saves a posterior with its recipe beside it, from which the command line rebuilds task and base."""
    posterior.save_pretrained(folder)
    recipe.write(folder / "recipe.yaml")
    return folder


def _key(recipe: Recipe, method: str, seed: int, num_draws: int) -> str:
    content = {k: v for k, v in vars(recipe).items() if k != "path"}
    return hashlib.sha256(json.dumps([content, method, seed, num_draws], default=str).encode()).hexdigest()


def _finished(path: Path, key: str) -> list[dict[str, Any]] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content["cells"] if content.get("key") == key else None


def _results(recipe: Recipe, task: Task, cells: list[dict], seeds: list[int], num_draws: int) -> dict[str, Any]:
    splits = {"train": task.train, "validation": task.validation, "test": task.test, **task.ood}
    packages = ("pyrolora", "torch", "pyro-ppl", "transformers", "peft")
    return {
        "format": 1,
        "title": f"{recipe.path.stem}: posteriors compared",
        "baseline": BASELINE,
        "task": {
            "name": type(task).__name__,
            "class_names": list(task.class_names),
            "splits": {name: len(data) for name, data in splits.items() if data is not None},
        },
        "settings": {
            "num_draws": num_draws,
            "seeds": seeds,
            "temperature": recipe.temperature,
            "versions": {name: version(name) for name in packages},
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
            "recipe": recipe.path.read_text() if recipe.path.is_file() else "",
            "priors": {pattern: str(spec) for pattern, spec in recipe.priors.items()},
        },
        "cells": cells,
    }
