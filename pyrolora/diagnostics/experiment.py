"""A whole comparison from one recipe: guides × seeds, fitted, evaluated and written to a folder."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from pyrolora.diagnostics.compare import MAIN, evaluate_posterior, fit_scaling
from pyrolora.guides.map import MAP
from pyrolora.inference.archive import read_meta, write_json
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.trainer import last_checkpoint
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.recipe import Recipe, RecipeError, classes
from pyrolora.tasks.base import Task

logger = logging.getLogger("pyrolora")

BASELINE = "LoRA"


def check_methods(names: Iterable[str]) -> list[str]:
    """The methods of a comparison: ``LoRA`` (MAP under flat priors), the baseline, first; then the named guides.

    Raises:
        RecipeError: An unknown name; the right ones are listed.
    """
    known = [BASELINE, *classes("guides")]
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown guide {name!r}; there are {', '.join(known)}")
    return list(dict.fromkeys([BASELINE, *names]))


def run(
    recipe: Recipe, methods: Sequence[str], *, seeds: Sequence[int], output: Path, num_draws: int = 16
) -> dict[str, Any]:
    """Fits and evaluates every method with every seed.

    Each finished fit leaves ``cells/<method>-seed<k>.json`` and the posterior ``<method>-seed<k>/``; called again, it
    is not repeated unless the recipe, the data or the number of draws has changed. ``results.json`` is written after
    every fit, so that an interrupted comparison can be reported as far as it came.

    Args:
        recipe: The probabilistic model.
        methods: Names of guides; plain LoRA is added as the baseline.
        seeds: Each seeds initial weights, data order and noise.
        output: The folder.
        num_draws: S at test.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        RecipeError: An unknown method; a task without classes, or without validation or test split.
    """
    methods = check_methods(methods)
    for method in methods:
        _build_guide(recipe, method)  # a wrong argument stops here, not after the fits before it
    task = recipe.build_task()
    _check_task(task, recipe)
    (output / "cells").mkdir(parents=True, exist_ok=True)
    data = _digest([[split, rows["text"][:], rows["labels"][:]] for split, rows in _splits(task).items()])
    cells: list[dict[str, Any]] = []
    results = {}
    for i, (seed, method) in enumerate(product(seeds, methods), start=1):
        name = f"{method}-seed{seed}"
        path = output / "cells" / f"{name}.json"
        key = _key(recipe, method, seed=seed, num_draws=num_draws, data=data)
        finished = _is_finished(path, key)
        state = "finished before" if finished else "fitting"
        logger.info("[%d/%d] %s, seed %d: %s", i, len(seeds) * len(methods), method, seed, state)
        if not finished:
            new = _fit_and_evaluate(recipe, task, method=method, seed=seed, num_draws=num_draws, folder=output / name)
            write_json(path, {"key": key, "cells": new})
        cells += json.loads(path.read_text(encoding="utf-8"))["cells"]
        results = _results(recipe, task, cells=cells, seeds=seeds, num_draws=num_draws)
        write_json(output / "results.json", results)
    return results


def prepare(folder: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Makes a folder's checkpoints those of this fit: to resume, they must be; otherwise older ones go.

    Args:
        folder: Of the checkpoints.
        identity: What a fit depends on: recipe, guide, seed.
        resume: Whether to go on from the last checkpoint.

    Raises:
        RecipeError: Checkpoints of another fit.
    """
    path = folder / "fit.json"
    plain = json.loads(json.dumps(identity, default=str))
    if resume and last_checkpoint(folder) is not None:
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) != plain:
            raise RecipeError(f"{folder} is of another recipe, guide or seed; without --resume the fit begins anew")
        return
    if resume:
        logger.info("%s holds no complete checkpoint; the fit begins anew", folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(path, plain)


def save(posterior: Posterior, recipe: Recipe, folder: Path) -> Path:
    """Saves a posterior with its recipe beside it, from which the command line rebuilds task and base."""
    posterior.save_pretrained(folder)
    recipe.write(folder / "recipe.yaml")
    return folder


def load(folder: Path) -> tuple[Posterior, Task]:
    """The inverse of `save`: the posterior on its base model, and its task.

    Raises:
        RecipeError: No recipe in the folder, or one that cannot be built.
        ArchiveError: No posterior, a damaged one, or one of another base model.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RecipeError(f"{folder}: no recipe.yaml there; give a folder that pyrolora fit wrote")
    recipe = Recipe.read(folder / "recipe.yaml")
    seed = read_meta(folder)["seed"]
    task = recipe.build_task()
    return Posterior.from_pretrained(folder, recipe.load_base(task, seed=seed), task=task), task


def table(results: Mapping[str, Any]) -> str:
    """Results as plain text: for each split and method the main metrics, means over seeds.

    Every metric stands twice: as fitted → after temperature scaling.
    """
    groups: dict[str, dict[str, list[Any]]] = {}
    for cell in results["cells"]:
        groups.setdefault(cell["split"], {}).setdefault(cell["method"], []).append(cell)
    lines = []
    for split, methods in groups.items():
        width = max(map(len, methods))
        lines.append(f"{split}: mean over {len(results['settings']['seeds'])} seed(s), as fitted → scaled by τ")
        lines.append(" " * width + "".join(f"{metric:>18s}" for metric in MAIN))
        for method, cells in methods.items():
            row = method.ljust(width)
            for metric in MAIN:
                before, after = (_mean(cells, kind, metric) for kind in ("metrics", "scaled_metrics"))
                row += f"{before:.3f} → {after:.3f}".rjust(18)
            lines.append(row)
        lines.append("")
    return "\n".join(lines)


def _mean(cells: Sequence[Mapping[str, Any]], kind: str, metric: str) -> float:
    values = [cell[kind][metric]["value"] for cell in cells]
    return math.inf if None in values else math.fsum(values) / len(values)  # JSON holds an infinite NLL as null


def _fit_and_evaluate(
    recipe: Recipe, task: Task, *, method: str, seed: int, num_draws: int, folder: Path
) -> list[dict[str, Any]]:
    """One fit, and its cell for the test split and for every labelled out-of-distribution split."""
    program = recipe.build_program(task, seed=seed, flat=method == BASELINE)
    guide = _build_guide(recipe, method)
    start = time.perf_counter()
    posterior = fit(program, guide, args=recipe.arguments(None, seed=seed), temperature=_beta(recipe, method))
    fit_seconds = time.perf_counter() - start
    save(posterior, recipe, folder)
    assert task.validation is not None and task.test is not None
    scaling = fit_scaling(posterior, task.validation, num_draws=num_draws)
    cells = []
    for split, data in {"test": task.test, **task.ood}.items():
        if min(data["labels"]) < 0:
            logger.info("%s: labels that are no classes of the task; not scored", split)
            continue
        evaluation = evaluate_posterior(posterior, data, scaling=scaling, num_draws=num_draws).to_dict()
        cost = {
            "fit_seconds": fit_seconds,
            "predict_seconds": evaluation.pop("predict_seconds"),
            "parameters": sum(p.numel() for p in posterior.guide.parameters()),
            "passes": posterior.guide.passes(num_draws, len(task.class_names)),
        }
        cell = {"method": method, "description": _description(method), "seed": seed, "split": split, "cost": cost}
        cells.append({**cell, **evaluation})
    return cells


def _build_guide(recipe: Recipe, method: str) -> Any:
    return MAP() if method == BASELINE else recipe.build_guide(method)


def _beta(recipe: Recipe, method: str) -> float:
    return 1.0 if method == BASELINE else recipe.temperature_of(method)


def _description(method: str) -> str:
    """A method in one line: the first line of the file that defines the guide."""
    if method == BASELINE:
        return "plain LoRA: maximum likelihood, no priors"
    module = inspect.getmodule(classes("guides")[method])
    return (inspect.getdoc(module) or method).partition("\n")[0]


def _check_task(task: Task, recipe: Recipe) -> None:
    if not isinstance(task.likelihood, ClassLikelihood):
        kind = type(task.likelihood).__name__
        raise RecipeError(f"{recipe.path}: a comparison scores classes; the likelihood of this task is {kind}")
    for split, data in {"validation": task.validation, "test": task.test}.items():
        if data is None:
            raise RecipeError(f"{recipe.path}: a comparison needs a {split} split; the task has none")


def _splits(task: Task) -> dict[str, Dataset]:
    splits = {"train": task.train, "validation": task.validation, "test": task.test, **task.ood}
    return {name: data for name, data in splits.items() if data is not None}


def _key(recipe: Recipe, method: str, *, seed: int, num_draws: int, data: str) -> str:
    """What a finished cell depends on; of the recipe's guides only its own."""
    content = {**recipe.content(), "guides": recipe.guides.get(method), "temperature": _beta(recipe, method)}
    return _digest([content, data, method, seed, num_draws, version("pyrolora")])


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _is_finished(path: Path, key: str) -> bool:
    """Whether a file holds the cells of this very fit, whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("key") == key and "cells" in content


def _results(
    recipe: Recipe, task: Task, *, cells: list[dict[str, Any]], seeds: Sequence[int], num_draws: int
) -> dict[str, Any]:
    """The results in the form that the report describes."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "format": 1,
        "title": f"{recipe.path.stem}: posteriors compared",
        "baseline": BASELINE,
        "task": {
            "name": type(task).__name__,
            "class_names": list(task.class_names),
            "splits": {name: len(data) for name, data in _splits(task).items()},
        },
        "settings": {
            "num_draws": num_draws,
            "seeds": list(seeds),
            "temperature": {method: _beta(recipe, method) for method in dict.fromkeys(c["method"] for c in cells)},
            "versions": {name: version(name) for name in ("pyrolora", "torch", "pyro-ppl", "transformers", "peft")},
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}{gpu}",
            "recipe": recipe.path.read_text(encoding="utf-8") if recipe.path.is_file() else "",
            "priors": {pattern: _shown(spec) for pattern, spec in recipe.priors.items()},
        },
        "cells": cells,
    }


def _shown(spec: Any) -> str:
    """A prior's description as one would write it: ``Normal(scale=0.1)``."""
    if isinstance(spec, str):
        return spec
    return f"{spec['class_path']}({', '.join(f'{k}={v!r}' for k, v in (spec.get('init_args') or {}).items())})"
