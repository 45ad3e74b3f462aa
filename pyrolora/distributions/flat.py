"""The flat (improper) prior as a distribution object."""

from __future__ import annotations

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.types import _size


class Flat(TorchDistribution):
    """The improper uniform over real arrays: ``log p(x) = 0`` everywhere.

    It has no draws. ``sample`` returns ``start``, so that a program with flat sites can still be traced: what one sees
    is the point estimate's starting value, not a draw from a prior.

    Args:
        start: The value that stands in for a draw, ``(*batch, *event)``.
        event_dim: Number of event dimensions.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own convention
    has_rsample = True

    def __init__(self, start: Tensor, event_dim: int, validate_args: bool | None = None):
        self.start = start
        split = start.dim() - event_dim
        super().__init__(start.shape[:split], start.shape[split:], validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        return self.start.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(batch, self.batch_shape))

    def expand(self, batch_shape: _size, _instance: object = None) -> Flat:
        return Flat(self.start.expand(*batch_shape, *self.event_shape), len(self.event_shape))
