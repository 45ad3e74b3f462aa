"""The matrix Normal, with either covariance allowed to be the identity so that no d × d matrix is ever made."""

from __future__ import annotations

import math

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import _standard_normal
from torch.types import _size


class MatrixNormal(TorchDistribution):
    """Matrix Normal ``X = M + L_r E L_cᵀ`` with ``E_ij ~ N(0, 1)``: ``cov vec(X) = (L_c L_cᵀ) ⊗ (L_r L_rᵀ)``,
    where vec stacks columns.

    ``log p(X) = −½ ‖L_r⁻¹ (X − M) L_c⁻ᵀ‖² − n log|L_r| − m log|L_c| − ½ m n log 2π``

    Shapes: ``loc`` is ``(*batch, m, n)``, ``row_scale_tril`` ``(*batch, m, m)``, ``column_scale_tril``
    ``(*batch, n, n)``; a side given as None is the identity and costs nothing.

    Args:
        loc: Mean ``M``.
        row_scale_tril: Lower Cholesky factor ``L_r`` of the covariance between rows.
        column_scale_tril: Lower Cholesky factor ``L_c`` of the covariance between columns.
        validate_args: As for every torch distribution; checks that no factor is singular.

    Raises:
        ValueError: Factors of another size, or, where arguments are validated, a singular one.

    Source: Gupta & Nagar 1999, Matrix Variate Distributions, theorem 2.2.1 and section 2.3.
    """

    arg_constraints = {"loc": constraints.independent(constraints.real, 2)}  # noqa: RUF012 - torch's own convention
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        row_scale_tril: Tensor | None = None,
        column_scale_tril: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        rows, columns = loc.shape[-2:]
        for side, factor, size in (("row", row_scale_tril, rows), ("column", column_scale_tril, columns)):
            if factor is not None and factor.shape[-2:] != (size, size):
                raise ValueError(
                    f"{side}_scale_tril has shape {tuple(factor.shape)}; a {rows} × {columns} matrix "
                    f"needs {size} × {size}"
                )
        factors = [f.shape[:-2] for f in (row_scale_tril, column_scale_tril) if f is not None]
        batch = torch.broadcast_shapes(loc.shape[:-2], *factors)
        self.loc = loc.expand(*batch, rows, columns)
        self.row_scale_tril = row_scale_tril
        self.column_scale_tril = column_scale_tril
        super().__init__(batch, torch.Size((rows, columns)), validate_args=validate_args)
        if self._validate_args:
            check_regular("MatrixNormal", "row_scale_tril", row_scale_tril)
            check_regular("MatrixNormal", "column_scale_tril", column_scale_tril)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Elementwise variance ``diag(K_r) diag(K_c)ᵀ``."""
        return (row_variance(self).unsqueeze(-1) * column_variance(self).unsqueeze(-2)).expand(self.loc.shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        noise = _standard_normal(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.color(noise)

    def color(self, noise: Tensor) -> Tensor:
        """``L_r E L_cᵀ``."""
        noise = noise if self.row_scale_tril is None else self.row_scale_tril @ noise
        return noise if self.column_scale_tril is None else noise @ self.column_scale_tril.mT

    def whiten(self, value: Tensor) -> Tensor:
        """``L_r⁻¹ X L_c⁻ᵀ``, the inverse of `color`."""
        if self.row_scale_tril is not None:
            value = torch.linalg.solve_triangular(self.row_scale_tril, value, upper=False)
        if self.column_scale_tril is not None:
            value = torch.linalg.solve_triangular(self.column_scale_tril, value.mT, upper=False).mT
        return value

    def half_log_det(self) -> Tensor:
        """``n log|L_r| + m log|L_c|``: half the log-determinant of the covariance of ``vec(X)``."""
        rows, columns = self.event_shape
        return columns * log_det_tril(self.row_scale_tril) + rows * log_det_tril(self.column_scale_tril)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        squared = self.whiten(value - self.loc).square().sum((-2, -1))
        return -0.5 * (squared + self.event_shape.numel() * math.log(2 * math.pi)) - self.half_log_det()

    def expand(self, batch_shape: _size, _instance: object = None) -> MatrixNormal:
        return MatrixNormal(
            self.loc.expand(*batch_shape, *self.event_shape),
            self.row_scale_tril,
            self.column_scale_tril,
            validate_args=False,
        )


def log_det_tril(factor: Tensor | None) -> Tensor:
    """``log|L|`` of a lower-triangular factor; zero for the identity."""
    return torch.zeros(()) if factor is None else factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def check_regular(where: str, name: str, factor: Tensor | None) -> None:
    """Stops at a lower-triangular factor without an inverse: log densities would be NaN and divergences infinite.

    Raises:
        ValueError: An entry of the diagonal that is not a positive number.
    """
    if factor is None:
        return
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    if not bool((diagonal > 0).all()):
        raise ValueError(
            f"{where}: {name} is singular: its diagonal holds {float(diagonal[~(diagonal > 0)][0]):.3g}, where only "
            "positive numbers have a density. Give a Cholesky factor of a positive definite matrix; a learnt one has "
            "lost a direction to underflow: lower its learning rate"
        )


def row_variance(matrix: MatrixNormal) -> Tensor:
    """``diag(L_r L_rᵀ)``."""
    return _diagonal(matrix.row_scale_tril, matrix.event_shape[0], matrix.loc)


def column_variance(matrix: MatrixNormal) -> Tensor:
    """``diag(L_c L_cᵀ)``."""
    return _diagonal(matrix.column_scale_tril, matrix.event_shape[1], matrix.loc)


def _diagonal(factor: Tensor | None, size: int, like: Tensor) -> Tensor:
    return like.new_ones(size) if factor is None else factor.square().sum(-1)
