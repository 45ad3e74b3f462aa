"""Sums of curvature, one by one: eigenvectors, truncation, completion, what a token counts for."""

from __future__ import annotations

import pytest
import torch

from pyrolora.guides.factors import Gram, Reduction, Sketch, completed, large_is_input, truncated, weight_gradients
from pyrolora.inference.randomness import isolated
from tests.programs import tiny_program


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    with isolated(seed):
        return torch.randn(shape)


def test_large_side() -> None:
    """Law: the inputs of A and of a head are their large side, the outputs of B."""
    sites = tiny_program().sites
    assert large_is_input(sites["lora.query.A"]) and large_is_input(sites["head.classifier.weight"])
    assert not large_is_input(sites["lora.query.B"])


@pytest.mark.parametrize("kind", ["gram", "sketch"])
def test_eigen_rebuilds_the_sum(kind: str) -> None:
    """Law: U diag(β) Uᵀ is the sum of outer products, where the rank suffices; the trace is exact."""
    cpu = torch.device("cpu")
    side = Gram(2, 6, device=cpu) if kind == "gram" else Sketch(2, 6, rank=4, device=cpu)
    parts = [rows(2, 2, 6, seed=1), rows(2, 2, 6, seed=2)]
    for part in parts:
        side.add(part)
    everything = torch.cat(parts, 1)
    expected = everything.mT @ everything
    vectors, values, left = side.eigen()
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.mT, expected, atol=1e-4)
    assert torch.allclose(side.trace, expected.diagonal(dim1=-2, dim2=-1).sum(-1), rtol=1e-5)
    assert float(left.abs().max()) < 1e-5


def test_what_truncation_leaves_is_spread_over_the_rest() -> None:
    """Law: k eigenvalues and d − k times the remainder have the exact trace."""
    side = Sketch(2, 9, rank=3, device=torch.device("cpu"))
    everything = rows(2, 20, 9)
    for part in everything.split(5, 1):
        side.add(part)
    _, values, left = side.eigen()
    assert torch.allclose(values.sum(-1) + 6 * left, everything.square().sum((-2, -1)), rtol=1e-5)


def test_truncation_is_the_best_of_its_rank() -> None:
    """Law: W Wᵀ is the eigendecomposition's leading part."""
    columns = rows(2, 9, 6)
    kept = truncated(columns, 2)
    values, vectors = torch.linalg.eigh(columns @ columns.mT)
    best = vectors[..., -2:] @ torch.diag_embed(values[..., -2:]) @ vectors[..., -2:].mT
    assert torch.allclose(kept @ kept.mT, best, atol=1e-4)
    assert torch.equal(truncated(columns, 6), columns)


def test_missing_directions_are_filled_up() -> None:
    """Law: with fewer rows than k the basis is completed to orthonormal columns."""
    basis = torch.linalg.qr(rows(2, 7, 3)).Q
    full = completed(basis, 5)
    assert torch.equal(full[..., :3], basis)
    assert torch.allclose(full.mT @ full, torch.eye(5).expand(2, 5, 5), atol=1e-5)


def test_weight_gradients_are_sums_over_tokens() -> None:
    """Law: ∂f/∂W of an example is Σ_t g_t a_tᵀ, token by token."""
    g, a = rows(3, 4, 5, seed=1), rows(3, 4, 2, seed=2)
    expected = torch.stack(
        [sum((torch.outer(g[n, t], a[n, t]) for t in range(4)), torch.zeros(5, 2)) for n in range(3)]
    )
    assert torch.allclose(weight_gradients(g, a, 3), expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_counted(side: str) -> None:
    """Law: whatever stands at padded positions, each kind of reduction gives what it gives without them."""
    real = rows(1, 3, 4)
    junk = 100 * torch.ones(1, 2, 4)
    padded = torch.cat([junk, real] if side == "left" else [real, junk], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1]] if side == "left" else [[1, 1, 1, 0, 0]])
    for kind in ("reduce", "expand", "last"):
        with_padding, without = Reduction(kind, 1, mask), Reduction(kind, 1)  # type: ignore[arg-type]
        assert torch.allclose(with_padding.inputs(padded), without.inputs(real), atol=1e-6)
        assert torch.allclose(with_padding.gradients(padded, padded), without.gradients(real, real), atol=1e-6)
        assert with_padding.weight(padded) == without.weight(real)
