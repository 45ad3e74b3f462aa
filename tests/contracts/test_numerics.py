"""Distributions at extreme scales, near-singular factors, thousands of layers and in bfloat16: finite, or an error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.distributions.full_normal import FullMatrixNormal
from pyrolora.distributions.inducing import Colouring, InducedMatrixNormal, Side
from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.guides.inducing_families import Flow
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

EXPONENTS = st.integers(-8, 8)
LAYERS, ROWS, COLUMNS = 2, 4, 3


def numbers(*shape: int, key: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(key))


# -- the inducing guide's conditional and flows ------------------------------------------------------------------------


def conditional(
    exponents: dict[str, int], which: str, dtype: torch.dtype, noise: float | None = None
) -> InducedMatrixNormal:
    """``W | V`` with Z, D, V, λ and the prior's scale at powers of ten."""
    scale = {name: 10.0**value for name, value in exponents.items()}

    def side(size: int, key: int) -> Side:
        z = scale["z"] * numbers(LAYERS, 2, size, key=key)
        return Side.of(z.to(dtype), torch.full((LAYERS, 2), math.log(scale["d"]), dtype=dtype))

    row = side(ROWS, 1) if "row" in which else None
    column = side(COLUMNS, 2) if "column" in which else None
    white = scale["v"] * numbers(LAYERS, 2 if row else ROWS, 2 if column else COLUMNS, key=3)
    colour = Colouring(torch.zeros((), dtype=dtype), torch.tensor(scale["prior"], dtype=dtype))
    own = torch.full((LAYERS,), scale["noise"] if noise is None else noise, dtype=dtype)
    return InducedMatrixNormal(white.to(dtype), row, column, noise=own, colour=colour)


WHICH = pytest.mark.parametrize("which", ["row", "column", "row column"])


@WHICH
@given(exponents=st.fixed_dictionaries({name: EXPONENTS for name in ("z", "d", "v", "noise", "prior")}))
def test_the_conditional_is_finite_at_every_scale(which: str, exponents: dict[str, int]) -> None:
    """Law: with inducing variables, their noise, values, λ and prior each from 1e-8 to 1e8, draws and divergences are
    finite, divergences those of float64, and log densities numbers; a covariance that single precision cannot factor
    is an error that says what to do."""
    try:
        q, p = (conditional(exponents, which, torch.float32, noise) for noise in (None, 1.0))
    except ValueError as error:
        assert "fewer inducing variables" in str(error)
        return
    draw = q.rsample()
    divergence = kl_divergence(q, p)
    assert torch.isfinite(draw).all() and torch.isfinite(divergence).all()
    exact = (
        ROWS
        * COLUMNS
        / 2
        * (math.expm1(2 * math.log(10.0) * exponents["noise"]) - 2 * math.log(10.0 ** exponents["noise"]))
    )
    torch.testing.assert_close(divergence.double(), torch.full((LAYERS,), exact).double(), rtol=1e-4, atol=1e-4)
    assert not torch.isnan(q.log_prob(draw)).any() and not torch.isnan(p.log_prob(draw)).any()


@WHICH
@given(seed=st.integers(0, 999), ratio=st.integers(-2, 8), scale=EXPONENTS, prior=EXPONENTS)
def test_the_density_of_the_conditional(which: str, seed: int, ratio: int, scale: int, prior: int) -> None:
    """Law: in float32 the log density is float64's, to 0.1 nats where D is a hundredth of Z or more, at any common
    scale of both and of the prior."""
    exponents = {"z": scale, "d": max(min(scale + ratio, 10), -10), "v": 0, "noise": 0, "prior": prior}
    single, double = (conditional(exponents, which, dtype, 0.3) for dtype in (torch.float32, torch.float64))
    with isolated(seed):
        value = double.rsample().float()
    torch.testing.assert_close(single.log_prob(value).double(), double.log_prob(value.double()), rtol=1e-3, atol=0.1)


@given(loc=EXPONENTS, scale=EXPONENTS, weights=st.integers(-8, 2), depth=st.integers(1, 3), seed=st.integers(0, 99))
def test_flows_are_finite_at_every_scale(loc: int, scale: int, weights: int, depth: int, seed: int) -> None:
    """Law: a flow whose base has means and scales from 1e-8 to 1e8, with nets away from zero, has finite draws, log
    densities of its own draws and gradients."""
    with isolated(seed):
        family = Flow(10.0**loc * torch.randn(LAYERS, ROWS, COLUMNS), 10.0**scale, depth)
        for net in family.nets:
            nn.init.normal_(net.layers[-1].weight, std=10.0**weights)
        q = family.distribution()
        draw = q.rsample()
        density = q.log_prob(draw) - family.prior().log_prob(draw)
    if draw.detach().abs().max() < 1e9:  # else products of its square overflow, which a fit reports as such
        assert torch.isfinite(density).all()
        density.sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in family.parameters())
    assert torch.isfinite(draw).all() and torch.isfinite(family.mean()).all()


