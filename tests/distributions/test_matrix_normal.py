from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyrolora.distributions.matrix_normal import MatrixNormal

ROWS, COLUMNS = 3, 2
SIDES = [(True, True), (True, False), (False, True), (False, False)]


def factor(size: int, *batch: int, seed: int = 0) -> Tensor:
    noise = torch.randn(*batch, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.cholesky(noise @ noise.mT + 0.5 * torch.eye(size, dtype=torch.float64))


def matrix(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(sides: tuple[bool, bool], *batch: int) -> MatrixNormal:
    row = factor(ROWS, *batch, seed=2) if sides[0] else None
    column = factor(COLUMNS, *batch, seed=3) if sides[1] else None
    return MatrixNormal(matrix(*batch, ROWS, COLUMNS), row, column)


def covariance(fn: MatrixNormal) -> Tensor:
    """``K_c ⊗ K_r``, for columns stacked on each other."""
    row, column = (
        torch.eye(size, dtype=fn.loc.dtype) if factor is None else factor @ factor.mT
        for factor, size in ((fn.row_scale_tril, ROWS), (fn.column_scale_tril, COLUMNS))
    )
    return torch.kron(column, row)


def vec(x: Tensor) -> Tensor:
    return x.mT.flatten(-2)


def multivariate(fn: MatrixNormal) -> torch.distributions.MultivariateNormal:
    return torch.distributions.MultivariateNormal(vec(fn.loc), covariance(fn))


@pytest.mark.parametrize("sides", SIDES)
def test_log_prob_is_that_of_the_multivariate_normal(sides):
    """Law: log p(X) is that of N(vec M, K_c ⊗ K_r) at vec X, whichever sides are the identity."""
    fn, value = example(sides), matrix(5, ROWS, COLUMNS, seed=4)
    torch.testing.assert_close(fn.log_prob(value), multivariate(fn).log_prob(vec(value)))


@pytest.mark.parametrize("sides", SIDES)
def test_mean_and_variance_are_those_of_the_multivariate_normal(sides):
    """Law: mean and elementwise variance are those of N(vec M, K_c ⊗ K_r), with the shape of the matrix."""
    fn = example(sides)
    torch.testing.assert_close(vec(fn.variance), multivariate(fn).variance)
    torch.testing.assert_close(vec(fn.mean), multivariate(fn).mean)


@pytest.mark.parametrize("sides", SIDES)
def test_a_batch_is_its_members(sides):
    """Law: a batched distribution scores and describes each matrix as its own distribution does."""
    batched = example(sides, 4)
    value = matrix(6, 4, ROWS, COLUMNS, seed=5)
    assert batched.batch_shape == (4,) and batched.event_shape == (ROWS, COLUMNS)
    for i in range(4):
        row, column = (f if f is None else f[i] for f in (batched.row_scale_tril, batched.column_scale_tril))
        member = MatrixNormal(batched.loc[i], row, column)
        torch.testing.assert_close(batched.log_prob(value)[:, i], member.log_prob(value[:, i]))
        torch.testing.assert_close(batched.variance[i], member.variance)


@pytest.mark.parametrize("sides", SIDES)
def test_draws_have_the_stated_covariance(sides):
    """Law: the empirical mean and covariance of vec X are vec M and K_c ⊗ K_r within five Monte Carlo errors."""
    fn, n = example(sides), 40_000
    torch.manual_seed(0)
    draws = vec(fn.rsample(torch.Size([n])))
    true = covariance(fn)
    spread = true.diagonal()
    assert bool(((draws.mean(0) - vec(fn.loc)).abs() < 5 * (spread / n).sqrt()).all())
    error = ((spread[:, None] * spread[None, :] + true.square()) / n).sqrt()
    assert bool(((draws.T.cov() - true).abs() < 5 * error).all())


def test_draws_are_reparametrised():
    """Law: the gradient of a draw reaches mean and both factors, and is E for L_r: dX = dL_r E L_cᵀ."""
    loc, row, column = (t.requires_grad_() for t in (matrix(ROWS, COLUMNS), factor(ROWS), factor(COLUMNS)))
    fn = MatrixNormal(loc, row, column)
    torch.manual_seed(0)
    draw = fn.rsample()
    noise = fn.whiten((draw - loc).detach())
    draw.sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones_like(loc))
    torch.testing.assert_close(row.grad, torch.ones_like(draw) @ (noise @ column.detach().T).T)
    torch.testing.assert_close(column.grad, torch.ones_like(draw).T @ (row.detach() @ noise))


@pytest.mark.parametrize("sides", SIDES)
def test_whiten_undoes_color(sides):
    """Law: whiten(color(E)) = E."""
    noise = matrix(7, ROWS, COLUMNS, seed=6)
    fn = example(sides)
    torch.testing.assert_close(fn.whiten(fn.color(noise)), noise)


@pytest.mark.parametrize("sides", SIDES)
def test_expand_repeats(sides):
    """Law: expand gives independent copies: the same density for each, and other draws for each."""
    fn = example(sides)
    wide = fn.expand([5])
    value = matrix(5, ROWS, COLUMNS, seed=7)
    assert wide.batch_shape == (5,) and wide.event_shape == fn.event_shape and wide.variance.shape == value.shape
    torch.testing.assert_close(wide.log_prob(value), fn.log_prob(value))
    torch.manual_seed(0)
    draw = wide.rsample(torch.Size([2]))
    assert draw.shape == (2, 5, ROWS, COLUMNS) and draw.flatten(0, 1).unique(dim=0).shape[0] == 10
    assert example(sides, 5).expand(torch.Size([4, 5])).log_prob(value).shape == (4, 5)


def test_no_square_matrix_of_an_identity_side():
    """Law: a side given as None costs nothing, whatever its size: a million columns score in no time."""
    fn = MatrixNormal(torch.zeros(2, 1_000_000), 0.5 * torch.eye(2))
    expected = dist.Normal(0.0, 0.5).expand([2, 1_000_000]).to_event(2)
    value = torch.full((2, 1_000_000), 0.25)
    torch.testing.assert_close(fn.log_prob(value), expected.log_prob(value), rtol=1e-5, atol=0)


@pytest.mark.parametrize("row", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("column", [1e-8, 1.0, 1e8])
def test_extreme_scales_stay_finite(row, column):
    """Law: scales from 1e-8 to 1e8 on either side give finite float32 log densities and gradients, as in float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        left = (row * factor(ROWS)).to(dtype).requires_grad_()
        fn = MatrixNormal(torch.zeros(ROWS, COLUMNS, dtype=dtype), left, (column * factor(COLUMNS)).to(dtype))
        value = fn.color(matrix(ROWS, COLUMNS, seed=8).to(dtype)).detach()
        log_prob = fn.log_prob(value)
        log_prob.backward()
        assert log_prob.dtype == dtype and bool(log_prob.isfinite()) and bool(left.grad.isfinite().all())
        results.append(log_prob.detach().double())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_float64_is_exact_to_float64():
    """Law: in float64 the normalising constant has float64's precision: a standard draw at 0 is −½ mn log 2π."""
    log_prob = MatrixNormal(torch.zeros(40, 50, dtype=torch.float64)).log_prob(torch.zeros(40, 50, dtype=torch.float64))
    assert log_prob.item() == pytest.approx(-1000 * math.log(2 * math.pi), rel=1e-14)


@pytest.mark.parametrize(("row", "column", "side"), [(2, 2, "row"), (3, 3, "column")])
def test_factors_of_another_size_are_refused(row, column, side):
    """Law: a factor that does not fit names its side and the size that would."""
    with pytest.raises(ValueError, match=rf"{side}_scale_tril .*needs {ROWS if side == 'row' else COLUMNS} ×"):
        MatrixNormal(torch.zeros(ROWS, COLUMNS), torch.eye(row), torch.eye(column))
