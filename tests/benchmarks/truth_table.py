"""How far each guide is from the truth: NUTS on two models that are tiny enough for it.

Run: python tests/benchmarks/truth_table.py --steps 200 --points 200

The first model is Bayesian logistic regression: the posterior is in the head. The second is a random BERT of one layer
with LoRA of rank 1 on query and value. All guides at β = 1 under one declared prior. Distances are of predictives on
unseen inputs: mean total variation, root mean square difference of the means and of the variances of the logits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping

import pandas as pd
from transformers import TrainingArguments

from pyrolora.diagnostics.distance import distances
from pyrolora.guides.base import Guide
from pyrolora.guides.dropout import Dropout
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.nuts import NUTS
from pyrolora.guides.samples import Checkpoints
from pyrolora.guides.sgld import SGLD
from pyrolora.guides.subspace import Subspace
from pyrolora.guides.swag import SWAG
from pyrolora.guides.tfb import TFB
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import logistic_program, lora, sentence_task, tiny_bert

PRIORS = {"*.A": Normal(0.3), "*.B": Normal(0.3), "head.*": Normal(0.5)}


def transformer(lora_dropout: float = 0.0) -> PyroLoRA:
    """A random BERT of one layer with LoRA of rank 1 on query and value."""
    model = tiny_bert(layers=1)
    with isolated(0):
        adapter = lora(r=1, lora_alpha=2, lora_dropout=lora_dropout)
        return PyroLoRA(model, adapter, priors=PRIORS, task=sentence_task())


def guides_of(model: str) -> dict[str, Guide]:
    """Name to guide, the arguments those that suit a hundred weights and full batches."""
    random = "head.*" if model == "logistic" else "*"
    sampler = SGLD(size=100, cycles=2, step_size=0.05, exploration=0.2)
    found: dict[str, Guide] = {
        "MAP": MAP(),
        "Ensemble of 5 MAP": Ensemble(MAP(), 5),
        "Checkpoints": Checkpoints(),
        "SWAG": SWAG(),
        "SGLD (SGHMC)": sampler,
        "MeanField": MeanField(random=random, init_scale=0.3, scale_learning_rate=2.0),
        "Ensemble of 3 MeanField": Ensemble(MeanField(random=random, init_scale=0.3, scale_learning_rate=2.0), 3),
        "Laplace": Laplace(random=random, precision="declared", structure="dense"),
        "Laplace, draws of weights": Laplace(
            random=random,
            precision="declared",
            structure="dense",
            predictive="weights",
        ),
    }
    if model == "transformer":
        found |= {
            "Dropout": Dropout(),
            "TFB after MAP": TFB(optimise=True),
            "Subspace": Subspace(scale_learning_rate=2.0),
            "BLoB": MeanField.blob(),
            "InputAdaptive": InputAdaptive(),
            "Inducing": Inducing(scale_learning_rate=2.0),
            "Inducing, A and B": Inducing(random="lora.*", scale_learning_rate=2.0),
            "Inducing, product": Inducing(structure="product", scale_learning_rate=2.0),
        }
    return found


def arguments(folder: str, steps: int, seed: int = 0) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        learning_rate=0.02,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        seed=seed,
    )


def table(model: str, guides: Mapping[str, Guide], *, steps: int, points: int) -> pd.DataFrame:
    """Distances of every guide from NUTS on one of the two models, and the seconds that its fit took."""
    build = logistic_program if model == "logistic" else transformer
    seconds, posteriors = {}, {}
    with tempfile.TemporaryDirectory() as folder:

        def fitted(name: str, guide: Guide, *, seed: int = 0) -> Posterior:
            program = transformer(0.1) if isinstance(guide, Dropout) else build()
            start = time.perf_counter()
            own = 5 * steps if isinstance(guide, SGLD) else steps
            posterior = fit(program, guide, args=arguments(folder, own, seed))
            seconds[name] = time.perf_counter() - start
            print(f"{model}: {name}, {seconds[name]:.0f} s", flush=True)
            return posterior

        reference = NUTS(size=points, warmup=points // 2, chains=1, max_tree_depth=4 if model == "logistic" else 5)
        truth = fitted("NUTS", reference)
        # What another run of the truth itself differs by is what no distance below can be told from.
        posteriors["NUTS, another seed"] = fitted("NUTS, another seed", reference, seed=1)
        for name, guide in guides.items():
            posteriors[name] = fitted(name, guide)
        found = distances(posteriors, truth, truth.program.task.test, num_draws=200)
    found["seconds"] = pd.Series(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["logistic", "transformer"])
    parser.add_argument("--only", nargs="+", help="names of guides, as in the table")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--points", type=int, default=200)
    options = parser.parse_args()
    for model in options.models:  # a few minutes each
        names = {name: guide for name, guide in guides_of(model).items() if name in (options.only or [name])}
        found = table(model, names, steps=options.steps, points=options.points)
        print(found.round(4).to_string(), flush=True)


if __name__ == "__main__":
    main()
