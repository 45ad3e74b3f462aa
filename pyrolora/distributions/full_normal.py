"""A Normal over all entries of a matrix, with a full covariance."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.types import _size

from pyrolora.distributions.matrix_normal import MatrixNormal, check_regular


class FullMatrixNormal(TorchDistribution):
    """``vec X ~ N(vec M, L Lᵀ)``, where vec reads rows one after another; for small matrices: L is ``mn × mn``.

    Shapes: ``loc`` ``(*batch, m, n)``, ``scale_tril`` ``(*batch, mn, mn)``.

    Args:
        loc: Mean ``M``.
        scale_tril: Lower Cholesky factor ``L``.
        validate_args: As for every torch distribution; checks that the factor is not singular.

    Raises:
        ValueError: A factor of another size, or, where arguments are validated, a singular one.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own convention
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None):
        size = loc.shape[-2:].numel()
        if scale_tril.shape[-2:] != (size, size):
            raise ValueError(
                f"scale_tril has shape {tuple(scale_tril.shape)}; a {loc.shape[-2]} × {loc.shape[-1]} matrix needs "
                f"{size} × {size}"
            )
        self.loc = loc
        self.flat = dist.MultivariateNormal(loc.flatten(-2), scale_tril=scale_tril, validate_args=False)
        super().__init__(self.flat.batch_shape, loc.shape[-2:], validate_args=validate_args)
        if self._validate_args:
            check_regular("FullMatrixNormal", "scale_tril", scale_tril)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Elementwise variance."""
        return self.flat.variance.unflatten(-1, self.event_shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        return self.flat.rsample(sample_shape).unflatten(-1, self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.flat.log_prob(value.flatten(-2))

    def expand(self, batch_shape: _size, _instance: object = None) -> FullMatrixNormal:
        size = self.event_shape.numel()
        return FullMatrixNormal(
            self.loc.expand(*batch_shape, *self.event_shape), self.flat.scale_tril.expand(*batch_shape, size, size)
        )


@register_kl(FullMatrixNormal, MatrixNormal)
def kl_full_matrix_normal(q: FullMatrixNormal, p: MatrixNormal) -> Tensor:
    """KL from a matrix Normal with identity covariances, in nats: ``½(‖L‖² + ‖M − M_p‖² − mn) − log|L|``.

    Shape: ``(*batch,)``. Raises NotImplementedError (Pyro then samples) for other covariances.
    """
    if p.row_scale_tril is not None or p.column_scale_tril is not None:
        raise NotImplementedError("only identity covariances have this closed form")
    factor = q.flat.scale_tril
    squared = factor.square().sum((-2, -1)) + (q.loc - p.loc).square().sum((-2, -1))
    return 0.5 * (squared - q.event_shape.numel()) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
