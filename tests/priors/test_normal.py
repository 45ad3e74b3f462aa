from __future__ import annotations

import math

import pytest
import torch

from pyrolora.priors.base import PriorError
from pyrolora.priors.normal import Normal


@pytest.mark.parametrize("shape", [("A", 3, 2, 5), ("B", 3, 7, 2), ("head", 1, 4, 6), ("head", 1, 4)])
def test_density_by_hand(group, shape):
    """Law: log p(θ) = Σ_ij −½ (θ/s)² − log s − ½ log 2π, one sum for each layer, for matrices and biases."""
    site = group(*shape)
    value = torch.randn(site.shape, generator=torch.Generator().manual_seed(0))
    fn = Normal(0.3)(site)
    terms = -0.5 * (value / 0.3) ** 2 - math.log(0.3) - 0.5 * math.log(2 * math.pi)
    assert fn.batch_shape == (shape[1],) and fn.event_shape == site.event_shape
    torch.testing.assert_close(fn.log_prob(value), terms.flatten(1).sum(1))


@pytest.mark.parametrize(("shape", "fan_in"), [(("A", 3, 2, 5), 5), (("B", 3, 7, 2), 2), (("head", 1, 4), 1)])
def test_fan_in(group, shape, fan_in):
    """Law: "fan_in" is s = 1/√(inputs of one output): in-features for A, the rank for B, 1 for a bias."""
    site = group(*shape)
    assert Normal("fan_in").standard_deviation(site) == pytest.approx(fan_in**-0.5)
    torch.testing.assert_close(Normal("fan_in")(site).variance, torch.full(site.shape, 1 / fan_in))


def test_fan_in_keeps_the_variance_of_inputs(group):
    """Law: under "fan_in", unit-variance inputs give outputs of unit variance, within five Monte Carlo errors."""
    torch.manual_seed(0)
    weight, x = Normal("fan_in")(group("A", 200, 20, 50)).sample(), torch.randn(50)
    squared = (weight @ (x / x.square().mean().sqrt())).square().flatten()
    assert abs(squared.mean() - 1) < 5 * math.sqrt(2 / squared.numel())


@pytest.mark.parametrize("scale", [0, -0.1, float("nan"), float("inf"), "fanin", "0.1", None, [0.1]])
def test_other_scales_are_refused(scale):
    """Law: a scale is a positive finite number or "fan_in"; anything else is an error that names the value."""
    with pytest.raises(PriorError, match=r"Normal: scale is a positive number"):
        Normal(scale)
