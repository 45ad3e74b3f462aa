"""One cell of a comparison: a method with one seed, fitted or loaded, evaluated on every split, kept in two files."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pyrolora.construct import classes
from pyrolora.diagnostics.bootstrap import Resampled
from pyrolora.diagnostics.differences import Resamples
from pyrolora.diagnostics.evaluation import Evaluation, evaluate_prediction, fit_scaling
from pyrolora.diagnostics.memory import peak_memory
from pyrolora.diagnostics.weights import layer_table, summarise
from pyrolora.guides.map import MAP
from pyrolora.inference import processes
from pyrolora.inference.archive import ArchiveError, read_meta, replacing, write_json
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction
from pyrolora.recipe import Recipe
from pyrolora.saved import posterior_of, save
from pyrolora.tasks.base import Task

FORMAT = 3
BASELINE = "LoRA"
KEPT_DRAWS = 4_000_000  # numbers of a split's draws that a cell keeps: 16 MB


@dataclass(frozen=True)
class Method:
    """What is compared: a guide under a recipe, to be fitted, or a posterior that is there already.

    Attributes:
        name: In tables.
        guide: A class of `pyrolora.guides`, a configuration that the recipe names, or ``LoRA``: MAP under flat priors.
        recipe: The probabilistic model.
        folder: Of a saved posterior; None for one that is to be fitted.
    """

    name: str
    guide: str
    recipe: Recipe
    folder: Path | None = None

    def build_guide(self) -> Any:
        """The guide with the recipe's arguments for it."""
        return MAP() if self.guide == BASELINE else self.recipe.build_guide(self.guide)

    @property
    def temperature(self) -> float:
        """β of its objective."""
        if self.folder is not None:
            return read_meta(self.folder)["temperature"]
        return 1.0 if self.guide == BASELINE else self.recipe.temperature_of(self.guide)

    @property
    def description(self) -> str:
        """The method in one line: the first line of the file that defines the guide."""
        if self.guide == BASELINE:
            return "plain LoRA: maximum likelihood, no priors"
        module = inspect.getmodule(classes("guides")[self.recipe.guide_class(self.guide)])
        return (inspect.getdoc(module) or self.guide).partition("\n")[0]


@dataclass(frozen=True)
class Cell:
    """One method with one seed, and where it is kept.

    Attributes:
        method: What is fitted.
        seed: Of initial weights, data order and noise.
        num_draws: S at test.
        output: The comparison's folder.
    """

    method: Method
    seed: int
    num_draws: int
    output: Path

    @property
    def name(self) -> str:
        """Of its files and of the posterior's folder."""
        return f"{plain(self.method.name)}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Of the posterior."""
        return self.method.folder or self.output / self.name

    @property
    def path(self) -> Path:
        """Of its numbers; the tensors beside them have another ending."""
        return self.output / "cells" / f"{self.name}.json"


@dataclass(frozen=True)
class Record:
    """What a finished cell holds.

    Attributes:
        cells: An entry for each labelled split, as the report reads them.
        log_mean: Split → log p(k | x_n), (n, K).
        draws: Split → log p(k | x_n, θ_s), (S, n, K), where they are few enough.
        resampled: Split → metrics on the common resamples.
        layers: Rows of `weights.layer_table`; none for a point estimate.
    """

    cells: list[dict[str, Any]]
    log_mean: dict[str, torch.Tensor]
    draws: dict[str, torch.Tensor]
    resampled: dict[str, Resamples]
    layers: list[dict[str, Any]]


def plain(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)


def fitted(cell: Cell, task: Task) -> tuple[Posterior, dict[str, Any]]:
    """The posterior of a cell, loaded or fitted and saved, and what its fit cost."""
    recipe, path = cell.method.recipe, cell.folder / "fit.json"
    known = _read_json(path)
    if cell.method.folder is not None:
        return posterior_of(cell.folder, recipe, task), _cost(known)
    key = fit_key(cell, task)
    if known.get("key") == key:
        # A posterior that cannot be read is fitted again.
        with contextlib.suppress(ArchiveError):
            return posterior_of(cell.folder, recipe, task), _cost(known)
    program = recipe.build_program(task, seed=cell.seed, flat=cell.method.guide == BASELINE)
    arguments = recipe.arguments(None, seed=cell.seed)
    start = time.perf_counter()
    with peak_memory() as peak:
        posterior = fit(program, cell.method.build_guide(), args=arguments, temperature=cell.method.temperature)
    known = {"key": key, "fit_seconds": time.perf_counter() - start, "fit_memory": peak.bytes}
    save(posterior, recipe, cell.folder)
    if processes.rank() == 0:
        write_json(path, known)
    return posterior, _cost(known)


