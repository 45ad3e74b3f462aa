"""Subspace inference: one random number for each rank of each layer (ScalaBL)."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.distributions.inducing import Colouring, InducedMatrixNormal
from pyrolora.guides.base import Card
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.inducing_families import Diagonal, Family
from pyrolora.program import Latent


class Subspace(Inducing):
    """``ΔW = s · B diag(v) A`` with ``q(v) = N(μ, σ²)``, ``p(v) = N(0, prior_scale²)``, v ∈ R^r for each layer.

    ``KL(q ‖ p) = Σ_i ½ (μ_i² + σ_i²)/τ² − ½ − log(σ_i/τ)``, τ the prior scale. B and A are point estimates under their
    declared priors, and carry whatever v cannot. The product form of `Inducing` with a diagonal V: v is the site
    ``<site>.V``, and the A (or B) that it multiplies ``<site>.T``. It starts at v = 1, the adapter as it is.

    Args:
        random: Pattern(s) of the adapter matrices that v multiplies; of A and B, if both match, A.
        prior_scale: τ; at 1 a v that starts at 1 is what the prior expects.
        init_scale: σ at the start.
        scale_learning_rate: Learning rate of log σ as a multiple of the weights'.

    Source: Samplawski et al. 2025 (arXiv 2506.21408); its public code has the KL reversed.
    """

    card = Card("a number for each rank of each layer", "1 a step", "S")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "*.A",
        prior_scale: float = 1.0,
        init_scale: float = 0.1,
        scale_learning_rate: float = 7.0,
    ):
        if not prior_scale > 0:
            raise ValueError(f"Subspace: prior_scale is positive, not {prior_scale!r}")
        super().__init__(
            structure="product", random=random, init_scale=init_scale, scale_learning_rate=scale_learning_rate
        )
        self.prior_scale = prior_scale

    def _make(self, start: Tensor) -> Family:
        return _Scales(start.diagonal(dim1=-2, dim2=-1), self.init_scale, self.prior_scale)

    def _given(self, latent: Latent, white: Tensor, map_: Tensor | None, noise: Tensor | None) -> InducedMatrixNormal:
        """``W | v``: the rows of A, or the columns of B, each times its number; no noise of its own."""
        assert map_ is not None and latent.group is not None
        value = white.unsqueeze(-1 if latent.group.role == "A" else -2) * map_
        plain = Colouring(value.new_zeros(()), value.new_ones(()))
        return InducedMatrixNormal(value, None, None, noise=None, colour=plain)


class _Scales(Diagonal):
    """``v_i ~ N(μ_i, σ_i²)``, ``(layers, r)``."""

    def __init__(self, start: Tensor, scale: float, prior_scale: float):
        super().__init__(start, scale)
        self.prior_scale = prior_scale

    def prior(self) -> TorchDistributionMixin:  # type: ignore[override]
        return dist.Normal(torch.zeros_like(self.loc), self.prior_scale).to_event(1)

    def distribution(self) -> TorchDistributionMixin:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
