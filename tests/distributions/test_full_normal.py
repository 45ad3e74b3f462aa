"""The Normal over all entries of a matrix against torch's multivariate Normal."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.distributions.full_normal import FullMatrixNormal
from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.inference.randomness import isolated


@pytest.fixture
def q() -> FullMatrixNormal:
    with isolated(0):
        lower = torch.randn(5, 6, 6).tril(-1) * 0.3 + torch.diag_embed(torch.rand(5, 6) + 0.2)
        return FullMatrixNormal(torch.randn(5, 2, 3), lower)


def explicit(q: FullMatrixNormal) -> MultivariateNormal:
    return MultivariateNormal(q.loc.flatten(-2), scale_tril=q.flat.scale_tril)


def test_density_and_moments(q: FullMatrixNormal) -> None:
    """Law: density, mean and variance are those of the vector that reads the matrix row by row."""
    with isolated(1):
        value = q.rsample(torch.Size((4,)))
        many = q.rsample(torch.Size((40_000,)))
    assert value.shape == (4, 5, 2, 3)
    assert torch.allclose(q.log_prob(value), explicit(q).log_prob(value.flatten(-2)))
    assert torch.allclose(many.mean(0), q.mean, atol=0.03)
    assert torch.allclose(many.var(0), q.variance, rtol=0.05)


def test_divergence_from_white_noise(q: FullMatrixNormal) -> None:
    """Law: the closed form equals that of the dense Normals; other priors have none."""
    p = MatrixNormal(torch.randn(2, 3))
    dense = MultivariateNormal(p.loc.flatten().expand(5, 6), torch.eye(6))
    assert torch.allclose(kl_divergence(q, p), kl_divergence(explicit(q), dense), atol=1e-4)
    with pytest.raises(NotImplementedError, match="identity"):
        kl_divergence(q, MatrixNormal(torch.zeros(2, 3), torch.eye(2)))


def test_expands_and_checks(q: FullMatrixNormal) -> None:
    """Law: a batch may be broadcast; a factor of another size is refused with the size that fits."""
    assert q.expand((7, 5)).rsample().shape == (7, 5, 2, 3)
    with pytest.raises(ValueError, match="a 2 × 3 matrix needs 6 × 6"):
        FullMatrixNormal(torch.zeros(2, 3), torch.eye(5))
