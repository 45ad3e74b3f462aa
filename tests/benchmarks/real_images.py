"""Posteriors on real images, without a download: handwritten digits, which scikit-learn brings with it.

Run: python tests/benchmarks/real_images.py --seeds 0 1 2

A Vision Transformer of 140 thousand weights is trained on the digits 0 to 4 and saved, as a base model of its own; its
adapters then learn 5 to 9 from ten images each. Twenty of each are for validation, the other images of 5 to 9 for the
test. Digits that are none of the classes, 0 to 4, most of them the base's own training images, are out of distribution:
AUROC with which the entropy of the prediction, or its mutual information with the weights, tells them from the test.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pyrolora import guides
from pyrolora.diagnostics.evaluation import evaluate_posterior, fit_scaling
from pyrolora.guides.base import Guide
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.image_classification import ImageClassification

PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
# Guide, priors of A, B and the head, and β.
METHODS: Mapping[str, tuple[Guide, Prior, Prior, Prior, float]] = {
    "plain LoRA": (guides.MAP(), Flat(), Flat(), Flat(), 1.0),
    "MAP": (guides.MAP(), Normal("fan_in"), Flat(), Normal(1.0), 1.0),
    "MeanField": (guides.MeanField(), Normal("fan_in"), Flat(), Normal(1.0), 0.05),
    "Inducing": (guides.Inducing(), Normal("fan_in"), Flat(), Normal(1.0), 1.0),
    "Laplace": (guides.Laplace(), Normal("fan_in"), Normal(0.1), Normal(1.0), 1.0),
    "Ensemble of 5": (guides.Ensemble(guides.MAP(), 5), Flat(), Flat(), Flat(), 1.0),
}


def images(digits: range) -> datasets.Dataset:
    """Images of 8 × 8 grey levels and what they show, in the order of the data set."""
    found = load_digits()
    rows = np.flatnonzero(np.isin(found.target, digits))
    pictures = [Image.fromarray((found.images[row] * (255 / 16)).astype(np.uint8)) for row in rows]
    content = {"image": pictures, "label": [str(found.target[row]) for row in rows]}
    return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())


def save_base(folder: Path, *, epochs: int, seed: int) -> float:
    """Trains the base model on 0 to 4 but for every fifth image; returns its accuracy on those."""
    data = images(range(5))
    labels = torch.tensor([int(label) for label in data["label"]])
    pixels = torch.cat([collated(data[i : i + 64]["image"]) for i in range(0, len(data), 64)])
    held = torch.arange(len(data)) % 5 == 0
    with isolated(seed):
        model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=5, **SIZES))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        train = (~held).nonzero().flatten()
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train))].split(32):
                optimiser.zero_grad()
                cross_entropy(model(pixels[rows]).logits, labels[rows]).backward()
                optimiser.step()
    model.eval()
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    with torch.no_grad():
        return float((model(pixels[held]).logits.argmax(-1) == labels[held]).float().mean())


def collated(pictures: list[Image.Image]) -> torch.Tensor:
    return PROCESSOR(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")["pixel_values"]


def task_of(seed: int) -> ImageClassification:
    """Ten images of each of 5 to 9 for training, twenty for validation, the rest for the test."""
    data = images(range(5, 10)).shuffle(seed=seed)
    own: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for digit in map(str, range(5, 10)):
        rows = [row for row, label in enumerate(data["label"]) if label == digit]
        for split, some in zip(own, (rows[:10], rows[10:30], rows[30:]), strict=True):
            own[split] += some
    splits: dict[str, Any] = {split: data.select(rows) for split, rows in own.items()}
    return ImageClassification(PROCESSOR, **splits, ood={"0 to 4": images(range(5))})


def fitted(name: str, task: ImageClassification, base: Path, *, epochs: int, seed: int) -> Posterior:
    guide, a, b, head, beta = METHODS[name]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with isolated(seed):
        model = task.load_base_model(str(base))
        program = PyroLoRA(model, lora, priors={"*.A": a, "*.B": b, "head.*": head}, task=task)
    arguments = default_arguments(None, seed=seed)
    arguments.learning_rate, arguments.num_train_epochs, arguments.disable_tqdm = 3e-3, epochs, True
    return fit(program, guide, args=arguments, temperature=beta)


def row(posterior: Posterior, task: ImageClassification, draws: int) -> dict[str, float]:
    assert task.validation is not None and task.test is not None
    tau = fit_scaling(posterior, task.validation, num_draws=draws)
    found = evaluate_posterior(posterior, task.test, scaling=tau, ood=task.ood, num_draws=draws)
    assert found.scaled_metrics is not None
    own = {name: found.metrics[name].value for name in ("accuracy", "nll", "ece")}
    own |= {f"scaled {name}": found.scaled_metrics[name].value for name in ("nll", "ece")}
    areas = {score: each["auroc"].value for score, each in found.ood["0 to 4"]["scores"].items()}
    return own | {f"AUROC by {score}": area for score, area in areas.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--base-epochs", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--draws", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            base = Path(folder) / str(seed)
            print(f"base model {seed}: {save_base(base, epochs=options.base_epochs, seed=seed):.3f} right", flush=True)
            task = task_of(seed)
            for name in options.methods:
                rows[name].append(row(fitted(name, task, base, epochs=options.epochs, seed=seed), task, options.draws))
                print(name, {key: round(value, 3) for key, value in rows[name][-1].items()}, flush=True)
    for name, found in rows.items():
        means = {key: statistics.mean(each[key] for each in found) for key in found[0]}
        print(f"| {name} |", " | ".join(f"{key} {value:.3f}" for key, value in means.items()), "|")


if __name__ == "__main__":
    main()
