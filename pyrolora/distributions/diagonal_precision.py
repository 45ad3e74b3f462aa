"""A Normal over a matrix whose precision is a diagonal curvature plus a multiple of the identity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl
from torch.distributions.utils import _standard_normal
from torch.types import _size


class DiagonalPrecisionNormal(TorchDistribution):
    """``X_ij ~ N(M_ij, 1/(λ + h_ij))``: the Laplace approximation with a diagonal curvature ``h``.

    The counterpart of `LowRankKroneckerNormal` without correlations: the same questions, answered elementwise.

    Shapes: batch ``(layers,)``; event ``(rows, columns)``. λ broadcasts over the batch.

    Args:
        loc: Mean ``M``, ``(*batch, rows, columns)``.
        curvature: ``h ≥ 0``, of the shape of ``loc``.
        precision: ``λ > 0``, ``(*batch,)`` or a number: one over the prior's variance.
        validate_args: As for every torch distribution.

    Source: MacKay 1992; Daxberger et al. 2021 (``diag`` structure).
    """

    arg_constraints = {  # noqa: RUF012 - torch's own convention
        "loc": constraints.independent(constraints.real, 2),
        "curvature": constraints.independent(constraints.nonnegative, 2),
        "precision": constraints.positive,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, curvature: Tensor, *, precision: Tensor | float, validate_args: bool | None = None):
        if curvature.shape[-2:] != loc.shape[-2:]:
            raise ValueError(f"curvature has shape {tuple(curvature.shape)}; loc has {tuple(loc.shape)}")
        self.precision = torch.as_tensor(precision, dtype=loc.dtype, device=loc.device)
        batch = torch.broadcast_shapes(loc.shape[:-2], curvature.shape[:-2], self.precision.shape)
        self.curvature = curvature
        self.loc = loc.expand(*batch, *loc.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return self._eigenvalues().reciprocal().expand(self.loc.shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        noise = _standard_normal(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + noise * self._eigenvalues().rsqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        squared = ((value - self.loc).square() * self._eigenvalues()).sum((-2, -1))
        return -0.5 * (squared + self.event_shape.numel() * math.log(2 * math.pi) - self.log_det_precision())

    def entropy(self) -> Tensor:
        """Differential entropy in nats, ``(*batch,)``."""
        return 0.5 * (self.event_shape.numel() * (1 + math.log(2 * math.pi)) - self.log_det_precision())

    def log_det_precision(self) -> Tensor:
        """``Σ log(λ + h)``, ``(*batch,)``."""
        return (self.event_shape.numel() * self.precision.log() + self.log_det_ratio()).expand(self.batch_shape)

    def log_det_ratio(self) -> Tensor:
        """``log|P / λ| = Σ log(1 + h/λ)``, what the data add to the prior's log-determinant; ``(*batch,)``."""
        ratio = self.curvature / self.precision[..., None, None]
        return torch.log1p(ratio).sum((-2, -1)).expand(self.batch_shape)

    def effective_dimension(self) -> Tensor:
        """Number of entries that the data determine, ``Σ h/(λ + h)`` (MacKay 1992); ``(*batch,)``."""
        return (self.curvature / self._eigenvalues()).sum((-2, -1)).expand(self.batch_shape)

    def covariance_of(self, jacobian: Tensor) -> Tensor:
        """Covariance ``J P⁻¹ Jᵀ`` of outputs that are linear in X, batch entry by batch entry.

        Args:
            jacobian: Slices of K outputs' Jacobian, ``(*batch, *examples, K, *event)``; ``examples`` may be empty.

        Returns:
            ``(*batch, *examples, K, K)``.
        """
        between = (1,) * (jacobian.dim() - 2 - len(self.batch_shape))
        scale = self._eigenvalues().rsqrt().expand(self.loc.shape)
        rows = (jacobian * scale.reshape(*self.batch_shape, *between, *self.event_shape)).flatten(-2)
        return rows @ rows.mT

    def covariance_by_precision(self, jacobian: Tensor) -> Callable[[Tensor | float], Tensor]:
        """`covariance_of` as a function of λ."""
        return lambda precision: self.with_precision(precision).covariance_of(jacobian)

    def with_precision(self, precision: Tensor | float) -> DiagonalPrecisionNormal:
        """The same mean and curvature under another λ."""
        return DiagonalPrecisionNormal(self.loc, self.curvature, precision=precision, validate_args=self._validate_args)

    def expand(self, batch_shape: _size, _instance: object = None) -> DiagonalPrecisionNormal:
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return DiagonalPrecisionNormal(loc, self.curvature, precision=self.precision, validate_args=self._validate_args)

    def _eigenvalues(self) -> Tensor:
        return self.precision[..., None, None] + self.curvature


@register_kl(DiagonalPrecisionNormal, Independent)
def kl_diagonal_precision_normal(q: DiagonalPrecisionNormal, p: Independent) -> Tensor:
    """KL from an elementwise Normal, in nats, ``(*batch,)``; NotImplementedError (Pyro then samples) for any other."""
    base = p.base_dist
    if not isinstance(base, Normal) or len(p.event_shape) != 2:
        raise NotImplementedError("only an elementwise Normal prior over matrices has this closed form")
    own = Normal(q.loc, q.variance.sqrt(), validate_args=False)
    return torch.distributions.kl_divergence(own, Normal(base.loc, base.scale, validate_args=False)).sum((-2, -1))