# -- near-singular factors ---------------------------------------------------------------------------------------------


def factor(size: int, condition: float, key: int) -> Tensor:
    """A Cholesky factor in general position of a covariance with that condition, its largest eigenvalue 1."""
    basis = torch.linalg.qr(numbers(size, size, key=key)).Q
    root = basis * torch.logspace(0, -0.5 * math.log10(condition), size, dtype=torch.float64)
    upper = torch.linalg.qr(root.mT).R
    return (upper * upper.diagonal().sign().unsqueeze(-1)).mT.float().double()


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12, 1e16])
@pytest.mark.parametrize("graded", [True, False])
def test_a_near_singular_matrix_normal(condition: float, graded: bool) -> None:
    """Law: with the same factors float32 has float64's divergence from a standard Normal to 1e-5 and draws to 1e-6;
    log densities and the divergence from it to 1e-5 where the factors are graded (a diagonal of small and large
    scales), and else to 1e-6 √condition of their distances, beyond which (1e12) they are finite."""
    row, column = factor(ROWS, condition, 1), factor(COLUMNS, condition, 2)
    if graded:
        row, column = (torch.diag(each.diagonal()) for each in (row, column))
    zeros, noise = torch.zeros(ROWS, COLUMNS), numbers(5, ROWS, COLUMNS, key=3).float()
    found: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        q = MatrixNormal(zeros.to(dtype), row.to(dtype), column.to(dtype))
        standard = dist.Normal(zeros.to(dtype), torch.ones_like(zeros, dtype=dtype)).to_event(2)
        value = MatrixNormal(zeros.double(), row, column).color(noise.double()).float().to(dtype)
        found[dtype] = {
            "draw": q.color(noise.to(dtype)),
            "kl": kl_divergence(q, MatrixNormal(zeros.to(dtype))),
            "reverse": kl_divergence(standard, q),
            "log_prob": q.log_prob(value),
        }
    single, double = ({name: value.double() for name, value in found[t].items()} for t in found)
    assert all(torch.isfinite(value).all() for value in single.values())
    torch.testing.assert_close(single["draw"], double["draw"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single["kl"], double["kl"], rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if graded else 1e-6 * math.sqrt(condition)
    if tolerance < 1:
        torch.testing.assert_close(single["reverse"], double["reverse"], rtol=tolerance, atol=1e-4)
        torch.testing.assert_close(single["log_prob"], double["log_prob"], rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12, 1e16])
def test_a_near_singular_kronecker_precision(condition: float) -> None:
    """Law: curvatures from 1 to 1e16 times λ in one matrix: log-determinants, effective dimensions and the divergence
    from the prior are float64's to 1e-5, covariances of outputs to 1e-3, and log densities finite, never above the
    mode's."""
    spread = torch.logspace(0, math.log10(condition) / 2, 3, dtype=torch.float64)
    parts = {"basis": torch.linalg.qr(numbers(6, 3, key=1)).Q, "values": spread, "small_values": spread}
    parts |= {"small_basis": torch.linalg.qr(numbers(3, 3, key=2)).Q}
    parts = {name: value.float().double() for name, value in parts.items()}
    jacobian, value = numbers(2, 6, 3, key=3).float(), numbers(6, 3, key=4).float()
    found: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        own = {name: part.to(dtype) for name, part in parts.items()}
        q = LowRankKroneckerNormal(torch.zeros(6, 3, dtype=dtype), **own, remainder=1.0, precision=1.0)
        prior = dist.Normal(torch.zeros(6, 3, dtype=dtype), torch.ones((), dtype=dtype)).to_event(2)
        found[dtype] = [q.log_det_precision(), q.effective_dimension(), kl_divergence(q, prior)]
        found[dtype] += [q.covariance_of(jacobian.to(dtype)), q.log_prob(value.to(dtype))]
        assert torch.isfinite(q.rsample(torch.Size((3,)))).all()
        assert q.log_prob(value.to(dtype)) <= q.log_prob(q.mean)
    for i, (single, double) in enumerate(zip(*found.values(), strict=True)):
        rtol = (1e-5, 1e-5, 1e-5, 1e-3, 1e-3)[i]
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=rtol, atol=rtol)


