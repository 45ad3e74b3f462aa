"""The conditional of the inducing guide against dense multivariate Normals."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.distributions.inducing import Colouring, InducedMatrixNormal, Side
from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.inference.randomness import isolated

ROWS, COLUMNS, LAYERS = 3, 4, 2
PLAIN = Colouring(torch.zeros(()), torch.ones(()))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    with isolated(0):
        yield
    torch.set_default_dtype(torch.float32)


def side(size: int, inducing: int, log_diagonal: float = -0.5) -> Side:
    return Side.of(torch.randn(LAYERS, inducing, size), torch.full((LAYERS, inducing), log_diagonal))


def sides(which: str) -> tuple[Side | None, Side | None]:
    return (side(ROWS, 2) if "row" in which else None, side(COLUMNS, 2) if "column" in which else None)


def conditional(which: str, noise: float | None = 1.0, colour: Colouring = PLAIN) -> InducedMatrixNormal:
    row, column = sides(which)
    white = torch.randn(LAYERS, 2 if row else ROWS, 2 if column else COLUMNS)
    scale = None if noise is None else torch.full((LAYERS,), noise)
    return InducedMatrixNormal(white, row, column, noise=scale, colour=colour)


def explained(s: Side | None, size: int) -> Tensor:
    """P of one side, dense."""
    return torch.eye(size).expand(LAYERS, size, size) if s is None else s.map @ s.map.mT


def dense(q: InducedMatrixNormal) -> Tensor:
    """Covariance of the noise of vec(W), rows one after another."""
    row, column = explained(q.row, ROWS), explained(q.column, COLUMNS)
    return torch.eye(ROWS * COLUMNS) - torch.stack([torch.kron(row[i], column[i]) for i in range(LAYERS)])


def covariance(draws: Tensor) -> Tensor:
    """Sample covariance for each layer, ``(layers, mn, mn)``."""
    flat = draws.flatten(-2)
    centred = flat - flat.mean(0)
    return torch.einsum("sli,slj->lij", centred, centred) / len(flat)


def test_a_side_is_the_projection_of_the_sparse_process() -> None:
    """Law: P = Zᵀ (Z Zᵀ + D²)⁻¹ Z = R Rᵀ, and the two factors split the identity: Rᵀ R and I − Rᵀ R."""
    z, log_d = torch.randn(LAYERS, 2, COLUMNS), torch.randn(LAYERS, 2)
    s = Side.of(z, log_d)
    k = z @ z.mT + torch.diag_embed((2 * log_d).exp())
    assert torch.allclose(s.map @ s.map.mT, z.mT @ torch.linalg.solve(k, z))
    gram = s.map.mT @ s.map
    assert torch.allclose(s.explained @ s.explained.mT, gram, atol=1e-5)  # the stated jitter
    assert torch.allclose(s.remainder @ s.remainder.mT, torch.eye(2) - gram)


def test_a_covariance_that_is_not_positive_definite_is_named() -> None:
    """Law: the error says which site, and what to do."""
    with pytest.raises(ValueError, match=r"lora\.query\.A, columns: the covariance .* Use fewer inducing variables"):
        Side.of(torch.full((1, 2, 3), math.nan), torch.zeros(1, 2), where="lora.query.A, columns")


@pytest.mark.parametrize("which", ["row", "column", "row column"])
def test_noise_has_the_covariance_that_inducing_variables_leave(which: str) -> None:
    """Law (L4): the covariance of Matheron draws is I − P_r ⊗ P_c, by brute force."""
    q = conditional(which)
    draws = q.residual(torch.Size((200_000,)))
    assert torch.allclose(covariance(draws), dense(q), atol=0.015)
    assert (dense(q) - torch.eye(ROWS * COLUMNS)).abs().max() > 0.1


@pytest.mark.parametrize("which", ["row", "column", "row column", "exact"])
def test_augmentation_leaves_the_prior_alone(which: str) -> None:
    """Law (L3): with V ~ N(0, I) and λ = 1 the marginal of X is N(0, I): exactly, and in draws of W = s X."""
    q = conditional(which, noise=None if which == "exact" else 1.0)
    explained_part = torch.stack(
        [torch.kron(explained(q.row, ROWS)[i], explained(q.column, COLUMNS)[i]) for i in range(LAYERS)]
    )
    assert torch.allclose(explained_part + dense(q), torch.eye(ROWS * COLUMNS).expand(LAYERS, -1, -1))
    white = torch.randn(100_000, *q.white.shape)
    colour = Colouring(torch.zeros(()), torch.tensor(0.3))
    noise = None if q.noise is None else q.noise.expand(100_000, LAYERS)
    draws = InducedMatrixNormal(white, q.row, q.column, noise=noise, colour=colour).rsample()
    assert torch.allclose(covariance(draws), 0.09 * torch.eye(ROWS * COLUMNS), atol=0.003)


@pytest.mark.parametrize("which", ["row", "column", "row column"])
@pytest.mark.parametrize("prior", ["normal", "elementwise", "matrix"])
def test_log_prob_is_that_of_the_dense_normal(which: str, prior: str) -> None:
    """Law: the density equals an explicit multivariate Normal's, under each kind of declared prior."""
    row_factor = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [-0.2, 0.1, 0.5]])
    fn = {
        "normal": dist.Normal(torch.zeros(ROWS, COLUMNS), 0.2).to_event(2),
        "elementwise": dist.Normal(torch.randn(ROWS, COLUMNS), torch.rand(ROWS, COLUMNS) + 0.1).to_event(2),
        "matrix": MatrixNormal(torch.randn(ROWS, COLUMNS), row_factor, 0.5 * torch.eye(COLUMNS)),
    }[prior]
    q = conditional(which, noise=0.7, colour=Colouring.of(fn))
    if prior == "matrix":
        affine = torch.kron(row_factor, 0.5 * torch.eye(COLUMNS))
    else:
        affine = torch.diag(fn.base_dist.scale.expand(ROWS, COLUMNS).flatten())
    explicit = MultivariateNormal(q.mean.flatten(-2), 0.49 * affine @ dense(q) @ affine.T)
    values = q.rsample(torch.Size((5,)))
    assert torch.allclose(q.log_prob(values), explicit.log_prob(values.flatten(-2)), atol=1e-6)


