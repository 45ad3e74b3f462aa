from __future__ import annotations

import warnings

import pyro
import pytest
import torch

from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal


def test_forward_inputs_are_the_batch_without_the_observation():
    """Law: the base model sees every tensor of the batch but the labels."""
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1]), "text": ["a", "b"]}
    inputs = Categorical(2).forward_inputs(batch)
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"] is ids


def test_data_site_is_scaled_by_the_plate():
    """Law: observe puts one site in the trace, whose log density is (N/b) Σ_n log p(y_n | f_n)."""
    logits, batch = (
        torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
        {"labels": torch.tensor([0, 2, 1, 1])},
    )
    likelihood = Categorical(3)

    def model():
        with pyro.plate("data", 20, subsample=torch.arange(4)):
            likelihood.observe(logits, {}, batch)

    trace = pyro.poutine.trace(model).get_trace()
    assert trace.nodes["labels"]["is_observed"]
    torch.testing.assert_close(trace.log_prob_sum(), 20 / 4 * likelihood.log_prob(logits, {}, batch).sum())


def test_data_site_is_sampled_where_there_are_no_labels():
    """Law: without labels the data site is a draw from p(y | f)."""
    logits = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])

    def model():
        with pyro.plate("data", 2):
            Categorical(3).observe(logits, {}, {})

    site = pyro.poutine.trace(model).get_trace().nodes["labels"]
    assert not site["is_observed"] and site["value"].tolist() == [0, 2]


def test_unknown_classes_have_no_log_probability():
    """Law: a negative label's log probability is NaN and leaves its neighbours alone."""
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    out = Categorical(2).log_prob(logits, {}, {"labels": torch.tensor([-1, 1])})
    assert out[0].isnan() and out[1].item() == pytest.approx(-0.6931472)


@pytest.mark.parametrize("likelihood", [Categorical(3), AnswerTokens([4, 7, 9])])
def test_probabilities_in_place_of_logits_warn(likelihood: ClassLikelihood):
    """Law: rows that are non-negative and sum to 1 warn of a double softmax; logits do not."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="softmax would be applied twice"):
        likelihood.check_logits(logits.softmax(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        likelihood.check_logits(logits)
        likelihood.check_logits(logits.abs())
        likelihood.check_logits(logits.log_softmax(-1))


@pytest.mark.parametrize("likelihood", [Categorical(2), Normal()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_stop(likelihood, value):
    """Law: NaN or infinite outputs of the first batch are an error for every likelihood."""
    with pytest.raises(ValueError, match="NaN or infinite"):
        likelihood.check_logits(torch.tensor([[0.0, value]]))