def singular(dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Any]]:
    """Every family over matrices, with a direction that has lost its variance, or has no end of it."""
    zeros, eye, one = torch.zeros(2, 2, dtype=dtype), torch.eye(2, dtype=dtype), torch.ones(2, dtype=dtype)
    lost, precise = torch.diag(torch.tensor([1.0, 0.0], dtype=dtype)), {"basis": eye, "small_basis": eye}
    return {
        "MatrixNormal: row_scale_tril is singular": lambda: MatrixNormal(zeros, lost),
        "MatrixNormal: column_scale_tril is singular": lambda: MatrixNormal(zeros, eye, lost),
        "FullMatrixNormal: scale_tril is singular": lambda: FullMatrixNormal(zeros, torch.diag(one.repeat(2)) * 0),
        "LowRankKroneckerNormal": lambda: LowRankKroneckerNormal(
            zeros, **precise, values=one, small_values=one, remainder=0.0, precision=0.0
        ),
        "DiagonalPrecisionNormal": lambda: DiagonalPrecisionNormal(zeros, zeros, precision=0.0),
    }


@pytest.mark.parametrize("name", list(singular()))
def test_an_exactly_singular_family_is_named(name: str) -> None:
    """Law: a variance that is zero, or without bound, is a ValueError that names the distribution, where arguments are
    validated."""
    with pytest.raises(ValueError, match=name):
        singular()[name]()


# -- thousands of layers -----------------------------------------------------------------------------------------------


class Deep(nn.Module):
    """``y = x + Σ_l W_l x``: as many tiny modules as there are layers."""

    def __init__(self, layers: int, size: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"map": nn.Linear(size, size, bias=False)}) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.01 / math.sqrt(layers))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = x + layer["map"](x)  # type: ignore[index]
        return type("Output", (), {"logits": x})()


def test_a_program_of_two_thousand_layers() -> None:
    """Law: 2000 adapted modules are one site each of A and B with 2000 layers; an ELBO and its gradients are finite,
    and the KL of mean field is 2000 times that of one layer."""
    layers, size, count = 2000, 4, 5
    with isolated(0):
        config = LoraConfig(r=1, target_modules=["map"])
        priors = {"*.A": Normal(1.0), "*.B": Normal(0.01)}
        program = PyroLoRA(
            Deep(layers, size), config, priors=priors, likelihood=NormalLikelihood(scale=0.5), num_data=count
        )
        guide = MeanField(random="*", init_scale=0.1)
        guide.bind(program)
        assert {name: tuple(site.shape) for name, site in program.sites.items()} == {
            "lora.map.A": (layers, 1, size),
            "lora.map.B": (layers, size, 1),
        }
        batch = {"x": torch.randn(count, size), "labels": torch.randn(count, size)}
        objective = Objective(program, guide)
        objective(batch).backward()
    terms = objective.elbo.terms
    assert terms is not None and torch.isfinite(terms.data)
    gradients = [parameter.grad for parameter in guide.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    per_weight = -math.log(0.1) - 0.5 + 0.5 * 0.1**2
    assert float(terms.kl["lora.map.B"]) == pytest.approx(layers * size * per_weight, rel=1e-5)
    means = guide.loc["lora/map/A"].detach().square().sum()
    assert float(terms.kl["lora.map.A"]) == pytest.approx(layers * size * per_weight + 0.5 * float(means), rel=1e-5)


# -- bfloat16 ----------------------------------------------------------------------------------------------------------


def families() -> dict[str, tuple[Any, Any]]:
    """The distributions of a training step, in float32, and what their divergences are from."""
    row, column = (factor(size, 100.0, size).float() for size in (ROWS, COLUMNS))
    loc = numbers(ROWS, COLUMNS, key=5).float()
    standard = MatrixNormal(torch.zeros(ROWS, COLUMNS))
    exponents = dict.fromkeys(("z", "d", "v", "noise", "prior"), 0)
    return {
        "matrix": (MatrixNormal(loc, row, column), standard),
        "full": (FullMatrixNormal(loc, factor(ROWS * COLUMNS, 100.0, 7).float()), standard),
        "induced": tuple(conditional(exponents, "row column", torch.float32, noise) for noise in (0.3, 1.0)),  # type: ignore[dict-item]
    }


@pytest.mark.parametrize("name", list(families()))
def test_families_under_autocast(name: str) -> None:
    """Law: in a block that casts products to bfloat16, as the Trainer's ``bf16`` makes one, a divergence is float32's
    to 1e-5, and draws and log densities are to the round-off of bfloat16."""
    q, p = families()[name]
    with isolated(0):
        draw = q.rsample()
    expected = kl_divergence(q, p), q.log_prob(draw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with isolated(0):
            torch.testing.assert_close(q.rsample().float(), draw, rtol=0.02, atol=0.02 * float(draw.abs().max()))
        found = kl_divergence(q, p), q.log_prob(draw)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].float(), expected[1], rtol=0.03, atol=0.3)
