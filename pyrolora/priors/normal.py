"""Independent Normal priors with a declared scale."""

from __future__ import annotations

import math

import pyro.distributions as dist
from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyrolora.adapters.sites import SiteGroup
from pyrolora.priors.base import PriorError, positive


class Normal:
    """``θ_ij ~ N(0, scale²)``, independent.

    Args:
        scale: The standard deviation, in the units of the weight; or ``"fan_in"`` for ``1/√fan_in`` (LeCun's rule:
            outputs of unit variance for inputs of unit variance), where fan-in is the site's last dimension.

    Shape: ``(layers, *event_shape)``, batch ``(layers,)``.

    Raises:
        PriorError: A scale that is neither a positive finite number nor ``"fan_in"``.
    """

    def __init__(self, scale: float | str):
        if not isinstance(scale, str):
            positive("Normal", scale=scale)
        elif scale != "fan_in":
            raise PriorError(f'Normal: scale is a positive number or "fan_in", not {scale!r}')
        self.scale = scale

    def __call__(self, site: SiteGroup) -> TorchDistributionMixin:
        return dist.Normal(0.0, self.standard_deviation(site)).expand(site.shape).to_event(site.event_dim)

    def standard_deviation(self, site: SiteGroup) -> float:
        """The standard deviation at a site."""
        return 1 / math.sqrt(site.fan_in) if isinstance(self.scale, str) else float(self.scale)
