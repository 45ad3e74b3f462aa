from __future__ import annotations

import torch

from pyrolora.distributions.flat import Flat as FlatDistribution
from pyrolora.priors.flat import Flat


def test_density_is_one_everywhere(group):
    """Law: log p(θ) = 0 for each layer, whatever θ, and the stand-in for a draw is zeros."""
    for shape in (("A", 3, 2, 5), ("head", 1, 4)):
        site = group(*shape)
        fn = Flat()(site)
        assert isinstance(fn, FlatDistribution) and fn.batch_shape == (shape[1],)
        assert fn.event_shape == site.event_shape
        assert torch.equal(fn.log_prob(torch.full(site.shape, 1e6)), torch.zeros(shape[1]))
        assert torch.equal(fn.sample(), torch.zeros(site.shape))
