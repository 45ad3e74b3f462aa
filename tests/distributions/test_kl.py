from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import pyrolora.distributions.kl  # noqa: F401 - registers what is under test
from pyrolora.distributions.centred import Centred
from pyrolora.distributions.matrix_normal import MatrixNormal

ROWS, COLUMNS = 3, 2
SIDES = [(True, True), (True, False), (False, True), (False, False)]


def array(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def factor(size: int, *batch: int, seed: int) -> Tensor:
    noise = array(*batch, size, size, seed=seed)
    return torch.linalg.cholesky(noise @ noise.mT + 0.5 * torch.eye(size, dtype=torch.float64))


def matrix_normal(sides: tuple[bool, bool], *batch: int, seed: int) -> MatrixNormal:
    row = factor(ROWS, *batch, seed=seed) if sides[0] else None
    column = factor(COLUMNS, *batch, seed=seed + 1) if sides[1] else None
    return MatrixNormal(array(*batch, ROWS, COLUMNS, seed=seed + 2), row, column)


def normal(*batch: int) -> dist.Independent:
    shape = (*batch, ROWS, COLUMNS)
    return dist.Normal(array(*shape, seed=8), array(*shape, seed=9).exp()).to_event(2)


def multivariate(fn: dist.Independent | MatrixNormal) -> MultivariateNormal:
    """The same distribution over vec(X), columns stacked; one matrix, no batch."""
    if isinstance(fn, dist.Independent):
        return MultivariateNormal(fn.mean.mT.flatten(), torch.diag(fn.variance.mT.flatten()))
    row, column = (
        torch.eye(size, dtype=torch.float64) if f is None else f @ f.mT
        for f, size in ((fn.row_scale_tril, ROWS), (fn.column_scale_tril, COLUMNS))
    )
    return MultivariateNormal(fn.loc.mT.flatten(), torch.kron(column, row))


@pytest.mark.parametrize("sides", SIDES)
def test_normal_from_matrix_normal(sides):
    """Law: KL(Normal ‖ MatrixNormal) is the multivariate Normals' closed form."""
    q, p = normal(), matrix_normal(sides, seed=10)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(multivariate(q), multivariate(p)))


@pytest.mark.parametrize("q_sides", SIDES)
@pytest.mark.parametrize("p_sides", SIDES)
def test_matrix_normal_from_matrix_normal(q_sides, p_sides):
    """Law: KL(MatrixNormal ‖ MatrixNormal) is the multivariate Normals' closed form, and 0 of itself."""
    q, p = matrix_normal(q_sides, seed=20), matrix_normal(p_sides, seed=30)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(multivariate(q), multivariate(p)))
    torch.testing.assert_close(kl_divergence(q, q), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("q", [normal(), matrix_normal((True, True), seed=20)], ids=["normal", "matrix normal"])
def test_closed_form_is_the_monte_carlo_mean(q):
    """Law: the closed form is E_q[log q − log p] within five Monte Carlo errors."""
    p = matrix_normal((True, True), seed=30)
    torch.manual_seed(0)
    draws = q.rsample(torch.Size([40_000]))
    terms = q.log_prob(draws) - p.log_prob(draws)
    assert abs(terms.mean() - kl_divergence(q, p)) < 5 * terms.std() / 200


@pytest.mark.parametrize("sides", SIDES)
def test_layers_are_scored_one_by_one(sides):
    """Law: over a batch of layers the KL is each layer's own, also where the prior is one for all."""
    q, p, shared = normal(4), matrix_normal(sides, 4, seed=40), matrix_normal(sides, seed=50)
    each = [dist.Normal(q.mean[i], q.stddev[i]).to_event(2) for i in range(4)]
    for prior in (p, shared, shared.expand([4])):
        rows = []
        for i in range(4):
            batched = prior.loc.dim() == 3
            parts = [
                f[i] if f is not None and f.dim() == 3 else f for f in (prior.row_scale_tril, prior.column_scale_tril)
            ]
            rows.append(kl_divergence(each[i], MatrixNormal(prior.loc[i] if batched else prior.loc, *parts)))
        torch.testing.assert_close(kl_divergence(q, prior), torch.stack(rows))
    q_matrix = matrix_normal((True, True), 4, seed=60)
    assert kl_divergence(q_matrix, p).shape == kl_divergence(q_matrix, shared).shape == (4,)


def test_scaled_identity_prior_is_the_elementwise_normal_prior():
    """Law: from MN(0, s² I, I) the KL is the elementwise Normals'."""
    q = normal()
    p = MatrixNormal(torch.zeros(ROWS, COLUMNS).double(), 0.3 * torch.eye(ROWS, dtype=torch.float64))
    elementwise = dist.Normal(torch.zeros(()).double(), 0.3).expand([ROWS, COLUMNS]).to_event(2)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(q, elementwise))


def test_point_and_centred_guides():
    """Law: KL(Delta ‖ p) = −log p(value), and a centred Normal's KL is the Normal's."""
    p, q = matrix_normal((True, True), 4, seed=40), normal(4)
    torch.testing.assert_close(kl_divergence(dist.Delta(q.mean, event_dim=2), p), -p.log_prob(q.mean))
    torch.testing.assert_close(kl_divergence(Centred(q.mean, q.stddev).to_event(2), p), kl_divergence(q, p))


def test_other_families_are_left_to_sampling():
    """Law: no closed form is claimed for what is not an elementwise Normal over matrices."""
    p = matrix_normal((True, True), 4, seed=40)
    laplace = dist.Laplace(torch.zeros(4, ROWS, COLUMNS).double(), 1.0).to_event(2)
    for q in (laplace, dist.Normal(torch.zeros(4, ROWS, COLUMNS).double(), 1.0).to_event(1)):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, p)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("row", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("column", [1e-8, 1.0, 1e8])
def test_extreme_scales(scale, row, column):
    """Law: float32 agrees with float64, and is finite, wherever the KL itself is a float32 number."""
    q, p = normal(), matrix_normal((True, True), seed=70)
    for elementwise in (True, False):
        values = []
        for dtype in (torch.float32, torch.float64):
            loc, left, right = (t.to(dtype) for t in (p.loc, row * p.row_scale_tril, column * p.column_scale_tril))
            if elementwise:
                guide = dist.Normal(q.mean.to(dtype), (scale * q.stddev).to(dtype)).to_event(2)
            else:
                guide = MatrixNormal(q.mean.to(dtype), (scale * p.row_scale_tril).to(dtype))
            values.append(kl_divergence(guide, MatrixNormal(loc, left, right)).double())
        if values[1] < 1e37:
            torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-3)
