"""NaN and infinity, in weights, inputs and losses: nothing is predicted or fitted from them in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from pyrolora.guides.base import Guide
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import fit
from pyrolora.inference.predict import NonFiniteError
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, logistic_program, lora, sentence_task, tiny_program, untrained

VALUES = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    chosen: dict[str, Any] = {"max_steps": 2, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **{**chosen, **changes})


@VALUES
@pytest.mark.parametrize("guide", [MAP(), MeanField(random="*"), Ensemble(MAP(), 2)], ids=lambda g: type(g).__name__)
def test_weights_that_are_not_finite_predict_nothing(guide: Guide, value: float) -> None:
    """Law: NaN or infinity in a posterior's weights stops a prediction, naming rows, draws and site."""
    posterior = untrained(guide)
    name = next(name for name, _ in posterior.guide.named_parameters() if "lora/value/B" in name)
    with torch.no_grad():
        posterior.guide.get_parameter(name).view(-1)[3] = value
    with pytest.raises(
        NonFiniteError, match=r"(row\(s\) 0, 1.* under .*|there is no draw.*)lora.value.B; fit it again"
    ):
        posterior.predict(sentence_task().test, 4, batch_size=12)


@pytest.mark.parametrize("function", ["logits", "log_likelihood", "to_datatree"])
def test_nothing_else_is_computed_from_them(function: str) -> None:
    """Law: logits and log-likelihoods of such weights are an error too, and so is what ArviZ would be given."""
    posterior = untrained(MeanField(random="*.A"))
    with torch.no_grad():
        posterior.guide.get_parameter("points.head/classifier/weight").view(-1)[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"head.classifier.weight"):
        getattr(posterior, function)(sentence_task().test, 4)


def test_the_draw_that_is_not_finite_is_named() -> None:
    """Law: one member of an ensemble that is spoilt is named by its draws; the mean of the others is not used."""
    posterior = untrained(Ensemble(MAP(), 3))
    with torch.no_grad():
        for parameter in posterior.guide.parts()[1].parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match=r"under draw\(s\) 1: NaN or infinity in the posterior's weights"):
        posterior.predict(sentence_task().test, 6)


def test_probabilities_of_zero_are_finite() -> None:
    """Law: a class of probability zero is no error."""
    posterior = untrained(MAP())
    with torch.no_grad():
        posterior.guide.get_parameter("points.head/classifier/bias").copy_(torch.tensor([[0.0, -1e30]]))
    prediction = posterior.predict(sentence_task().test, 1)
    assert torch.isfinite(prediction.mean).all() and prediction.mean[:, 1].max() == 0


def test_a_base_model_that_is_not_finite_is_named() -> None:
    """Law: where weights and inputs are finite, the base model's are looked at, and named."""
    posterior = untrained(MAP())
    posterior.program.model.base_model.model.bert.embeddings.position_embeddings.weight.data[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"the base model's weights .*position_embeddings.*; load another"):
        posterior.predict(sentence_task().test, 1)


def spoilt(data: datasets.Dataset, row: int, value: float) -> datasets.Dataset:
    x = [list(values) for values in data["x"]]
    x[row][1] = value
    return datasets.Dataset.from_dict({"x": x, "labels": data["labels"][:]})


@VALUES
@pytest.mark.parametrize("guide", [MeanField(random="*"), Laplace(random="*")], ids=lambda g: type(g).__name__)
def test_features_that_are_not_finite(tmp_path: Path, guide: Guide, value: float) -> None:
    """Law: a feature that is NaN or infinite stops a prediction, naming row and input, and a fit before its update."""
    program = logistic_program()
    task: Any = program.task
    posterior = fit(program, guide, args=arguments(tmp_path))
    with pytest.raises(NonFiniteError, match=r"row\(s\) 7 are not finite under every draw: .* in their inputs x; cor"):
        posterior.predict(spoilt(task.test, 7, value), 3, batch_size=4)
    with pytest.raises((NonFiniteError, ValueError), match=r"not finite|NaN or infinite values before any training"):
        fit(program, guide, spoilt(task.train, 7, value), args=arguments(tmp_path, per_device_train_batch_size=40))


