"""The results of a comparison: put together from its cells, as one dictionary, as tables, as files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import entr

from pyrolora.diagnostics import cells
from pyrolora.diagnostics.bootstrap import FloatArray
from pyrolora.diagnostics.cells import FORMAT, Cell, Record
from pyrolora.diagnostics.differences import contrasts
from pyrolora.diagnostics.evaluation import MAIN
from pyrolora.diagnostics.provenance import git_state, hardware, versions
from pyrolora.inference.archive import replacing, write_json
from pyrolora.recipe import Recipe
from pyrolora.tasks.base import Task

EXAMPLES = 4  # of each kind
SHOWN_DRAWS = 64
CONFIDENT = 0.7

LAYERS = {
    "kl_per_number": ("KL(q ‖ p)", "nats for each random number"),
    "noise_to_mean": ("Noise of ΔW", "its size in units of the mean ΔW"),
    "effective_rank": ("Effective rank", "of the mean ΔW"),
}

Records = Sequence[tuple[Cell, Record]]


def assemble(finished: Sequence[Cell], task: Task, *, baseline: str, recipes: Sequence[Recipe]) -> dict[str, Any]:
    """The results in the form that the report describes.

    Args:
        finished: Cells whose files are there.
        task: What they were evaluated on.
        baseline: The method that all others are compared with.
        recipes: Those that were given, for the record.
    """
    records = [(cell, cells.read(cell)) for cell in finished]
    methods = {cell.method.name: cell.method for cell in finished}
    title = " and ".join(dict.fromkeys(recipe.path.stem for recipe in recipes)) or "saved posteriors"
    return {
        "format": FORMAT,
        "title": f"{title}: posteriors compared",
        "baseline": baseline,
        "task": {
            "name": type(task).__name__,
            "class_names": list(task.class_names),
            "splits": {name: len(data) for name, data in cells.splits_of(task).items()},
        },
        "settings": {
            "num_draws": max((cell.num_draws for cell in finished), default=None),
            "seeds": sorted({cell.seed for cell in finished}),
            "temperature": {name: method.temperature for name, method in methods.items()},
            "versions": versions(),
            "hardware": hardware(),
            "recipes": [_described(recipe) for recipe in recipes],
        },
        "cells": [entry for _, record in records for entry in record.cells],
        "contrasts": _contrasts(records, baseline),
        "examples": _examples(records, task),
        "heatmaps": _heatmaps(records),
    }


def write(results: Mapping[str, Any], output: Path) -> None:
    """Writes ``results.json``, and ``results.parquet`` with one row for each metric, see `to_pandas`."""
    write_json(output / "results.json", results)
    with replacing(output / "results.parquet") as new:
        to_pandas(results).to_parquet(new)


def to_pandas(results: Mapping[str, Any]) -> pd.DataFrame:
    """One row for each method, seed, split, metric and predictive (as fitted, or scaled by τ): value and 95 % interval.

    What holds for all rows (task, settings) is in ``attrs``, which Parquet files keep.
    """
    about = ("method", "seed", "split", "num_draws", "num_examples", "scaling")
    rows = []
    for cell in results["cells"]:
        for kind, scaled in (("metrics", False), ("scaled_metrics", True)):
            for metric, estimate in (cell.get(kind) or {}).items():
                row = {name: cell.get(name) for name in about}
                rows.append({**row, "scaled": scaled, "metric": metric, **estimate, **cell["cost"]})
    table = pd.DataFrame(rows)
    table.attrs = json.loads(json.dumps({name: results[name] for name in ("title", "baseline", "task", "settings")}))
    return table


def table(results: Mapping[str, Any]) -> str:
    """Results as plain text: for each split and method the main metrics, means over seeds; and what differs.

    Every metric stands twice: as fitted → after temperature scaling.
    """
    groups: dict[str, dict[str, list[Any]]] = {}
    for cell in results["cells"]:
        groups.setdefault(cell["split"], {}).setdefault(cell["method"], []).append(cell)
    lines = []
    for split, methods in groups.items():
        width = max(map(len, methods))
        count = max(map(len, methods.values()))
        lines.append(f"{split}: mean over {count} seed(s), as fitted → scaled by τ")
        lines.append(" " * width + "".join(f"{metric:>18s}" for metric in MAIN))
        for method, found in methods.items():
            row = method.ljust(width)
            for metric in MAIN:
                before, after = (_mean(found, kind, metric) for kind in ("metrics", "scaled_metrics"))
                row += f"{before:.3f} → {after:.3f}".rjust(18)
            lines.append(row)
        lines += ["", *_differences(results, split)]
    return "\n".join(lines)


def _differences(results: Mapping[str, Any], split: str) -> list[str]:
    """Each method's differences from the baseline, a line each; a star where the interval leaves out 0."""
    lines = []
    for contrast in results["contrasts"]:
        if contrast["split"] != split or contrast["scaled"]:
            continue
        # The method is as fitted in both; brackets keep a reader from taking it for scaled too.
        against = f"({contrast['baseline']}, scaled)" if contrast["baseline_scaled"] else contrast["baseline"]
        parts = []
        for metric in MAIN:
            found = contrast["metrics"][metric]
            known = found["low"] is not None
            value = f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]" if known else "unknown"
            parts.append(f"{metric} {value}{'*' if found['real'] else ''}")
        lines.append(f"{contrast['method']} − {against}: {', '.join(parts)}")
    if not lines:
        return []
    return [f"{split}: differences on the same examples, 95 % intervals; * leaves out 0", *lines, ""]


