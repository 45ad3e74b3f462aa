"""Prior precision by the evidence: the root of MacKay's condition, against a scan of the evidence itself."""

from __future__ import annotations

import logging

import pytest
import torch

from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.guides.precision import HIGHEST, tuned
from pyrolora.inference.randomness import isolated


def law(layers: int, large: int, small: int, rank: int, seed: int) -> LowRankKroneckerNormal:
    with isolated(seed):
        return LowRankKroneckerNormal(
            torch.randn(layers, large, small),
            torch.linalg.qr(torch.randn(layers, large, rank)).Q,
            values=5 * torch.rand(layers, rank),
            remainder=0.2 * torch.rand(layers),
            small_basis=torch.linalg.qr(torch.randn(layers, small, small)).Q,
            small_values=3 * torch.rand(layers, small),
            precision=1.0,
        )


LAWS = {"a": law(3, 6, 2, 4, 0), "b": law(2, 5, 3, 2, 1)}


def evidence(name: str, precision: torch.Tensor) -> torch.Tensor:
    """Of each layer, up to what does not depend on λ."""
    q = LAWS[name].with_precision(precision)
    squared = q.loc.square().sum((-2, -1))
    return 0.5 * (q.event_shape.numel() * precision.log() - precision * squared - q.log_det_precision())


@pytest.mark.parametrize("scope", ["layer", "site", "global"])
def test_maximises_the_evidence(scope: str) -> None:
    """Law: no λ on a fine grid has a larger evidence, for what shares one λ."""
    chosen = tuned(LAWS, {name: q.loc for name, q in LAWS.items()}, scope=scope)  # type: ignore[arg-type]
    best = {name: evidence(name, value) for name, value in chosen.items()}
    for factor in torch.logspace(-1, 1, 41):
        other = {name: evidence(name, value * factor) for name, value in chosen.items()}
        if scope == "layer":
            assert all((best[name] >= other[name] - 1e-4).all() for name in LAWS)
        elif scope == "site":
            assert all(best[name].sum() >= other[name].sum() - 1e-4 for name in LAWS)
        else:
            assert sum(v.sum() for v in best.values()) >= sum(v.sum() for v in other.values()) - 1e-4
    values = torch.cat(list(chosen.values()))
    assert len(values.unique()) == {"layer": 5, "site": 2, "global": 1}[scope]


def test_no_optimum_stops_at_the_bound_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Law: weights of zero ask for an infinite precision: the search stops at its bound, with a warning."""
    with caplog.at_level(logging.WARNING, "pyrolora"):
        chosen = tuned(LAWS, {name: torch.zeros_like(q.loc) for name, q in LAWS.items()})
    assert all((value > HIGHEST / 2).all() for value in chosen.values())
    assert "no optimum of the prior precision at a, b" in caplog.text
