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


def fisher(likelihood, logits, batch, **options):
    parts = likelihood.fisher_factors(logits, {}, batch, **options)
    return sum(torch.einsum("ni,nj->nij", v.flatten(1), v.flatten(1)) for v in parts)


def test_fisher_factors_of_classes_are_exact():
    """Law: their outer products sum to diag p − p pᵀ, minus the Hessian of the log-likelihood."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    batch = {"labels": torch.tensor([0, 1, 3])}
    hessian = torch.stack(
        [
            torch.autograd.functional.hessian(lambda f, y=y: f.log_softmax(0)[y], f)
            for f, y in zip(logits, batch["labels"], strict=True)
        ]
    )
    torch.testing.assert_close(fisher(Categorical(4), logits, batch), -hessian)


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_fisher_factors_of_classes_are_as_few_as_the_rank(num_classes):
    """Law: K − 1 vectors, finite and exact also where a probability is almost or exactly 0."""
    logits = torch.randn(5, num_classes, generator=torch.Generator().manual_seed(0))
    logits[1, 0], logits[2, -1], logits[3, 0] = 30.0, 30.0, 500.0
    parts = list(Categorical(num_classes).fisher_factors(logits, {}, {}))
    p = logits.double().softmax(-1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    found = sum(torch.einsum("ni,nj->nij", v.double(), v.double()) for v in parts)
    assert len(parts) == num_classes - 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-12)


def test_fisher_factors_by_monte_carlo_are_unbiased():
    """Law: above the limit one score at a drawn label, whose outer product has the exact Fisher information as mean."""
    logits = torch.tensor([[0.5, -0.5, 1.0]]).expand(30_000, 3)
    batch = {"labels": torch.zeros(30_000, dtype=torch.long)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = fisher(Categorical(3), logits, batch, exact_up_to=2).mean(0)
    torch.testing.assert_close(drawn, fisher(Categorical(3), logits[:1], batch)[0], atol=0.01, rtol=0)


def test_fisher_factors_of_a_normal_are_its_precision():
    """Law: I / scale², for one output and for several, exactly."""
    likelihood = Normal(scale=0.5)
    one = sum(v * v for v in likelihood.fisher_factors(torch.zeros(3), {}, {}))
    torch.testing.assert_close(one, torch.full((3,), 4.0))
    torch.testing.assert_close(fisher(likelihood, torch.zeros(3, 2), {}), 4 * torch.eye(2).expand(3, 2, 2))
