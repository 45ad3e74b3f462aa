"""Gaussian multipliers: their divergence and density against torch's own Normals."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyrolora.distributions.multipliers import Multipliers

LAYERS, SIZE = 3, 12


def pair() -> tuple[Multipliers, Multipliers, Normal, Normal]:
    """q and p, and the same as torch's Normals over every multiplier, ``(5, LAYERS, SIZE)``."""
    generator = torch.Generator().manual_seed(0)
    alpha = torch.rand(5, LAYERS, generator=generator) + 0.05
    variances = torch.rand(LAYERS, SIZE, generator=generator) + 0.1
    q = Multipliers(torch.ones(()), 1 / alpha, alpha.log(), size=SIZE)
    p = Multipliers(torch.zeros(()), (1 / variances).mean(-1), variances.log().mean(-1), size=SIZE)
    each = Normal(torch.ones(5, LAYERS, SIZE), alpha.sqrt().unsqueeze(-1).expand(-1, -1, SIZE))
    return q, p, each, Normal(torch.zeros(LAYERS, SIZE), variances.sqrt())


def test_kl_is_the_sum_over_multipliers() -> None:
    """Law: KL(q ‖ p) is torch's KL of the Normals, summed over every multiplier of every layer."""
    q, p, each, prior = pair()
    assert torch.allclose(kl_divergence(q, p.expand(torch.Size([5]))), kl_divergence(each, prior).sum((-2, -1)))


def test_kl_of_weights_is_that_of_their_multipliers() -> None:
    """Law: KL(N(θ, αθ²) ‖ N(0, s²)) of the weights is the KL of w with A = θ ∘ w, by torch's Normals."""
    theta, s, alpha = torch.randn(LAYERS, SIZE), 0.3, torch.tensor([0.02, 0.1, 0.5])
    weights = Normal(theta, alpha.sqrt().unsqueeze(-1) * theta.abs())
    by_hand = kl_divergence(weights, Normal(0.0, s)).sum()
    ratio = theta.square() / s**2
    q = Multipliers(torch.ones(()), 1 / alpha, alpha.log(), size=SIZE)
    p = Multipliers(torch.zeros(()), ratio.mean(-1), -ratio.log().mean(-1), size=SIZE)
    assert torch.allclose(kl_divergence(q, p), by_hand, rtol=1e-5)


def test_log_density_where_all_multipliers_agree() -> None:
    """Law: log_prob is the sum of the Normals' log densities at a value that all multipliers of a layer have."""
    q, p, each, prior = pair()
    value = torch.randn(5, LAYERS)
    shared = value.unsqueeze(-1).expand(-1, -1, SIZE)
    assert torch.allclose(q.log_prob(value), each.log_prob(shared).sum((-2, -1)), rtol=1e-5)
    assert torch.allclose(p.log_prob(value), prior.log_prob(shared).sum((-2, -1)), rtol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_shapes_and_value(shape: tuple[int, ...]) -> None:
    """Law: batch and event shapes are those of the parameters, expansion adds batches, and a draw is the mean."""
    q, p, *_ = pair()
    assert (q.batch_shape, q.event_shape, p.batch_shape) == ((5,), (LAYERS,), ())
    wide = q.expand(torch.Size(shape))
    assert wide.batch_shape == shape and wide.size == SIZE
    assert torch.equal(wide.rsample((4,)), torch.ones(4, *shape, LAYERS)) and torch.equal(p.mean, torch.zeros(LAYERS))
