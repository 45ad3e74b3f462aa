"""Every guide against a posterior that is known exactly: a linear base model with Gaussian noise."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine

from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.inference.randomness import isolated
from tests.programs import LinearGaussian, linear_gaussian

SITE = "lora.linear.A"


def optimise(truth: LinearGaussian, guide: MeanField | MAP, steps: int = 1500, temperature: float = 1.0) -> None:
    """Adam with a decaying rate on the full-batch objective; B stays at its known value."""
    guide.bind(truth.program)
    guide.points["lora/linear/B"].requires_grad_(False)
    parameters = [p for p in guide.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=1e-4)
    loss = TemperedELBO(temperature)
    for _ in range(steps):
        optimiser.zero_grad()
        loss.differentiable_loss(truth.program, guide, truth.batch).backward()
        optimiser.step()
        schedule.step()


def set_to(guide: MeanField, mean: torch.Tensor, variance: torch.Tensor) -> None:
    shape = guide.loc["lora/linear/A"].shape
    guide.loc["lora/linear/A"].data = mean.reshape(shape)
    guide.log_scale["lora/linear/A"].data = (0.5 * variance.log()).reshape(shape)


def elbo(truth: LinearGaussian, guide: MeanField, particles: int) -> tuple[float, float]:
    """Mean and standard error of ELBO estimates."""
    with torch.no_grad(), isolated(3):
        loss = TemperedELBO()
        draws = torch.stack([-loss.differentiable_loss(truth.program, guide, truth.batch) for _ in range(particles)])
    return float(draws.mean()), float(draws.std() / math.sqrt(particles))


def test_mean_field_equals_the_exact_diagonal_posterior() -> None:
    """Law: where the family contains the posterior, log p(y, θ) − log q(θ) is the log evidence for every draw."""
    truth = linear_gaussian(rank=1, outputs=1, orthogonal=True)
    guide = MeanField(random="*.A", init_scale=0.1)
    guide.bind(truth.program)
    set_to(guide, truth.mean, truth.covariance.diagonal())
    with isolated(0):
        for _ in range(5):
            q = poutine.trace(guide).get_trace(truth.batch)
            p = poutine.trace(poutine.replay(truth.program, trace=q)).get_trace(truth.batch)
            assert (p.log_prob_sum() - q.log_prob_sum()).item() == pytest.approx(truth.log_evidence, abs=2e-4)


def test_mean_field_fit_reaches_the_log_evidence() -> None:
    """Law: maximising the ELBO finds the exact posterior where the family contains it."""
    truth = linear_gaussian(rank=1, outputs=1, orthogonal=True)
    guide = MeanField(random="*.A", init_scale=0.1)
    optimise(truth, guide)
    mean, scale = guide.loc["lora/linear/A"].flatten(), guide.log_scale["lora/linear/A"].exp().flatten()
    exact = truth.covariance.diagonal().sqrt()
    assert torch.allclose(scale, exact, rtol=0.06)
    assert ((mean - truth.mean).abs() / exact).max() < 0.15
    value, error = elbo(truth, guide, 400)
    assert value <= truth.log_evidence + 4 * error
    assert value == pytest.approx(truth.log_evidence, abs=0.05 + 4 * error)


def test_mean_field_has_the_reverse_kl_variances() -> None:
    """Law: the optimal factorised Gaussian has the exact mean and variances 1/Λ_ii, below the exact marginals."""
    truth = linear_gaussian()
    guide = MeanField(random="*.A", init_scale=0.1)
    optimise(truth, guide, steps=2500)
    expected = torch.linalg.inv(truth.covariance).diagonal().rsqrt()
    scale = guide.log_scale["lora/linear/A"].exp().flatten()
    assert torch.allclose(scale, expected, rtol=0.08)
    assert (scale < truth.covariance.diagonal().sqrt() * 1.02).all()
    assert ((guide.loc["lora/linear/A"].flatten() - truth.mean).abs() / expected).max() < 0.3


def test_elbo_never_exceeds_the_log_evidence() -> None:
    """Law: ELBO ≤ log evidence, strictly so by KL(q ‖ posterior) for a factorised q on a correlated posterior."""
    truth = linear_gaussian()
    guide = MeanField(random="*.A", init_scale=0.1)
    guide.bind(truth.program)
    precision = torch.linalg.inv(truth.covariance)
    set_to(guide, truth.mean, 1 / precision.diagonal())
    value, error = elbo(truth, guide, 2000)
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.1
    assert value == pytest.approx(truth.log_evidence - float(gap), abs=4 * error)


def test_map_is_the_exact_mode() -> None:
    """Law: MAP under a Gaussian prior and likelihood is the posterior mean."""
    truth = linear_gaussian()
    guide = MAP()
    optimise(truth, guide)
    assert torch.allclose(guide.points["lora/linear/A"].flatten(), truth.mean, atol=2e-3)


def test_temperature_scales_the_posterior_precision_of_the_data() -> None:
    """Law: at β the optimal Gaussian has variances 1/(ΦᵀΦ/(β σ²) + 1/τ²)_ii."""
    truth = linear_gaussian(rank=1, outputs=1, orthogonal=True)
    beta = 0.25
    guide = MeanField(random="*.A", init_scale=0.1)
    optimise(truth, guide, temperature=beta)
    precision = truth.design.T @ truth.design / truth.noise**2 / beta + torch.eye(4) / truth.prior_scale**2
    assert torch.allclose(guide.log_scale["lora/linear/A"].exp().flatten(), precision.diagonal().rsqrt(), rtol=0.06)


def test_example_noise_has_the_same_expectation() -> None:
    """Law: noise drawn for each example has the same expected objective."""
    truth = linear_gaussian()
    values = {}
    for noise in ("weight", "example"):
        guide = MeanField(random="*.A", noise=noise)
        guide.bind(truth.program)
        guide.train()
        set_to(guide, truth.mean, truth.covariance.diagonal())
        with guide.hooks(truth.program):
            values[noise] = elbo(truth, guide, 1500)
    assert values["weight"][0] == pytest.approx(
        values["example"][0], abs=4 * (values["weight"][1] + values["example"][1])
    )
