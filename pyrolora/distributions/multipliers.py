"""Gaussian multipliers of the weights of a layer, many to a layer and known by two averages."""

from __future__ import annotations

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.types import _size


class Multipliers(TorchDistribution):
    """For each layer ``size`` independent ``w_j ~ N(loc, v_j)``, with ``W̄ ∘ w`` the weights that one example sees.

    A divergence needs the averages of ``1/v_j`` and ``log v_j`` over the layer alone, so that nothing as large as the
    weights is made for each example. The value stands for all multipliers of a layer; ``rsample`` returns ``loc``, the
    noise being added in activation space (see `bottleneck_noise`): for ``TraceMeanField_ELBO`` and its closed-form KL,
    not for ``Trace_ELBO``, which would take the density at the mean for that at a draw.

    Args:
        loc: Mean, 1 in a guide and 0 in a prior; broadcast against the rest.
        precision: Mean of ``1/v_j`` over a layer's weights, ``(*batch, layers)``.
        log_variance: Mean of ``log v_j``, the same shape.
        size: Number of multipliers to a layer.

    Shape: batch ``(*batch,)``, event ``(layers,)``.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's name and type
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, loc: Tensor, precision: Tensor, log_variance: Tensor, *, size: int = 1):
        self.loc, self.precision, self.log_variance = torch.broadcast_tensors(loc, precision, log_variance)
        self.size = size
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def expand(self, batch_shape: _size, _instance: object = None) -> Multipliers:
        shape = torch.Size(batch_shape) + self.event_shape
        parts = (part.expand(shape) for part in (self.loc, self.precision, self.log_variance))
        return Multipliers(*parts, size=self.size)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        return self.loc.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density where all multipliers of a layer have its value."""
        squared = (value - self.loc).square() * self.precision
        return -0.5 * self.size * (squared + self.log_variance + math.log(2 * math.pi)).sum(-1)


@register_kl(Multipliers, Multipliers)
def kl_multipliers(q: Multipliers, p: Multipliers) -> Tensor:
    """``Σ_layers ½ size [(α + (μ_q − μ_p)²) κ_p − 1 + λ_p − log α]`` nats, for q with one variance α to a layer.

    κ and λ are the averages of ``1/v`` and ``log v``. Shape: ``(*batch,)``.
    """
    squared = q.log_variance.exp() + (q.loc - p.loc).square()
    return 0.5 * q.size * (squared * p.precision - 1 + p.log_variance - q.log_variance).sum(-1)
