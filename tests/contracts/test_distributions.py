"""Laws that hold for every family over matrices, on generated shapes, values, scales and types."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.distributions.full_normal import FullMatrixNormal
from pyrolora.distributions.inducing import Side
from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.distributions.multipliers import Multipliers

EXPONENTS = st.integers(-8, 8)


@dataclass(frozen=True)
class Numbers:
    """A generated case: L layers of m × n matrices, whose standard deviations are near 10^exponent."""

    seed: int
    layers: int
    rows: int
    columns: int
    exponent: int

    @property
    def scale(self) -> float:
        return 10.0**self.exponent

    def array(self, *shape: int, key: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + key)
        return torch.randn(self.layers, *shape, dtype=torch.float64, generator=generator)

    def tril(self, size: int, *, key: int) -> Tensor:
        values = self.array(size, size, key=key)
        return (0.3 * values).tril(-1) + torch.diag_embed(0.5 + values.diagonal(dim1=-2, dim2=-1).abs())

    def orthonormal(self, size: int, rank: int, *, key: int) -> Tensor:
        return torch.linalg.qr(self.array(size, rank, key=key)).Q

    def loc(self) -> Tensor:
        return self.scale * self.array(self.rows, self.columns, key=0)


CASES = st.builds(
    Numbers, st.integers(0, 999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), exponent=EXPONENTS
)
Family = tuple[Callable[[torch.dtype], Any], Tensor]


def matrix_normal(n: Numbers) -> Family:
    """Its constructor for a type, and the covariances of vec X, rows one after another, in float64."""
    row, column = n.scale * n.tril(n.rows, key=1), n.tril(n.columns, key=2)
    covariance = torch.stack([torch.kron(r @ r.T, c @ c.T) for r, c in zip(row, column, strict=True)])
    return lambda dtype: MatrixNormal(n.loc().to(dtype), row.to(dtype), column.to(dtype)), covariance


def full_normal(n: Numbers) -> Family:
    factor = n.scale * n.tril(n.rows * n.columns, key=1)
    return lambda dtype: FullMatrixNormal(n.loc().to(dtype), factor.to(dtype)), factor @ factor.mT


def diagonal_precision(n: Numbers) -> Family:
    curvature, precision = n.array(n.rows, n.columns, key=1).square() / n.scale**2, 0.5 / n.scale**2
    return (
        lambda dtype: DiagonalPrecisionNormal(n.loc().to(dtype), curvature.to(dtype), precision=precision),
        torch.diag_embed((precision + curvature).reciprocal().flatten(-2)),
    )


def low_rank_kronecker(n: Numbers) -> Family:
    rank = min(2, n.rows)
    basis, small = n.orthonormal(n.rows, rank, key=1), n.orthonormal(n.columns, n.columns, key=2)
    values, sigma = n.array(rank, key=3).square() / n.scale**2, n.array(n.columns, key=4).square()
    remainder, precision = 0.3 / n.scale**2, 0.7 / n.scale**2
    covariances = []
    for u, q, beta, s in zip(basis, small, values, sigma, strict=True):
        large = u @ torch.diag(beta - remainder) @ u.T + remainder * torch.eye(n.rows, dtype=torch.float64)
        identity = precision * torch.eye(n.rows * n.columns, dtype=torch.float64)
        covariances.append(torch.linalg.inv(identity + torch.kron(large, q @ torch.diag(s) @ q.T)))

    def build(dtype: torch.dtype) -> LowRankKroneckerNormal:
        parts = {"values": values, "small_basis": small, "small_values": sigma}
        own = {name: value.to(dtype) for name, value in parts.items()}
        return LowRankKroneckerNormal(
            n.loc().to(dtype), basis.to(dtype), **own, remainder=remainder, precision=precision
        )

    return build, torch.stack(covariances)


FAMILIES = pytest.mark.parametrize(
    "family", [matrix_normal, full_normal, diagonal_precision, low_rank_kronecker], ids=lambda f: f.__name__
)


def dense(n: Numbers, covariance: Tensor) -> MultivariateNormal:
    return MultivariateNormal(n.loc().flatten(-2), 0.5 * (covariance + covariance.mT), validate_args=False)


def draws(n: Numbers, covariance: Tensor) -> Tensor:
    """Five values a layer at typical distances from the mean, ``(5, layers, m, n)``."""
    noise = torch.stack([n.array(n.rows * n.columns, key=20 + i) for i in range(5)])
    factor = torch.linalg.cholesky(0.5 * (covariance + covariance.mT) / n.scale**2) * n.scale
    return n.loc() + torch.einsum("lij,slj->sli", factor, noise).unflatten(-1, (n.rows, n.columns))


@FAMILIES
@given(n=CASES)
def test_density_is_that_of_the_dense_normal(family: Callable[[Numbers], Family], n: Numbers) -> None:
    """Law: log p(X) and the variances are those of N(vec M, Σ) with Σ dense: to 1e-8 in float64, and in float32 to
    1e-3 a number, at standard deviations from 1e-8 to 1e8."""
    build, covariance = family(n)
    values = draws(n, covariance)
    expected = dense(n, covariance).log_prob(values.flatten(-2))
    torch.testing.assert_close(build(torch.float64).log_prob(values), expected, rtol=1e-8, atol=1e-8)
    variance = covariance.diagonal(dim1=-2, dim2=-1).reshape(n.layers, n.rows, n.columns)
    torch.testing.assert_close(build(torch.float64).variance.expand_as(variance), variance, rtol=1e-8, atol=0)
    single = build(torch.float32).log_prob(values.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-3 * n.rows * n.columns)


@FAMILIES
@given(n=CASES)
def test_draws_and_gradients_are_finite(family: Callable[[Numbers], Family], n: Numbers) -> None:
    """Law: in float32 draws, densities and their gradients are finite at standard deviations from 1e-8 to 1e8, have
    the batch's and the event's shapes, and a density is that of its layer alone."""
    build, _ = family(n)
    q = build(torch.float32)
    value = q.rsample(torch.Size((4,))).requires_grad_()
    assert value.shape == (4, n.layers, n.rows, n.columns)
    density = q.log_prob(value)
    assert density.shape == (4, n.layers)
    (gradient,) = torch.autograd.grad(density.sum(), value)
    assert torch.isfinite(value).all() and torch.isfinite(density).all() and torch.isfinite(gradient).all()
    moved = value.detach().clone()
    moved[:, 1:] += 1.0
    assert torch.equal(q.log_prob(moved)[:, 0], density[:, 0])


@FAMILIES
@given(n=CASES, apart=st.integers(-4, 4))
def test_divergence_is_that_of_the_dense_normals(family: Callable[[Numbers], Family], n: Numbers, apart: int) -> None:
    """Law: KL(q ‖ N(0, s²)) is the multivariate Normals', in float64 and in float32, s from 1e-4 to 1e4 times q's
    scale; it is never below −1e-4 a number."""
    build, covariance = family(n)
    scale = n.scale * 10.0**apart
    zeros, eye = torch.zeros(n.rows, n.columns, dtype=torch.float64), torch.eye(n.rows * n.columns).double()
    expected = kl_divergence(dense(n, covariance), MultivariateNormal(zeros.flatten(), scale_tril=scale * eye))
    for dtype, rtol in ((torch.float64, 1e-7), (torch.float32, 1e-4)):
        q = build(dtype)
        if isinstance(q, FullMatrixNormal):  # its closed form is against the standard Normal
            p: Any = MatrixNormal(zeros.to(dtype))
            standard = MultivariateNormal(zeros.flatten(), scale_tril=eye)
            expected = kl_divergence(dense(n, covariance), standard)
        else:
            p = dist.Normal(zeros.to(dtype), torch.tensor(scale, dtype=dtype)).to_event(2)
            p = MatrixNormal(zeros.to(dtype), scale * torch.eye(n.rows).to(dtype)) if family is matrix_normal else p
        found = kl_divergence(q, p)
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e4 * rtol * 1e-4 * n.rows * n.columns)
        assert (found >= -1e-4 * n.rows * n.columns).all()


@given(n=CASES)
def test_thousands_of_layers_are_each_their_own(n: Numbers) -> None:
    """Law: 4000 layers give 4000 finite densities and divergences, those of the first layers among them."""
    for family in (matrix_normal, low_rank_kronecker):
        few, _ = family(n)
        q = few(torch.float32)
        many = q.expand(torch.Size((4000 // n.layers, n.layers)))
        value, zeros = q.mean + n.scale, torch.zeros(n.rows, n.columns)
        own = MatrixNormal(zeros, n.scale * torch.eye(n.rows))
        p: Any = own if family is matrix_normal else dist.Normal(zeros, n.scale).to_event(2)
        divergences = kl_divergence(many, p)
        assert divergences.numel() >= 3999 and torch.isfinite(divergences).all()
        torch.testing.assert_close(divergences, kl_divergence(q, p).expand_as(divergences))
        assert torch.isfinite(many.log_prob(value)).all()
        torch.testing.assert_close(many.log_prob(value)[-1], q.log_prob(value))
        assert many.log_prob(value).numel() >= 3999


@given(
    seed=st.integers(0, 999),
    size=st.integers(1, 6),
    rank=st.integers(1, 4),
    z=EXPONENTS,
    d=st.integers(-18, 8),
    twins=st.booleans(),
)
def test_sides_are_finite_or_refused(seed: int, size: int, rank: int, z: int, d: int, twins: bool) -> None:
    """Law: inducing variables of any size, linearly dependent or more than there are columns, give a finite side whose
    gain lies in [0, 1], or an error that says what to do."""
    generator = torch.Generator().manual_seed(seed)
    inducing = 10.0**z * torch.randn(1, rank, size, generator=generator)
    if twins:
        inducing[:, -1] = inducing[:, 0]
    try:
        side = Side.of(inducing, torch.full((1, rank), d * math.log(10.0)), where="lora.query.A, columns")
    except ValueError as error:
        assert "lora.query.A, columns" in str(error) and "fewer inducing variables" in str(error)
        return
    for part in (side.map, side.explained, side.remainder):
        assert torch.isfinite(part).all()
    gain = torch.linalg.svdvals(side.map)
    assert (gain <= 1 + 1e-2).all()


@given(
    alpha=EXPONENTS,
    variance=EXPONENTS,
    loc=st.floats(-100, 100, width=32),
    size=st.integers(1, 10**6),
)
def test_divergence_of_multipliers(alpha: int, variance: int, loc: float, size: int) -> None:
    """Law: with one variance to a layer the KL is size times that of two Normals, at variances from 1e-8 to 1e8."""
    a, v = torch.tensor([10.0**alpha]).double(), torch.tensor([10.0**variance]).double()
    q = Multipliers(torch.full((1,), loc).double(), a.reciprocal(), a.log(), size=size)
    p = Multipliers(torch.zeros(1).double(), v.reciprocal(), v.log(), size=size)
    expected = size * kl_divergence(dist.Normal(loc, a.sqrt()), dist.Normal(0.0, v.sqrt())).sum()
    torch.testing.assert_close(kl_divergence(q, p), expected.double(), rtol=1e-6, atol=1e-6 * size)
