"""Priors whose scale is itself unknown: per layer, per rank (ARD), and the regularised horseshoe.

Each samples hyper-sites named ``<site>.<hyper>``. Under a point estimate of the weights such scales have no useful
joint mode (the density grows without bound as scale and weights shrink to zero together), so guides learn a
hyper-parameter only where its weights are random, and keep it at its prior median elsewhere.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup
from pyrolora.priors.base import PriorError, positive


class Hierarchical:
    """A scale per layer: ``s_l ~ LogNormal(log scale, spread²)``, ``θ_lij ~ N(0, s_l²)``.

    Args:
        scale: Prior median of the layer's standard deviation, in the units of the weight.
        spread: Standard deviation of ``log s_l``; 1 lets a layer differ from the median by about a factor e.

    Hyper-site: ``<site>.scale``, shape ``(layers,)``.

    Source: Gelman 2006, Bayesian Analysis 1(3), on the choice of hyper-priors for scales.
    """

    def __init__(self, scale: float = 0.05, spread: float = 1.0):
        positive("Hierarchical", scale=scale, spread=spread)
        self.scale = scale
        self.spread = spread

    def __call__(self, site: SiteGroup) -> TorchDistributionMixin:
        hyper = dist.LogNormal(math.log(self.scale), self.spread).expand([site.num_layers]).to_event(1)
        scale = pyro.sample(f"{site.name}.scale", hyper)
        return _normal(site, scale.reshape(-1, *[1] * site.event_dim))


class ARD:
    """A scale per layer and rank (automatic relevance determination): ranks that are not needed shrink to zero.

    ``s_lk ~ LogNormal(log scale, spread²)``, ``θ_l,k,j ~ N(0, s_lk²)`` for every element of rank k.

    Args:
        scale: Prior median of a rank's standard deviation, in the units of the weight.
        spread: Standard deviation of ``log s_lk``.

    Hyper-site: ``<site>.scale``, shape ``(layers, rank)``.

    Raises:
        PriorError: A site without a rank dimension.

    Source: Neal 1996, Bayesian Learning for Neural Networks, section 1.2.3 (ARD).
    """

    def __init__(self, scale: float = 0.05, spread: float = 1.0):
        positive("ARD", scale=scale, spread=spread)
        self.scale = scale
        self.spread = spread

    def __call__(self, site: SiteGroup) -> TorchDistributionMixin:
        shape = _rank_shape(site)
        hyper = dist.LogNormal(math.log(self.scale), self.spread).expand(shape).to_event(2)
        return _normal(site, _along_rank(site, pyro.sample(f"{site.name}.scale", hyper)))


class Horseshoe:
    """The regularised horseshoe over ranks: most ranks near zero, a few free up to the slab's width.

    ``τ ~ HalfCauchy(scale)``, ``λ_lk ~ HalfCauchy(1)``, ``c² ~ InvGamma(ν/2, ν slab²/2)``,
    ``λ̃² = c²λ²/(c² + τ²λ²)``, ``θ_l,k,j ~ N(0, τ²λ̃_lk²)``; one local scale per layer and rank (grouped).

    Args:
        scale: Scale of the global ``τ``, in the units of the weight: where one expects the useless ranks.
        slab_scale: Width of the slab that bounds the free ranks, in the units of the weight.
        slab_df: Degrees of freedom ν of the slab.

    Hyper-sites: ``<site>.tau`` ``()``, ``<site>.local`` ``(layers, rank)``, ``<site>.slab`` ``()``.

    Raises:
        PriorError: A site without a rank dimension.

    Source: Piironen & Vehtari 2017, Electronic Journal of Statistics 11(2), eq. 2.8.
    """

    def __init__(self, scale: float = 0.01, slab_scale: float = 0.2, slab_df: float = 4.0):
        positive("Horseshoe", scale=scale, slab_scale=slab_scale, slab_df=slab_df)
        self.scale = scale
        self.slab_scale = slab_scale
        self.slab_df = slab_df

    def __call__(self, site: SiteGroup) -> TorchDistributionMixin:
        shape = _rank_shape(site)
        tau = pyro.sample(f"{site.name}.tau", dist.HalfCauchy(self.scale))
        local = pyro.sample(f"{site.name}.local", dist.HalfCauchy(1.0).expand(shape).to_event(2))
        half = self.slab_df / 2
        slab = pyro.sample(f"{site.name}.slab", dist.InverseGamma(half, half * self.slab_scale**2))
        # τλ̃ = cτλ/√(c² + τ²λ²): half-Cauchy tails are long, and hypot does not overflow where the squares would.
        width, free = slab.sqrt(), tau * local
        return _normal(site, _along_rank(site, width * (free / torch.hypot(width, free))))


def _normal(site: SiteGroup, scale: Tensor) -> TorchDistributionMixin:
    loc = torch.zeros((), dtype=scale.dtype, device=scale.device)
    return dist.Normal(loc, scale).expand(site.shape).to_event(site.event_dim)


def _rank_shape(site: SiteGroup) -> list[int]:
    if "rank" not in site.dims:
        raise PriorError(f"site {site.name!r} has no rank dimension: declare priors.Normal or Hierarchical for it")
    return [site.num_layers, site.shape[site.dims.index("rank")]]


def _along_rank(site: SiteGroup, scale: Tensor) -> Tensor:
    """``(layers, rank)`` → broadcastable to the site."""
    return scale.unsqueeze(-1 if site.dims.index("rank") == 1 else -2)
