"""Distances between predictives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pyrolora.diagnostics.distance import distance, distances
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.prediction import Prediction, PredictionBuilder
from tests.programs import sentence_task, untrained


def predicted(logits: torch.Tensor) -> Prediction:
    builder = PredictionBuilder(logits.shape[1], logits.shape[0])
    builder.add(logits.log_softmax(-1))
    return builder.build(torch.arange(logits.shape[1]), {})


def test_by_hand() -> None:
    """Law: TV, and root mean squares of differences of means and variances of centred logits, worked by hand."""
    f = torch.tensor([[[2.0, 0.0]], [[4.0, 0.0]]])  # two draws, one input: centred ±1 and ±2
    g = torch.tensor([[[0.0, 0.0]]])
    found = distance(predicted(f), predicted(g))
    p = (1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(-4))) / 2
    assert found.total_variation == pytest.approx(p - 0.5, abs=1e-6)
    assert found.logit_mean == pytest.approx(1.5, abs=1e-6)
    assert found.logit_variance == pytest.approx(0.25, abs=1e-6)
    assert (found.variance, found.reference_variance) == (pytest.approx(0.25), 0.0)


def test_is_blind_to_a_shift_of_all_logits() -> None:
    """Law: what the softmax does not see is no distance, and of equal predictions there is none."""
    f = torch.randn(5, 7, 3)
    found = distance(predicted(f + torch.randn(5, 7, 1)), predicted(f))
    assert max(found.total_variation, found.logit_mean, found.logit_variance) < 1e-6


def test_total_variation_is_at_most_one() -> None:
    """Law: certain and opposite predictions are at distance 1."""
    f = torch.tensor([[[60.0, -60.0]]])
    assert distance(predicted(f), predicted(-f)).total_variation == pytest.approx(1.0)


def test_a_table_of_posteriors() -> None:
    """Law: one row for each, zero for the truth itself, all of whose points are used."""
    truth = untrained(Ensemble(MAP(), 3))
    table = distances({"itself": truth, "field": untrained(MeanField())}, truth, sentence_task().test, num_draws=1)
    assert table.loc["itself", "total_variation"] == table.loc["itself", "logit_variance"] == 0
    assert table.loc["field", "logit_mean"] > 0


def test_refuses_predictions_that_cannot_be_compared() -> None:
    """Law: other inputs, and draws that were not kept, are errors."""
    with pytest.raises(ValueError, match="different inputs"):
        distance(predicted(torch.zeros(1, 2, 2)), predicted(torch.zeros(1, 3, 2)))
    bare = dataclasses.replace(predicted(torch.zeros(1, 2, 2)), draws=None)
    with pytest.raises(ValueError, match="too many to be kept"):
        distance(bare, bare)
