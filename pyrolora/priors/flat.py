"""No prior: the site gets a point estimate by maximum likelihood."""

from __future__ import annotations

import torch

from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.flat import Flat as FlatDistribution


class Flat:
    """``log p(θ) = 0``: the improper flat prior. Every guide gives such a site a point estimate.

    With `Flat` on all sites, `guides.MAP` is plain LoRA (maximum likelihood). A flat site has no prior draws:
    ``program.prior_predictive`` leaves it at PEFT's weights, and Pyro's own ``Predictive`` sees zeros.
    """

    def __call__(self, site: SiteGroup) -> FlatDistribution:
        return FlatDistribution(torch.zeros(()).expand(site.shape), site.event_dim)