def test_other_priors_have_no_map() -> None:
    """Law: a prior that is no affine map of white noise is refused by type."""
    with pytest.raises(TypeError, match="Laplace is not an affine map of white noise"):
        Colouring.of(dist.Laplace(torch.zeros(2, 2), 1.0).to_event(2))


@pytest.mark.parametrize("which", ["row", "column", "row column"])
def test_divergence_of_conditionals_is_exact(which: str) -> None:
    """Law: KL = (mn/2)(ρ − 1 − log ρ), equal to that of the dense Normals, whatever V."""
    q = conditional(which, noise=0.6)
    p = InducedMatrixNormal(q.white, q.row, q.column, noise=torch.full((LAYERS,), 1.3), colour=PLAIN)
    flat = [MultivariateNormal(d.mean.flatten(-2), d.noise[0] ** 2 * dense(d)) for d in (q, p)]
    assert torch.allclose(kl_divergence(q, p), kl_divergence(*flat))
    assert torch.equal(kl_divergence(p, p), torch.zeros(LAYERS))


def test_a_point_mass_stands_at_the_conditional_mean() -> None:
    """Law: λ = 0 draws the mean, has density there alone, and diverges from a density without bound."""
    q = conditional("column", noise=None)
    value = q.rsample(torch.Size((3,)))
    assert torch.equal(value, q.mean.expand(3, -1, -1, -1))
    assert torch.equal(q.log_prob(q.mean), torch.zeros(LAYERS))
    assert (q.log_prob(q.mean + 0.1) == -math.inf).all()
    with pytest.raises(NotImplementedError, match="no finite divergence"):
        kl_divergence(q, InducedMatrixNormal(q.white, q.row, q.column, noise=torch.ones(LAYERS), colour=PLAIN))


@pytest.mark.parametrize("of", ["a draw", "a density"])
@pytest.mark.parametrize("which", ["column", "row column"])
def test_gradients_reach_every_parameter(which: str, of: str) -> None:
    """Law: draws and densities depend on V, Z, D and λ, with finite gradients where singular values of Z are equal."""
    row = Side.of(torch.eye(2, ROWS).unsqueeze(0), torch.zeros(1, 2)) if "row" in which else None
    v = torch.zeros(1, 2 if row else ROWS, 2)
    z, d, noise = torch.eye(2, COLUMNS).unsqueeze(0), torch.zeros(1, 2), torch.ones(1)
    parameters = [p.requires_grad_() for p in (v, z, d, noise)]
    q = InducedMatrixNormal(v, row, Side.of(z, d), noise=noise, colour=PLAIN)
    value = q.rsample().square() if of == "a draw" else q.log_prob(torch.randn(1, ROWS, COLUMNS))
    value.sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in parameters if p.grad is not None)
    assert all(p.grad is not None for p in parameters)
