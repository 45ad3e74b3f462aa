"""PSIS: k̂ of known tails, leave-one-out against exact refits of a linear-Gaussian program, comparison, verdicts."""

from __future__ import annotations

import math

import arviz_stats
import numpy as np
import pytest
import torch
from arviz_base import from_dict
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyrolora.diagnostics.psis import CORRECTABLE, compare_loo, good_k, guide_khat, judge_khat, judge_loo, loo
from tests.programs import LinearGaussian, linear_gaussian

ROWS = 40


def residuals(truth: LinearGaussian) -> tuple[Tensor, Tensor]:
    """``Φ``, ``(rows, outputs, numbers)``, and ``y − W0 x``, ``(rows, outputs)``."""
    weight = truth.program.model.base_model.model.linear.base_layer.weight
    left = truth.batch["labels"] - truth.batch["x"] @ weight.T
    return truth.design.reshape(*left.shape, -1), left.detach()


def refit(truth: LinearGaussian, beta: float, without: int | None = None) -> MultivariateNormal:
    """The exact posterior ``∝ Π p(y_n|θ)^{1/β} p(θ)`` of all rows but one."""
    design, left = residuals(truth)
    keep = [n for n in range(ROWS) if n != without]
    noise = beta * truth.noise**2
    precision = torch.einsum("noi,noj->ij", design[keep], design[keep]) / noise
    precision += torch.eye(len(precision)) / truth.prior_scale**2
    covariance = torch.linalg.inv(precision)
    return MultivariateNormal(covariance @ torch.einsum("noi,no->i", design[keep], left[keep]) / noise, covariance)


def exact_loo(truth: LinearGaussian, beta: float) -> np.ndarray:
    """``log p(y_n | y_{−n})`` by a refit for each row, ``(rows,)``."""
    design, left = residuals(truth)
    found = []
    for n in range(ROWS):
        rest = refit(truth, beta, without=n)
        spread = design[n] @ rest.covariance_matrix @ design[n].T + truth.noise**2 * torch.eye(left.shape[1])
        found.append(MultivariateNormal(design[n] @ rest.mean, spread).log_prob(left[n]).item())
    return np.array(found)


def drawn(truth: LinearGaussian, beta: float, guide: MultivariateNormal, size: int) -> tuple[np.ndarray, np.ndarray]:
    """log p(y_n|θ_s), ``(S, rows)``, and ``log π(θ_s) − log q(θ_s)``, of draws of a guide."""
    design, left = residuals(truth)
    theta = guide.sample((size,))
    rows = Normal(torch.einsum("noi,si->sno", design, theta), truth.noise).log_prob(left).sum(-1).double()
    prior = Normal(0.0, truth.prior_scale).log_prob(theta).sum(-1).double()
    return rows.numpy(), (rows.sum(1) / beta + prior - guide.log_prob(theta).double()).numpy()


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_loo_of_the_exact_posterior(beta: float) -> None:
    """Law: where k̂ can be trusted, elpd is that of exact refits without each row, at the temperature of the fit; in
    all it is closer to them than to the training score; weights of an exact guide leave it as it is."""
    truth = linear_gaussian(size=ROWS)
    exact = exact_loo(truth, beta)
    rows, weights = drawn(truth, beta, refit(truth, beta), 4000)
    assert np.ptp(weights) < 1e-2
    result, corrected = loo(rows, temperature=beta), loo(rows, temperature=beta, log_weights=weights)
    in_sample = np.logaddexp.reduce(rows, 0).sum() - ROWS * math.log(len(rows))
    assert in_sample - exact.sum() > 9
    assert result.elpd == pytest.approx(exact.sum(), abs=0.15 if beta == 1 else 1.0)
    assert corrected.elpd == pytest.approx(result.elpd, abs=1e-2)
    away, trusted = result.elpd_i.values - exact, result.pareto_k.values < result.good_k
    assert trusted.mean() > 0.9
    assert abs(away[trusted].sum()) < 0.25 and np.abs(away[trusted]).max() < 0.12
    assert result.se == pytest.approx(math.sqrt(ROWS * result.elpd_i.values.var()), rel=1e-6)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_weights_correct_the_guide(beta: float) -> None:
    """Law: with the weights of a guide that is off (mean and width) LOO is that of exact refits; without, it is not."""
    truth = linear_gaussian(size=ROWS)
    exact, posterior = exact_loo(truth, beta).sum(), refit(truth, beta)
    moved = posterior.mean + 0.5 * posterior.covariance_matrix.diagonal().sqrt()
    rows, weights = drawn(truth, beta, MultivariateNormal(moved, 1.5 * posterior.covariance_matrix), 8000)
    assert guide_khat(weights) < CORRECTABLE
    assert loo(rows, temperature=beta, log_weights=weights).elpd == pytest.approx(exact, abs=0.4)
    assert abs(loo(rows, temperature=beta).elpd - exact) > 2


