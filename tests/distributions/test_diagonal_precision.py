"""A Normal with a diagonal precision, against torch's own Normal and dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.inference.randomness import isolated


def law(precision: float | torch.Tensor = 2.0) -> DiagonalPrecisionNormal:
    with isolated(0):
        return DiagonalPrecisionNormal(torch.randn(3, 2, 4), 5 * torch.rand(3, 2, 4), precision=precision)


def plain(q: DiagonalPrecisionNormal) -> Independent:
    return Independent(Normal(q.loc, (q.precision[..., None, None] + q.curvature).rsqrt()), 2)


def test_is_a_normal() -> None:
    """Law: density, entropy, moments and KL are those of independent Normals."""
    q = law(torch.tensor([0.5, 1.0, 3.0]))
    value = torch.ones(3, 2, 4)
    assert torch.allclose(q.log_prob(value), plain(q).log_prob(value), rtol=1e-5)
    assert torch.allclose(q.entropy(), plain(q).entropy(), rtol=1e-5)
    assert torch.allclose(q.variance, plain(q).variance) and torch.equal(q.mean, q.loc)
    prior = Independent(Normal(torch.zeros(3, 2, 4), 0.7), 2)
    assert torch.allclose(kl_divergence(q, prior), kl_divergence(plain(q), prior), rtol=1e-4)


def test_draws_have_its_moments() -> None:
    """Law: mean and variance of draws."""
    q = law()
    with isolated(1):
        draws = q.rsample((20_000,))
    assert torch.allclose(draws.mean(0), q.mean, atol=0.03)
    assert torch.allclose(draws.var(0), q.variance, rtol=0.06)


def test_what_the_evidence_needs() -> None:
    """Law: log|P/λ| and γ by hand, and the same under another λ."""
    q = law().with_precision(4.0)
    assert torch.allclose(q.log_det_ratio(), (1 + q.curvature / 4).log().sum((-2, -1)), rtol=1e-5)
    assert torch.allclose(q.effective_dimension(), (q.curvature / (q.curvature + 4)).sum((-2, -1)), rtol=1e-5)
    assert torch.allclose(q.log_det_precision(), (4 + q.curvature).log().sum((-2, -1)), rtol=1e-5)


def test_covariance_of_outputs() -> None:
    """Law: J P⁻¹ Jᵀ with P made explicit, batch entry by batch entry."""
    q = law()
    with isolated(2):
        jacobian = torch.randn(3, 5, 2, 2, 4)
    found = q.covariance_of(jacobian)
    for layer in range(3):
        precision = torch.diag((2 + q.curvature[layer]).flatten())
        flat = jacobian[layer].flatten(-2)
        assert torch.allclose(found[layer], flat @ torch.linalg.inv(precision) @ flat.mT, rtol=1e-4, atol=1e-5)


def test_wrong_shapes() -> None:
    """Law: a curvature of another shape is refused."""
    with pytest.raises(ValueError, match=r"curvature has shape \(3, 4, 2\); loc has \(3, 2, 4\)"):
        DiagonalPrecisionNormal(torch.zeros(3, 2, 4), torch.ones(3, 4, 2), precision=1.0)
