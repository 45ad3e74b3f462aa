"""Laplace at plain LoRA and at MAP under a prior, against the same weights: calibration, shift, evidence, cost.

Run: python tests/benchmarks/laplace_table.py --tasks commonsense sst2 cola clinc150 --data FOLDER --seeds 0 1 2 \\
         --keep POSTERIORS --out laplace.jsonl

FOLDER is that of sweep.py. The point estimates are those of its sweep "inducing", fitted here where POSTERIORS lacks
them. Each is exported as an ordinary PEFT adapter, and Laplace starts from that file: post hoc, as a user would.
A row is one set of weights under one predictive; rows that a file has already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from sweep import BASE, LORA, SCALE_OF_B, Configuration, average, fitted, make_task, metrics, prior, rows_of

from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.guides.laplace import Laplace
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task

SCALES = {f"MAP {b}": Configuration(b=b) for b in (0.05, 0.07, 0.1)}
LAPLACES: dict[str, dict[str, Any]] = {
    "marglik": {},
    "val_nll": {"precision": "val_nll"},
    "diagonal": {"structure": "diagonal"},
    "head": {"random": "head.*"},
}


def load(task: Task, point: Posterior, chosen: Configuration) -> PyroLoRA:
    """The program at an exported adapter."""
    priors = {"*.A": prior(chosen.a), "*.B": prior(chosen.b), "head.*": prior(chosen.head)}
    with tempfile.TemporaryDirectory() as folder:
        point.export_peft(folder)
        return PyroLoRA(task.load_base_model(BASE), folder, priors=priors, task=task)


def scores(posterior: Posterior, splits: dict[str, Dataset], draws: int) -> dict[str, Any]:
    """Accuracy, NLL, ECE on test and shifted data, also τ-scaled by validation data; what prediction took."""
    start = time.perf_counter()
    found = {name: posterior.predict(rows, draws) for name, rows in splits.items()}
    seconds = time.perf_counter() - start
    labels = {name: p.labels.numpy() for name, p in found.items() if p.labels is not None}
    means = {name: average(p, 0) for name, p in found.items()}
    tau = fit_temperature(means["validation"], labels["validation"])
    row: dict[str, Any] = {"tau": tau, "predict_seconds": round(seconds, 1)}
    for name in means:
        row[name] = metrics(means[name], labels[name])
        row[f"{name} τ"] = metrics(scale(means[name], tau), labels[name])
    return row


def rows(task: Task, name: str, seed: int, options: argparse.Namespace) -> Any:
    """All rows of one task and seed: the point estimates, Laplace at each, and the evidence of each prior's scale."""
    splits = {split: rows_of(task, split) for split in ("validation", "test")} | task.ood
    points = {"LoRA": LORA, f"MAP {SCALE_OF_B[name]}": Configuration(b=SCALE_OF_B[name])}
    for label, chosen in {**points, **(SCALES if options.evidence else {})}.items():
        point, seconds = fitted(task, chosen, seed, keep=options.keep, name=name)
        program = load(task, point, chosen)
        if label in SCALES and options.evidence:
            declared = laplace(program, seed, {"precision": "declared", "random": "*.B"})
            found = {"validation": metrics(average(point.predict(splits["validation"], 0), 0), labels_of(splits))}
            yield {"point": label, "predictive": "evidence", **declared.describe()["all"], **found}
        if label not in points:
            continue
        yield {"point": label, "predictive": "point", "fit_seconds": seconds, **scores(point, splits, 0)}
        for kind, own in LAPLACES.items():
            if options.only is None or kind in options.only:
                start = time.perf_counter()
                posterior = laplace(program, seed, own)
                seconds = round(time.perf_counter() - start, 1)
                found = scores(posterior, splits, 16)
                yield {
                    "point": label,
                    "predictive": kind,
                    "fit_seconds": seconds,
                    **found,
                    "describe": posterior.describe(),
                }


def labels_of(splits: dict[str, Dataset]) -> Any:
    import numpy as np

    return np.asarray(splits["validation"]["labels"][:])


def laplace(program: PyroLoRA, seed: int, options: dict[str, Any]) -> Posterior:
    return fit(program, Laplace(optimise=False, **options), args=default_arguments(seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", choices=LAPLACES)
    parser.add_argument("--evidence", action="store_true", help="also the evidence of each scale of B's prior")
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("laplace.jsonl"))
    options = parser.parse_args()
    for name, seed in itertools.product(options.tasks, options.seeds):
        identity = {"task": name, "seed": seed}
        with isolated(seed):
            for row in rows(make_task(name, options.data), name, seed, options):
                with options.out.open("a") as file:
                    file.write(json.dumps({**identity, **row}) + "\n")
                print(json.dumps({**identity, **row}), flush=True)


if __name__ == "__main__":
    main()