def test_arviz_agrees_at_temperature_one() -> None:
    """Law: at β = 1 it is ArviZ's loo, and with weights its loo_approximate_posterior."""
    truth = linear_gaussian(size=ROWS)
    rows, weights = drawn(truth, 1.0, refit(truth, 1.0), 400)
    weights = weights + np.random.default_rng(0).normal(0, 0.5, len(weights))
    tree = from_dict({"log_likelihood": {"y": rows[None]}})
    zeros = np.zeros((1, len(weights)))
    theirs = arviz_stats.loo_approximate_posterior(tree, log_p=weights[None], log_q=zeros, pointwise=True)
    ours = loo(rows, log_weights=weights)
    assert ours.elpd == pytest.approx(theirs.elpd, abs=1e-9) and ours.se == pytest.approx(theirs.se, abs=1e-9)
    assert np.allclose(ours.pareto_k.values, theirs.pareto_k.values)
    assert loo(rows).elpd == pytest.approx(arviz_stats.loo(tree, reff=1.0).elpd, abs=1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_khat_of_a_known_tail(shape: float) -> None:
    """Law: weights U^{−k} have a Pareto tail of shape k."""
    uniform = np.random.default_rng(0).uniform(size=20_000)
    assert guide_khat(-shape * np.log(uniform)) == pytest.approx(shape, abs=0.08)


def test_constant_weights() -> None:
    """Law: a guide that is the posterior has k̂ = −∞; rows whose largest ratios are equal keep plain weights."""
    assert guide_khat(np.full(100, 3.0)) == -math.inf
    rows = np.zeros((100, 2))
    rows[:50, 1] = -1.0
    result = loo(rows)
    ratio = np.exp(-rows[:, 1])
    expected = math.log((ratio * np.exp(rows[:, 1])).sum() / ratio.sum())
    assert result.elpd_i.values == pytest.approx([0.0, expected]) and (result.pareto_k.values == -np.inf).all()


def test_good_k() -> None:
    """Law: min(1 − 1/log₁₀ S, 0.7)."""
    assert good_k(100) == pytest.approx(0.5) and good_k(10**6) == 0.7


def test_refusals() -> None:
    """Law: fewer than 25 draws, and densities that are not finite, are refused with the reason."""
    with pytest.raises(ValueError, match="at least 25"):
        guide_khat(np.arange(24.0))
    with pytest.raises(ValueError, match="labels known"):
        loo(np.full((30, 3), np.nan))


def test_comparison() -> None:
    """Law: the better model first, its difference and standard error those of the pointwise values."""
    generator = np.random.default_rng(0)
    good = -0.5 + 0.1 * generator.normal(size=(200, 30))
    poor = good - np.linspace(0.0, 0.4, 30)
    results = {"poor": loo(poor), "good": loo(good)}
    table = compare_loo(results)
    assert table.index.tolist() == ["good", "poor"]
    away = results["good"].elpd_i.values - results["poor"].elpd_i.values
    assert abs(table.loc["poor", "elpd_diff"]) == pytest.approx(away.sum(), rel=1e-6)
    assert table.loc["poor", "dse"] == pytest.approx(math.sqrt(30 * away.var()), rel=1e-6)
    with pytest.raises(ValueError, match="different rows"):
        compare_loo({"a": results["poor"], "b": loo(good[:, :20])})
    with pytest.raises(ValueError, match="at least two"):
        compare_loo({"a": results["poor"]})


def test_judgement_of_khat() -> None:
    """Law: a small k̂ is fine; a large one says what is compared, and in thousands of dimensions that it is expected."""
    assert judge_khat(0.4, 1000, 10).level == "fine"
    large = judge_khat(2.0, 1000, 37_000, temperature=0.05)
    assert large.level == "look" and "p(y|θ)^(1/0.05) p(θ)" in large.words
    assert "37,000 random numbers" in large.words and "does not say that predictions are bad" in large.words
    assert "what to expect" not in judge_khat(2.0, 1000, 10).words
    assert "uncertain" in judge_khat(0.9, 99, 10).advice and "uncertain" not in judge_khat(0.9, 100, 10).advice
    assert "lora.query.A alone" in judge_khat(2.0, 1000, 10, sites=["lora.query.A"]).words


def test_judgement_of_loo() -> None:
    """Law: rows over the threshold make it bad, held-out rows that are clearly worse make it optimistic."""
    generator = np.random.default_rng(0)
    quiet = loo(-0.5 + 0.05 * generator.normal(size=(400, 50)))
    fine = judge_loo(quiet, held_out=np.full(50, -0.51) + 0.1 * generator.normal(size=50))
    assert fine.level == "fine" and not fine.advice and fine.numbers["khat_over"] == 0
    worse = judge_loo(quiet, held_out=np.full(50, -0.9) + 0.1 * generator.normal(size=50))
    assert worse.level == "look" and "optimistic" in worse.words
    loud = judge_loo(loo(generator.normal(size=(400, 50)), temperature=0.05), temperature=0.05)
    assert loud.level == "bad" and "every row counts 20 times" in loud.advice
