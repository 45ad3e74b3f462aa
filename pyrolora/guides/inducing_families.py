"""Families q(V) for whitened inducing matrices, batched over layers; the prior is white: ``V_ij ~ N(0, 1)``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.transforms import AffineAutoregressive
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrolora.distributions.full_normal import FullMatrixNormal
from pyrolora.distributions.matrix_normal import MatrixNormal


class Family(nn.Module, ABC):
    """An approximate posterior of whitened inducing matrices ``(layers, k_r, k_c)``.

    Args:
        start: Its mean at the start, ``(layers, k_r, k_c)``.
        scale: Its standard deviation at the start, of every entry.
    """

    def __init__(self, start: Tensor, scale: float):
        super().__init__()
        self.shape = start.shape

    def prior(self) -> MatrixNormal:
        """``V_ij ~ N(0, 1)``, batch ``(layers,)``, event ``(k_r, k_c)``."""
        return MatrixNormal(next(self.parameters()).new_zeros(self.shape))

    @abstractmethod
    def distribution(self) -> TorchDistributionMixin:
        """Batch ``(layers,)``, event ``(k_r, k_c)``."""

    @abstractmethod
    def mean(self) -> Tensor:
        """``E[V]``, ``(layers, k_r, k_c)``."""

    def variance(self) -> Tensor:
        """``var V_ij``, ``(layers, k_r, k_c)``."""
        return self.distribution().variance

    def divergence(self) -> Tensor:
        """``KL(q(V) ‖ N(0, I))`` in nats, ``(layers,)``."""
        return kl_divergence(self.distribution(), self.prior())  # type: ignore[arg-type]

    def scales(self) -> list[nn.Parameter]:
        """Parameters that are logarithms of scales: they want a learning rate of their own."""
        return [p for name, p in self.named_parameters() if name.startswith("log_")]


class Diagonal(Family):
    """``V_ij ~ N(μ_ij, σ_ij²)``."""

    def __init__(self, start: Tensor, scale: float):
        super().__init__(start, scale)
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(scale)))

    def distribution(self) -> TorchDistributionMixin:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(2)

    def mean(self) -> Tensor:
        return self.loc


class Matrix(Family):
    """``V ~ MN(M, L_r L_rᵀ, L_c L_cᵀ)``: covariance ``(L_c L_cᵀ) ⊗ (L_r L_rᵀ)`` for each layer."""

    def __init__(self, start: Tensor, scale: float):
        super().__init__(start, scale)
        layers, rows, columns = start.shape
        self.loc = nn.Parameter(start.clone())
        self.log_row = nn.Parameter(start.new_full((layers, rows), math.log(scale)))
        self.log_column = nn.Parameter(start.new_zeros(layers, columns))
        self.row = nn.Parameter(start.new_zeros(layers, rows, rows))
        self.column = nn.Parameter(start.new_zeros(layers, columns, columns))

    def distribution(self) -> TorchDistributionMixin:
        return MatrixNormal(self.loc, _tril(self.row, self.log_row), _tril(self.column, self.log_column))

    def mean(self) -> Tensor:
        return self.loc


class Full(Family):
    """``vec V ~ N(vec M, L Lᵀ)`` with L of ``k_r k_c × k_r k_c`` for each layer."""

    def __init__(self, start: Tensor, scale: float):
        super().__init__(start, scale)
        layers, size = start.shape[0], start.shape[1:].numel()
        self.loc = nn.Parameter(start.clone())
        self.log_diagonal = nn.Parameter(start.new_full((layers, size), math.log(scale)))
        self.lower = nn.Parameter(start.new_zeros(layers, size, size))

    def distribution(self) -> TorchDistributionMixin:
        return FullMatrixNormal(self.loc, _tril(self.lower, self.log_diagonal))

    def mean(self) -> Tensor:
        return self.loc


class Flow(Family):
    """A diagonal Normal pushed through masked autoregressive flows along each row; KL by one-sample Monte Carlo.

    ``V = T_depth ∘ … ∘ T_1(V₀)``, each ``T`` affine with ``shift, scale = net(earlier entries of the row)``; one net
    for all rows and layers of a group, every second one in reversed order. The nets' last layers start at zero, so
    that the flow starts as the identity.

    Args:
        start: As for every family.
        scale: As for every family.
        depth: Number of flows.
        hidden: Hidden units of each net for each entry of a row.

    Source: Papamakarios et al. 2017 (MAF); Germain et al. 2015 (MADE); Pyro's ``AffineAutoregressive``.
    """

    def __init__(self, start: Tensor, scale: float, depth: int = 1, hidden: int = 4):
        super().__init__(start, scale)
        size = start.shape[-1]
        if size < 2:
            raise ValueError("a flow along rows needs at least two inducing columns")
        self.loc = nn.Parameter(start.clone())
        self.log_scale = nn.Parameter(torch.full_like(start, math.log(scale)))
        orders = [torch.arange(size) if i % 2 == 0 else torch.arange(size).flip(0) for i in range(depth)]
        nets: list[Any] = [AutoRegressiveNN(size, [hidden * size], permutation=order) for order in orders]  # type: ignore[arg-type]
        for net in nets:
            nn.init.zeros_(net.layers[-1].weight)
            nn.init.zeros_(net.layers[-1].bias)
        self.nets = nn.ModuleList(nets).to(start.device)

    def distribution(self) -> TorchDistributionMixin:
        base = dist.Normal(self.loc, self.log_scale.exp()).to_event(2)
        return dist.TransformedDistribution(base, [AffineAutoregressive(net) for net in self.nets])

    def mean(self) -> Tensor:
        """Estimated from 256 draws of a fixed seed, the base's known mean as control variate."""
        base, value = self._draws()
        return self.loc + (value - base).mean(0)

    def variance(self) -> Tensor:
        """Estimated from the same draws, with the base's known variance."""
        base, value = self._draws()
        return ((2 * self.log_scale).exp() + value.var(0) - base.var(0)).clamp(min=0)

    @torch.no_grad()
    def divergence(self) -> Tensor:
        """Estimated from the same draws."""
        _, value = self._draws()
        return (self.distribution().log_prob(value) - self.prior().log_prob(value)).mean(0)

    @torch.no_grad()
    def _draws(self, num_draws: int = 256) -> tuple[Tensor, Tensor]:
        """Of the base, and what the flow makes of them."""
        q = self.distribution()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = value = q.base_dist.sample(torch.Size((num_draws,)))
        for transform in q.transforms:
            value = transform(value)
        return base, value