def _mean(found: Sequence[Mapping[str, Any]], kind: str, metric: str) -> float:
    values = [cell[kind][metric]["value"] for cell in found]
    return math.inf if None in values else math.fsum(values) / len(values)  # JSON holds an infinite NLL as null


def _heatmaps(records: Records) -> list[dict[str, Any]]:
    """What each method did to the layers: means over seeds of what its cells found; methods without noise have none."""
    frames = [pd.DataFrame(record.layers).assign(method=cell.method.name) for cell, record in records if record.layers]
    found: list[dict[str, Any]] = []
    for method, rows in pd.concat(frames).groupby("method", sort=False) if frames else ():
        for column, (title, unit) in LAYERS.items():
            means = rows.assign(**{column: pd.to_numeric(rows[column])}).groupby(["kind", "layer"], sort=False)[column]
            values: dict[str, dict[str, float]] = {}
            for (kind, layer), value in means.mean().dropna().items():  # type: ignore[misc]
                values.setdefault(str(kind), {})[str(layer)] = float(value)
            if values:
                found.append({"title": title, "unit": unit, "method": str(method), "values": values})
    return found


def _contrasts(records: Records, baseline: str) -> list[dict[str, Any]]:
    splits = dict.fromkeys(split for _, record in records for split in record.resampled)
    found = []
    for split in splits:
        fits: dict[str, dict[int, Any]] = {}
        for cell, record in records:
            fits.setdefault(cell.method.name, {})[cell.seed] = record.resampled[split]
        found += [{"split": split, **each.to_dict()} for each in contrasts(fits, baseline=baseline)]
    return found


def _examples(records: Records, task: Task) -> list[dict[str, Any]]:
    """Texts of the test split on which a method is confidently wrong, methods contradict one another, or draws do.

    Predictions of each method's first seed. Every text has what all methods say of it.
    """
    first: dict[str, Record] = {}
    for cell, record in records:
        first.setdefault(cell.method.name, record)
    if task.test is None or not first:
        return []
    labels, texts = np.asarray(task.test["labels"][:]), task.test["text"][:]
    means = {name: np.exp(record.log_mean["test"].double().numpy()) for name, record in first.items()}
    draws = {name: np.exp(record.draws["test"].double().numpy()) for name, record in first.items() if record.draws}
    found: list[dict[str, Any]] = []
    for kind, scores in _interest(means, draws, labels).items():
        taken = {example["row"] for example in found}
        order = [int(i) for i in np.argsort(-scores, kind="stable") if scores[i] > 0 and int(i) not in taken]
        for i in order[:EXAMPLES]:
            says = {
                name: {
                    "probabilities": mean[i].tolist(),
                    "draws": draws[name][:SHOWN_DRAWS, i].tolist() if name in draws else [],
                }
                for name, mean in means.items()
            }
            about = {"kind": kind, "score": float(scores[i]), "row": i, "text": texts[i], "label": int(labels[i])}
            found.append({**about, "says": says})
    return found


def _interest(
    means: Mapping[str, FloatArray], draws: Mapping[str, FloatArray], labels: np.ndarray
) -> dict[str, FloatArray]:
    """Kind → how interesting each example is, (n,); 0 where not at all."""
    wrong = np.max([mean.max(-1) * (mean.argmax(-1) != labels) for mean in means.values()], axis=0)
    found = {
        "wrong": np.where(wrong >= CONFIDENT, wrong, 0.0),
        "methods": _disagreement(np.stack(list(means.values()))),
    }
    if draws:
        found["draws"] = np.max([_disagreement(values) for values in draws.values()], axis=0)
    return found


def _disagreement(values: FloatArray) -> FloatArray:
    """The mutual information H(mean) − mean of H over the first axis, in nats: (m, n, K) → (n,)."""
    return np.maximum(entr(values.mean(0)).sum(-1) - entr(values).sum(-1).mean(0), 0.0)


def _described(recipe: Recipe) -> dict[str, Any]:
    text = recipe.path.read_text(encoding="utf-8") if recipe.path.is_file() else ""
    priors = {pattern: _shown(spec) for pattern, spec in recipe.priors.items()}
    return {
        "name": recipe.path.stem,
        "file": str(recipe.path),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "git": git_state(recipe.path),
        "priors": priors,
        "text": text,
    }


def _shown(spec: Any) -> str:
    """A prior's description as one would write it: ``Normal(scale=0.1)``."""
    if isinstance(spec, str):
        return spec
    return f"{spec['class_path']}({', '.join(f'{k}={v!r}' for k, v in (spec.get('init_args') or {}).items())})"
