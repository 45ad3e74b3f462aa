"""A Normal whose reparametrised draw is its mean, for noise that is added elsewhere."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.types import _size


class Centred(dist.Normal):
    """``N(loc, scale²)`` in every respect but one: ``rsample`` returns ``loc``.

    A guide that adds the noise in activation space (a draw of its own for each example) samples this at the site: the
    KL is that of the Normal, and the value placed on the model is the mean, to which the noise is added. That holds for
    the closed-form KL of ``TraceMeanField_ELBO`` alone: ``Trace_ELBO`` would take densities at the mean for those at a
    draw, and their difference is no divergence.
    """

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        return self.loc.expand(self._extended_shape(sample_shape))

    def expand(self, batch_shape: _size, _instance: object = None) -> Centred:
        return Centred(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)
