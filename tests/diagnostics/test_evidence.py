"""Evidence: what draws say of rows, and the tree that ArviZ takes."""

from __future__ import annotations

import arviz_stats
import numpy as np
import pytest
import torch

from pyrolora.diagnostics.evidence import gather, tree
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import sentence_task, tiny_program


def moved(guide: MeanField | MAP, *, seed: int = 0, temperature: float = 1.0) -> Posterior:
    program = tiny_program()
    with isolated(seed), torch.no_grad():
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return Posterior(program, guide, temperature=temperature)


def test_likelihood_counts_as_it_did_in_the_fit() -> None:
    """Law: the total is Σ log p / β over all rows, scaled up from a part; held-out scores are the mean predictive's."""
    posterior, task = moved(MeanField(), temperature=0.25), sentence_task()
    assert task.validation is not None
    whole = gather(posterior, task.train, task.validation, 30, seed=1)
    rows = posterior.log_likelihood(task.train, 30, seed=1).double()
    assert whole.whole and np.allclose(whole.total(), rows.sum(1) / 0.25, rtol=1e-4)
    part = gather(posterior, task.train.select(range(6)), task.validation, 30, seed=1)
    assert not part.whole and np.allclose(part.total(), rows[:, :6].sum(1) * 4 / 0.25, rtol=1e-4)
    prediction = posterior.predict(task.validation, 30, seed=1)
    labels = torch.tensor(task.validation["labels"])
    assert np.allclose(whole.log_score(), prediction.log_mean[range(16), labels], atol=1e-5)
    assert prediction.draws is not None
    confidence = prediction.draws.exp().amax(-1).mean(-1)
    assert np.allclose(whole.scalars()["confidence"], confidence, atol=1e-5)


def test_point_estimates_are_repeated() -> None:
    """Law: a point estimate has no draws of training rows, and S equal ones of held-out rows."""
    task = sentence_task()
    assert task.validation is not None
    found = gather(moved(MAP()), task.train, task.validation, 30)
    assert found.train is None and found.held_out.shape == (30, 16) and np.ptp(found.held_out, 0).max() == 0


def test_tree() -> None:
    """Law: one chain for each run; identifiable scalars, updates by layer, sizes by layer and rank, densities."""
    task = sentence_task()
    assert task.validation is not None
    runs = [gather(moved(MeanField(), seed=s), task.train, task.validation, 30) for s in (0, 1)]
    found = tree(runs, 20)
    posterior = found["posterior"].to_dataset()
    assert posterior["log score"].dims == ("chain", "draw") and posterior.sizes["chain"] == 2
    assert posterior["update lora.query"].dims == ("chain", "draw", "layer")
    assert posterior["size lora.value.A"].dims == ("chain", "draw", "layer", "rank")
    assert posterior["layer"].values.tolist() == [0, 1]
    assert np.allclose(posterior["size lora.value.A"].values[1], runs[1].weights.size["lora.value.A"])
    assert found["prior"]["size lora.query.A"].shape == (1, 20, 2, 2) and "size lora.query.B" not in posterior
    ratio = found["sample_stats"]["log_prior"].values[0] - found["sample_stats"]["log_guide"].values[0]
    assert ratio == pytest.approx(runs[0].weights.log_ratio(), rel=1e-6)
    assert np.isfinite(arviz_stats.loo(found, reff=1.0).elpd)
    assert len(arviz_stats.summary(found, var_names=["size lora.value.A"])) == 4
