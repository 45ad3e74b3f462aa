"""Guides against NUTS on Bayesian logistic regression."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from pyrolora.diagnostics.distance import distances
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.nuts import NUTS
from pyrolora.inference.fit import fit
from tests.programs import logistic_program


def test_posteriors_have_the_variance_that_their_mode_lacks(tmp_path: Path) -> None:
    """Law: mean field and Laplace on the head are near NUTS in predictive and logits, where MAP has no variance."""
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=100,
        per_device_train_batch_size=40,
        learning_rate=0.05,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    program = logistic_program(12)
    truth = fit(program, NUTS(size=120, warmup=50, chains=1, max_tree_depth=3))
    guides = {
        "MAP": MAP(),
        "MeanField": MeanField(random="head.*", init_scale=0.3, scale_learning_rate=2.0),
        "Laplace": Laplace(random="head.*", precision="declared", structure="dense"),
    }
    posteriors = {name: fit(program, guide, args=arguments) for name, guide in guides.items()}
    found = distances(posteriors, truth, program.task.test)
    assert found.loc["MAP", "variance"] == 0 < found.loc["MAP", "reference_variance"]
    for name in ("MeanField", "Laplace"):
        assert found.loc[name, "total_variation"] < 0.07 and found.loc[name, "logit_mean"] < 0.25
        assert found.loc[name, "logit_variance"] < 0.75 * found.loc["MAP", "logit_variance"]
