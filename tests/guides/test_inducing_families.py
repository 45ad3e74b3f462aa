"""Families of whitened inducing matrices: moments, divergences, and flows that start as the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.guides.inducing_families import Diagonal, Ensemble, Family, Flow, Full, Matrix
from pyrolora.inference.randomness import isolated

START = torch.arange(12.0).reshape(2, 3, 2) / 10
GAUSSIAN = [Diagonal, Matrix, Full]


def moved(kind: type[Family], by: float = 0.2) -> Family:
    with isolated(0):
        family = kind(START, 0.5)
        with torch.no_grad():
            for parameter in family.parameters():
                parameter.add_(by * torch.randn_like(parameter))
    return family


def draws(family: Family, size: int = 60_000) -> Tensor:
    with torch.no_grad(), isolated(1):
        return family.distribution().sample(torch.Size((size,)))


def members(family: Family, size: int = 5_000) -> Tensor:
    """Draws of a family whose distribution is another one each time."""
    with torch.no_grad(), isolated(1):
        return torch.stack([family.distribution().sample() for _ in range(size)])


@pytest.mark.parametrize("kind", [*GAUSSIAN, Flow, Ensemble])
def test_starts_where_it_is_told(kind: type[Family]) -> None:
    """Law: the mean at the start is the given one, exactly."""
    with isolated(0):
        assert torch.allclose(kind(START, 0.1).mean(), START, atol=1e-6)


@pytest.mark.parametrize("kind", [*GAUSSIAN, Flow])
def test_starts_as_wide_as_it_is_told(kind: type[Family]) -> None:
    """Law: every entry starts with standard deviation ``scale``, independent of the others."""
    flat = draws(kind(START, 0.1)).flatten(-2)
    assert torch.allclose(flat.std(0), torch.full_like(flat[0], 0.1), rtol=0.03)
    assert torch.corrcoef(flat[:, 0].T).fill_diagonal_(0).abs().max() < 0.02


@pytest.mark.parametrize("kind", [*GAUSSIAN, Flow])
def test_mean_is_that_of_its_draws(kind: type[Family]) -> None:
    """Law: ``mean`` is E[V]; a flow's is an estimate from 256 draws."""
    family = moved(kind)
    assert torch.allclose(family.mean(), draws(family).mean(0), atol=0.08 if kind is Flow else 0.02)


@pytest.mark.parametrize("kind", [*GAUSSIAN, Flow, Ensemble])
def test_variance_is_that_of_its_draws(kind: type[Family]) -> None:
    """Law: ``variance`` is that of each entry; a flow's is an estimate from 256 draws."""
    family = moved(kind)
    found, expected = family.variance(), draws(family).var(0) if kind is not Ensemble else members(family).var(0)
    assert torch.allclose(found, expected, rtol={Flow: 0.25, Ensemble: 0.06}.get(kind, 0.03))


@pytest.mark.parametrize("kind", [*GAUSSIAN, Flow, Ensemble])
def test_divergence_is_the_mean_log_ratio(kind: type[Family]) -> None:
    """Law: ``divergence`` is E[log q(V) − log p(V)], of an ensemble E_k[−log p(V_k)]; a flow's is an estimate."""
    family = moved(kind)
    if isinstance(family, Ensemble):
        expected = -family.prior().log_prob(members(family)).mean(0)
    else:
        value = draws(family)
        expected = (family.distribution().log_prob(value) - family.prior().log_prob(value)).mean(0)
    assert torch.allclose(family.divergence(), expected, rtol=0.1 if kind is Flow else 0.02)


@pytest.mark.parametrize("kind", GAUSSIAN)
def test_divergence_from_the_white_prior(kind: type[Family]) -> None:
    """Law: the closed form that the ELBO uses equals that of dense Normals with the covariance of the draws' law."""
    q = moved(kind).distribution()
    if kind is Diagonal:
        covariance = torch.diag_embed(q.base_dist.scale.square().flatten(-2))
    elif kind is Full:
        covariance = q.flat.covariance_matrix
    else:
        parts = zip(q.row_scale_tril, q.column_scale_tril, strict=True)
        covariance = torch.stack([torch.kron(r @ r.T, c @ c.T) for r, c in parts])
    dense = MultivariateNormal(q.mean.flatten(-2), covariance)
    white = MultivariateNormal(torch.zeros(2, 6), torch.eye(6))
    prior = MatrixNormal(torch.zeros_like(START))
    assert torch.allclose(kl_divergence(q, prior), kl_divergence(dense, white), rtol=1e-4)
    flat = draws(moved(kind)).flatten(-2)
    for layer in range(2):
        assert torch.allclose(torch.cov(flat[:, layer].T), covariance[layer], atol=0.02)


def test_a_flow_at_identity_is_no_flow() -> None:
    """Law (L5): before training, densities and draws are the base's; after moving they are not."""
    flow, base = Flow(START, 0.5, depth=3), Diagonal(START, 0.5)
    value = torch.randn(2, 3, 2)
    assert torch.allclose(flow.distribution().log_prob(value), base.distribution().log_prob(value), atol=1e-5)
    with isolated(3):
        own = flow.distribution().sample()
    with isolated(3):
        assert torch.equal(own, base.distribution().sample())
    assert not torch.allclose(moved(Flow).distribution().log_prob(value), base.distribution().log_prob(value))


def test_a_flows_density_has_its_jacobian() -> None:
    """Law: log q(V) = log q₀(V₀) − log |det ∂V/∂V₀|, the determinant by automatic differentiation."""
    with isolated(0):
        flow = Flow(torch.zeros(1, 2, 3), 0.5, depth=2)
        with torch.no_grad():
            for parameter in flow.nets.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        q = flow.distribution()
        base = q.base_dist.sample()

    def push(flat: Tensor) -> Tensor:
        value = flat.reshape(1, 2, 3)
        for transform in q.transforms:
            value = transform(value)
        return value.flatten()

    jacobian = torch.autograd.functional.jacobian(push, base.flatten())
    expected = q.base_dist.log_prob(base) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(q.log_prob(push(base.flatten()).reshape(1, 2, 3)), expected, atol=1e-4)
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() > 0.1


def test_an_ensemble_has_equal_members() -> None:
    """Law: draws are its members, all of them, equally often; a chosen member is the only one."""
    with isolated(0):
        family = Ensemble(START, 0.5, members=4)
        counts = torch.zeros(4)
        for _ in range(2000):
            value = family.distribution().sample()
            (same,) = (family.members == value).flatten(1).all(1).nonzero()
            counts[same] += 1
        assert counts.sum() == 2000 and (counts - 500).abs().max() < 80
        family.chosen = torch.tensor(2)
        assert torch.equal(family.distribution().sample(), family.members[2])


def test_a_flow_needs_two_columns() -> None:
    """Law: one column has no earlier entries to depend on."""
    with pytest.raises(ValueError, match="at least two inducing columns"):
        Flow(torch.zeros(1, 2, 1), 0.1)