class PixelTask:
    """What a program asks of a task, for images that are arrays."""

    validation, test, ood, tokenizer, class_names = None, None, {}, None, ("no", "yes")

    def __init__(self, train: datasets.Dataset):
        self.train, self.likelihood = train, Categorical(2)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        pixels = torch.tensor(np.array([row["pixel_values"] for row in rows]), dtype=torch.float)
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def images(**changes: float) -> datasets.Dataset:
    pixels = np.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)
    for row, value in changes.items():
        pixels[int(row.removeprefix("row")), 0, 4, 4] = value
    return datasets.Dataset.from_dict({"pixel_values": pixels.tolist(), "labels": [0, 1, 0, 1]})


@VALUES
def test_pixels_that_are_not_finite(tmp_path: Path, value: float) -> None:
    """Law: an image with a NaN or infinite pixel stops a prediction and a fit, naming its row."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    base = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2))
    config = lora(target_modules=["q_proj", "v_proj"], task_type=None, modules_to_save=["classifier"])
    task: Any = PixelTask(images())
    program = PyroLoRA(base, config, priors=PRIORS, task=task)
    posterior = fit(program, MeanField(), args=arguments(tmp_path))
    with pytest.raises(NonFiniteError, match=r"row\(s\) 2 are not finite .* in their inputs pixel_values"):
        posterior.predict(images(row2=value), 2, batch_size=2)
    with pytest.raises(NonFiniteError, match=r"step 1: the objective is not finite.*without a finite likelihood"):
        fit(program, MeanField(), images(row2=value), args=arguments(tmp_path))


@VALUES
def test_base_weights_that_are_not_finite_stop_a_fit(tmp_path: Path, value: float) -> None:
    """Law: a base model with NaN or infinite weights stops before any step."""
    program = tiny_program()
    program.model.base_model.model.bert.embeddings.word_embeddings.weight.data[:] = value
    with pytest.raises(ValueError, match="NaN or infinite values before any training"):
        fit(program, MeanField(), args=arguments(tmp_path))


@VALUES
def test_adapters_that_start_infinite_stop_a_fit(tmp_path: Path, value: float) -> None:
    """Law: starting weights that are not finite stop the fit at once; nothing is saved as good that is not."""
    program = tiny_program()
    with torch.no_grad():
        for latent in program.latents.values():
            latent.start.view(-1)[0] = value
    with pytest.raises(NonFiniteError, match=r"start from NaN or infinity at lora\.query\.A, "):
        fit(program, MeanField(), args=arguments(tmp_path))


class Impossible(Categorical):
    """Under which the last row of a batch cannot have happened."""

    def log_prob(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        values = super().log_prob(logits, parameters, batch)
        return torch.cat([values[:-1], values[-1:] - torch.inf])

    def observe(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
        last = torch.zeros(len(logits), 1)
        last[-1] = torch.inf
        super().observe(logits - last * torch.nn.functional.one_hot(batch["labels"], 2), parameters, batch)


@pytest.mark.parametrize("guide", [MAP(), MeanField()], ids=lambda g: type(g).__name__)
def test_an_infinite_loss_stops_a_fit(tmp_path: Path, guide: Guide) -> None:
    """Law: a loss that is infinite, not NaN, stops at its step and names the row; the last good state is finite."""
    program = tiny_program()
    program.likelihood = Impossible(2)
    with pytest.raises(NonFiniteError, match=r"step 1: the objective is not finite.*last good state"):
        fit(program, guide, args=arguments(tmp_path))
    state = load_file(tmp_path / "last-good" / "posterior.safetensors")
    assert state and all(torch.isfinite(value).all() for value in state.values())
