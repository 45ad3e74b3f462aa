"""The smallest data and the longest text: they work, or stop with an error that says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import TrainingArguments

from pyrolora.diagnostics.evaluation import evaluate_posterior
from pyrolora.diagnostics.temperature import calibrate
from pyrolora.guides.base import Guide
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.swag import SWAG
from pyrolora.inference.fit import fit
from pyrolora.inference.generate import generate
from pyrolora.inference.posterior import Posterior
from pyrolora.program import PyroLoRA
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.programs import PRIORS, language_posterior, lora, sentences, tiny_bert, tokenizer, untrained

LONG = " ".join(["a good warm house"] * 30_000)


def one_row(folder: Path, guide: Guide) -> tuple[Posterior, datasets.Dataset]:
    """Fitted to one row, with the same row as every other split."""
    row = sentences(1)
    task: Any = SequenceClassification(
        tokenizer(), train=row, validation=row, test=row, class_names=["no", "yes"], max_length=16
    )
    program = PyroLoRA(tiny_bert(), lora(), priors=PRIORS, task=task)
    args = TrainingArguments(
        output_dir=str(folder), max_steps=3, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    return fit(program, guide, args=args), task.test


@pytest.mark.parametrize(
    "guide",
    [Laplace(), Laplace(structure="dense"), Laplace(structure="diagonal"), SWAG()],
    ids=["low rank", "dense", "diagonal", "SWAG"],
)
def test_one_row_for_a_curvature(tmp_path: Path, guide: Guide) -> None:
    """Law: curvature and moments of a single row give a posterior that predicts: probabilities that add up to 1."""
    posterior, test = one_row(tmp_path, guide)
    prediction = posterior.predict(test, 4)
    assert torch.allclose(prediction.mean.sum(-1), torch.ones(1), atol=1e-5)


def test_one_row_to_calibrate_and_to_evaluate(tmp_path: Path) -> None:
    """Law: a temperature from one row is positive; every metric of one row is a number, or missing with a reason."""
    posterior, test = one_row(tmp_path, MeanField())
    assert 0 < calibrate(posterior, test).scaling < float("inf")
    result = evaluate_posterior(posterior, test, scaling=1.0)
    assert result.to_dict()["metrics"]["accuracy"]["value"] in (0.0, 1.0)
    assert result.to_dict()["metrics"]["nll"]["value"] == pytest.approx(
        -posterior.predict(test).log_mean[0, test["labels"][0]].item(), rel=1e-5
    )


def test_a_very_long_text(caplog: pytest.LogCaptureFixture) -> None:
    """Law: a text of 120,000 words is cut, and that is said, to train and to predict; next tokens take all of it in
    blocks; as a prompt, which cannot be cut, it is refused with its length."""
    rows = datasets.Dataset.from_list([{"text": LONG, "label": 1}, {"text": "a cold stone", "label": 0}])
    task = SequenceClassification(tokenizer(), train=rows, max_length=16)
    assert len(task.train[0]["input_ids"]) == 16
    posterior = untrained(MAP())
    assert posterior.program.task is not None
    with caplog.at_level("WARNING", logger="pyrolora"):
        prediction = posterior.predict(posterior.program.task.tokenise(rows.remove_columns("label")), 1)
    assert torch.isfinite(prediction.log_mean).all()
    assert "1 of 2 texts were cut to max_length=16 tokens" in caplog.text
    blocks = LanguageModeling(tokenizer(), train=datasets.Dataset.from_dict({"text": [LONG]}), max_length=8).train
    assert sum(map(len, blocks["input_ids"][:])) >= 120_000
    with pytest.raises(ValueError, match=r"prompt 0 has 12000\d tokens.*Shorten it"):
        generate(language_posterior(MAP()), [LONG], max_new_tokens=2)