def compute(cell: Cell, task: Task) -> None:
    """Fits a cell, unless its posterior is there, evaluates it on every split, and writes its files."""
    assert task.validation is not None and task.test is not None
    posterior, cost = fitted(cell, task)
    cost["parameters"] = sum(parameter.numel() for parameter in posterior.guide.parameters())
    cost["passes"] = posterior.guide.passes(cell.num_draws, len(task.class_names))
    data = {"test": task.test, **task.ood}
    predictions, seconds = {}, {}
    for split, rows in data.items():
        start = time.perf_counter()
        predictions[split] = posterior.predict(rows, cell.num_draws)
        seconds[split] = time.perf_counter() - start
    mean_weights = posterior.predict(task.test, 0) if posterior.guide.averages else None
    scaling = fit_scaling(posterior, task.validation, num_draws=cell.num_draws)
    entries: list[dict[str, Any]] = []
    tensors: dict[str, torch.Tensor] = {}
    for split, prediction in predictions.items():
        if not is_labelled(data[split]):
            continue
        others = {name: other for name, other in predictions.items() if name in task.ood} if split == "test" else {}
        found = evaluate_prediction(
            prediction, scaling=scaling, ood=others, mean_weights=mean_weights if split == "test" else None
        )
        entries.append(_entry(cell, split, found, {**cost, "predict_seconds": seconds[split]}))
        tensors |= {f"{split}/{name}": value for name, value in _tensors(prediction, found).items()}
    with replacing(cell.path.with_suffix(".safetensors")) as new:
        save_file(tensors, str(new))
    layers = _layers(posterior, cell.num_draws)
    write_json(cell.path, {"key": evaluation_key(cell, task), "cells": entries, "layers": layers})


def is_finished(cell: Cell, task: Task) -> bool:
    """Whether the files of this very cell are there, whole."""
    content = _read_json(cell.path)
    if content.get("key") != evaluation_key(cell, task) or "cells" not in content:
        return False
    try:
        return bool(load_file(cell.path.with_suffix(".safetensors")))
    except (OSError, SafetensorError):
        return False


def read(cell: Cell) -> Record:
    """A finished cell."""
    content = json.loads(cell.path.read_text(encoding="utf-8"))
    entries = content["cells"]
    tensors = load_file(cell.path.with_suffix(".safetensors"))
    splits = [entry["split"] for entry in entries]
    resampled: dict[str, dict[bool, dict[str, Resampled]]] = {split: {} for split in splits}
    for name, values in tensors.items():
        split, kind, *rest = name.rsplit("/", 3 if name.count("/resampled/") else 1)
        if kind == "resampled":
            numbers = values.numpy()
            resampled[split].setdefault(rest[0] == "scaled", {})[rest[1]] = Resampled(float(numbers[0]), numbers[1:])
    log_mean, draws = (
        {split: tensors[f"{split}/{kind}"] for split in splits if f"{split}/{kind}" in tensors}
        for kind in ("log_mean", "draws")
    )
    return Record(entries, log_mean, draws, dict(resampled), content["layers"])


def is_labelled(rows: Dataset) -> bool:
    """Whether every label is known."""
    return min(rows["labels"]) >= 0


def splits_of(task: Task) -> dict[str, Dataset]:
    """Every split that a task has."""
    splits = {"train": task.train, "validation": task.validation, "test": task.test, **task.ood}
    return {name: data for name, data in splits.items() if data is not None}


def fit_key(cell: Cell, task: Task) -> str:
    """What a fit depends on; of the recipe's guides only its own, of the data those that it may look at."""
    method = cell.method
    if method.folder is not None:
        return read_meta(method.folder)["sha256"]
    content = {**method.recipe.content(), "guides": method.recipe.guides.get(method.guide)}
    content["temperature"] = method.temperature
    if method.guide == BASELINE:
        del content["priors"]
    data = {name: rows for name, rows in splits_of(task).items() if name in ("train", "validation")}
    return digest([content, digest_of(data), method.guide, cell.seed, version("pyrolora")])


def evaluation_key(cell: Cell, task: Task) -> str:
    """What a cell's numbers depend on."""
    return digest([fit_key(cell, task), digest_of(splits_of(task)), cell.num_draws, FORMAT, version("pyrolora")])


def digest_of(splits: Mapping[str, Dataset]) -> str:
    """SHA-256 of the texts and labels of splits."""
    return digest([[name, rows["text"][:], rows["labels"][:]] for name, rows in splits.items()])


def digest(content: Any) -> str:
    """SHA-256 of whatever JSON can hold."""
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _cost(known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: known.get(name) for name in ("fit_seconds", "fit_memory")}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none to read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _entry(cell: Cell, split: str, found: Evaluation, cost: Mapping[str, Any]) -> dict[str, Any]:
    content = found.to_dict()
    for name in ("predict_seconds", "examples", "class_names"):
        del content[name]
    about = {"method": cell.method.name, "description": cell.method.description, "seed": cell.seed, "split": split}
    return {**about, "cost": dict(cost), **content}


def _layers(posterior: Posterior, num_draws: int) -> list[dict[str, Any]]:
    """What the posterior did to each layer; not where its predictions come from elsewhere than the weights."""
    if not posterior.guide.random_sites():
        return []
    rows = layer_table(posterior, summarise(posterior, max(num_draws, 2), seed=posterior.seed))
    return rows.to_dict("records")  # type: ignore[return-value]


def _tensors(prediction: Prediction, found: Evaluation) -> dict[str, torch.Tensor]:
    tensors = {"log_mean": prediction.log_mean.contiguous()}
    if prediction.draws is not None and prediction.draws.numel() <= KEPT_DRAWS:
        tensors["draws"] = prediction.draws.contiguous()
    for scaled, metrics in found.resampled.items():
        for metric, each in metrics.items():
            kind = "scaled" if scaled else "fitted"
            tensors[f"resampled/{kind}/{metric}"] = torch.from_numpy(np.concatenate([[each.value], each.samples]))
    return tensors
