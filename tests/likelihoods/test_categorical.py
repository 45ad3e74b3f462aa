from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from pyrolora.likelihoods.categorical import Categorical

LOGITS = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) * 3
BATCH = {"labels": torch.tensor([0, 2, 1, 1, 0])}


def test_log_prob_is_the_hand_loop():
    """Law: log p(y_n | f_n) = f_n[y_n] − log Σ_k exp f_n[k], by a loop in plain floats."""
    out = Categorical(3).log_prob(LOGITS, {}, BATCH)
    for n, label in enumerate(BATCH["labels"].tolist()):
        row = LOGITS[n].tolist()
        assert out[n].item() == pytest.approx(row[label] - math.log(sum(math.exp(f) for f in row)), abs=1e-5)


def test_distribution_log_prob_and_probabilities_agree():
    """Law: log_prob, the distribution's log_prob and log(probabilities) at the label are one number."""
    likelihood = Categorical(3)
    distribution = likelihood.distribution(LOGITS, {}, BATCH)
    assert distribution.batch_shape == (5,) and distribution.event_shape == ()
    torch.testing.assert_close(distribution.log_prob(BATCH["labels"]), likelihood.log_prob(LOGITS, {}, BATCH))
    chosen = likelihood.probabilities(LOGITS, {}, BATCH)[torch.arange(5), BATCH["labels"]]
    torch.testing.assert_close(chosen.log(), likelihood.log_prob(LOGITS, {}, BATCH))


def test_vmap_over_draws_is_the_loop():
    """Law: under vmap every method gives what it gives draw by draw."""
    draws = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    likelihood = Categorical(3)
    for method in (likelihood.log_prob, likelihood.probabilities):
        together = torch.vmap(lambda f, method=method: method(f, {}, BATCH))(draws)
        torch.testing.assert_close(together, torch.stack([method(f, {}, BATCH) for f in draws]))
    densities = torch.vmap(lambda f: likelihood.distribution(f, {}, BATCH).log_prob(BATCH["labels"]))(draws)
    torch.testing.assert_close(densities, torch.stack([likelihood.log_prob(f, {}, BATCH) for f in draws]))


def test_logits_are_float32():
    """Law: half-precision outputs become float32 natural parameters."""
    out = Categorical(3).logits(SimpleNamespace(logits=LOGITS.bfloat16()), BATCH)
    assert out.dtype == torch.float32 and out.shape == (5, 3)


def test_one_class_is_refused():
    """Law: fewer than two classes is an error that points to Normal."""
    with pytest.raises(ValueError, match=r"at least 2 classes, not 1.*Normal"):
        Categorical(1)
