from __future__ import annotations

import pytest
import torch

from pyrolora.priors.base import PriorError
from pyrolora.priors.matrix_normal import MatrixNormal
from pyrolora.priors.normal import Normal

RHO, SCALE = 0.6, 0.3


def exchangeable(rank: int) -> torch.Tensor:
    return torch.full((rank, rank), RHO) + (1 - RHO) * torch.eye(rank)


@pytest.mark.parametrize(("shape", "rank_dim"), [(("A", 20_000, 3, 2), 1), (("B", 20_000, 2, 3), 2)])
def test_ranks_are_correlated_and_features_are_not(group, shape, rank_dim):
    """Law: the empirical covariance is scale² K between ranks (A's rows, B's columns) and scale² I between features."""
    site = group(*shape)
    torch.manual_seed(0)
    draws = MatrixNormal(SCALE, RHO)(site).sample()
    by_rank = draws.mT if rank_dim == 1 else draws  # (layers, feature, rank)
    covariance = by_rank.flatten(1).T.cov()  # features outer, ranks inner
    true = SCALE**2 * torch.kron(torch.eye(2), exchangeable(3))
    error = SCALE**2 * (2 / 20_000) ** 0.5
    assert bool(((covariance - true).abs() < 5 * error).all())


@pytest.mark.parametrize("shape", [("A", 2, 3, 5), ("B", 2, 5, 3)])
def test_density_of_features_is_multivariate_normal(group, shape):
    """Law: each feature's vector over ranks is N(0, scale² K), independently; a matrix K may be given itself."""
    site = group(*shape)
    value = torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
    vectors = value.mT if site.role == "A" else value
    true = torch.distributions.MultivariateNormal(torch.zeros(3), SCALE**2 * exchangeable(3)).log_prob(vectors).sum(-1)
    torch.testing.assert_close(MatrixNormal(SCALE, RHO)(site).log_prob(value), true)
    torch.testing.assert_close(MatrixNormal(SCALE, exchangeable(3).tolist())(site).log_prob(value), true)


def test_without_correlation_it_is_the_normal_prior(group):
    """Law: ρ = 0 is the independent Normal prior of the same scale."""
    site = group("A", 2, 3, 5)
    value = torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(MatrixNormal(SCALE)(site).log_prob(value), Normal(SCALE)(site).log_prob(value))


@pytest.mark.parametrize("correlation", [-0.499, 0.999])
def test_the_whole_valid_range_serves(group, correlation):
    """Law: every −1/(r−1) < ρ < 1 is a covariance (r = 3: from −½), and draws score finitely."""
    fn = MatrixNormal(SCALE, correlation)(group("A", 2, 3, 5))
    assert bool(fn.log_prob(fn.sample()).isfinite().all())


@pytest.mark.parametrize("correlation", [-0.51, 1.0, 1.5, float("nan"), [[1.0, 2.0, 0.0]] * 3])
def test_what_is_no_covariance_is_refused(group, correlation):
    """Law: ρ outside its range, or a matrix that is not symmetric positive definite, is an error naming the site."""
    with pytest.raises(PriorError, match=r"'lora\.query\.A'.*not symmetric positive definite"):
        MatrixNormal(SCALE, correlation)(group("A", 2, 3, 5))


def test_an_asymmetric_matrix_is_refused(group):
    """Law: a matrix whose lower triangle alone would pass for a covariance is refused, not read by half."""
    asymmetric = [[1.0, 0.9, 0.0], [0.1, 1.0, 0.0], [0.0, 0.0, 1.0]]
    with pytest.raises(PriorError, match="not symmetric"):
        MatrixNormal(SCALE, asymmetric)(group("A", 2, 3, 5))


def test_sites_that_it_cannot_serve(group):
    """Law: a head has no ranks, and a matrix of another size does not fit: both errors name the site."""
    with pytest.raises(PriorError, match=r"'head\.classifier\.weight' has no rank dimension"):
        MatrixNormal(SCALE)(group("head", 1, 4, 6))
    with pytest.raises(PriorError, match=r"'lora\.query\.A'.*\(2, 2\), the rank is 3"):
        MatrixNormal(SCALE, [[1.0, 0.0], [0.0, 1.0]])(group("A", 2, 3, 5))
    with pytest.raises(PriorError, match=r"scale is a positive number"):
        MatrixNormal(0.0)