class Ensemble(Family):
    """Ens-U: equal point masses ``V₁ … V_K``, trained in turn as MAP estimates: ``E_k[−log p(V_k)]`` is their KL.

    Its members start around ``start`` with standard deviation ``scale`` and mean exactly ``start``. An evaluation uses
    one member, the same for all sites and layers.

    Args:
        start: As for every family.
        scale: As for every family.
        members: K.

    Source: Ritter et al. 2021, section 3.3 (Ens-U).
    """

    def __init__(self, start: Tensor, scale: float, members: int = 5):
        super().__init__(start, scale)
        noise = torch.randn(members, *start.shape, device=start.device, dtype=start.dtype)
        self.members = nn.Parameter(start + scale * (noise - noise.mean(0)))
        self.chosen: Tensor | None = None

    def distribution(self) -> TorchDistributionMixin:
        chosen = torch.randint(len(self.members), ()) if self.chosen is None else self.chosen
        return dist.Delta(self.members[chosen], event_dim=2)

    def mean(self) -> Tensor:
        return self.members.mean(0)

    def variance(self) -> Tensor:
        return self.members.var(0, correction=0)

    def divergence(self) -> Tensor:
        """The mean over members of what each costs as a point: ``−log p(V_k)``."""
        return -self.prior().log_prob(self.members).mean(0)


def _tril(lower: Tensor, log_diagonal: Tensor) -> Tensor:
    return lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
