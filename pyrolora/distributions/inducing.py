"""A matrix given its inducing matrix: the conditional of a sparse Gaussian process over adapter matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution, TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import _standard_normal
from torch.types import _size

from pyrolora.distributions.matrix_normal import MatrixNormal

# Added to Z Zᵀ, as a fraction of its mean diagonal, before its Cholesky factor is taken.
JITTER = 1e-6


@dataclass(frozen=True)
class Side:
    """One side (rows, or columns) of an augmented matrix: size n, k inducing variables, batched over layers.

    With ``K = Z Zᵀ + D² = L Lᵀ`` and ``T = Zᵀ K⁻¹``, the whitened map is ``R = Zᵀ L⁻ᵀ = T L``, and ``P = T Z = R Rᵀ``
    is the part of the matrix that the inducing variables explain.

    Attributes:
        map: ``R``, ``(*batch, n, k)``.
        explained: A factor of ``G = Rᵀ R``, ``(*batch, k, k)``.
        remainder: A factor of ``I − G``, ``(*batch, k, k)``.
    """

    map: Tensor
    explained: Tensor
    remainder: Tensor

    @classmethod
    def of(cls, inducing: Tensor, log_diagonal: Tensor, *, where: str = "an inducing side") -> Side:
        """Computes the side from its parameters.

        Args:
            inducing: ``Z``, ``(*batch, k, n)``.
            log_diagonal: ``log D``, ``(*batch, k)``.
            where: What it belongs to, for the error.

        Raises:
            ValueError: A covariance that is not positive definite.
        """
        gram = inducing @ inducing.mT
        scale = log_diagonal.exp()
        factor = _cholesky(gram + torch.diag_embed(scale.square()), where)
        jitter = JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(scale.shape)
        solve = torch.linalg.solve_triangular
        return cls(
            solve(factor, inducing, upper=False).mT,
            solve(factor, _cholesky(gram + torch.diag_embed(jitter), where), upper=False),
            solve(factor, torch.diag_embed(scale), upper=False),
        )


@dataclass(frozen=True)
class Colouring:
    """A Gaussian matrix prior as an affine map of white noise: ``W = M + s ∘ (L_r X L_cᵀ)``, ``X_ij ~ N(0, 1)``.

    Attributes:
        loc: ``M``, broadcastable to the matrix.
        scale: ``s``, broadcastable to the matrix; other than a number only where there are no factors.
        row: ``L_r`` or None.
        column: ``L_c`` or None.
    """

    loc: Tensor
    scale: Tensor
    row: Tensor | None = None
    column: Tensor | None = None

    @classmethod
    def of(cls, prior: TorchDistributionMixin) -> Colouring:
        """The map of a Normal or matrix Normal prior.

        Raises:
            TypeError: Any other distribution.
        """
        if isinstance(prior, MatrixNormal):
            one = torch.ones_like(prior.loc[..., :1, :1])
            return cls(_narrow(prior.loc), one, prior.row_scale_tril, prior.column_scale_tril)
        base = prior.base_dist if isinstance(prior, dist.Independent) else prior
        if isinstance(base, dist.Normal):
            return cls(_narrow(base.loc), _narrow(base.scale))
        raise TypeError(f"{type(base).__name__} is not an affine map of white noise")

    def apply(self, function: Callable[[Tensor], Tensor]) -> Colouring:
        """The map with its tensors elsewhere, or of another type."""
        factors = (None if factor is None else function(factor) for factor in (self.row, self.column))
        return Colouring(function(self.loc), function(self.scale), *factors)

    def __call__(self, white: Tensor) -> Tensor:
        """The map."""
        return self.loc + self.scale * self._factors().color(white)

    def inverse(self, value: Tensor) -> Tensor:
        """White noise from a value."""
        return self._factors().whiten((value - self.loc) / self.scale)

    def log_det(self, shape: torch.Size) -> Tensor:
        """``log |dW / dX|`` for a matrix of ``shape``."""
        factors = MatrixNormal(self.loc.new_zeros(shape), self.row, self.column, validate_args=False).half_log_det()
        full = torch.broadcast_shapes(self.scale.shape, shape)
        return factors + self.scale.log().expand(full).sum((-2, -1))

    def _factors(self) -> MatrixNormal:
        rows = 1 if self.row is None else self.row.shape[-1]
        columns = 1 if self.column is None else self.column.shape[-1]
        return MatrixNormal(self.loc.new_zeros(rows, columns), self.row, self.column, validate_args=False)


class InducedMatrixNormal(TorchDistribution):
    """``W | V``: the conditional matrix Normal of a sparse Gaussian process, with its noise scaled by λ.

    ``W = colour( R_r V R_cᵀ + λ N ),   cov vec N = I − P_c ⊗ P_r``

    At λ = 1 it is the prior's own conditional: with ``V ~ N(0, I)`` the marginal of W is the declared prior, exactly.
    ``N`` is drawn by Matheron's rule, ``N = E₁ − R_r V̄ R_cᵀ`` with ``V̄ = R_rᵀ E₁ R_c + C_r E₂ F_cᵀ + F_r E₃``, where
    ``C Cᵀ = Rᵀ R`` and ``F Fᵀ = I − Rᵀ R``: three matrices of white noise, and no matrix of the size of a covariance.

    ``KL(λ_q ‖ λ_p) = (m n / 2)(ρ − 1 − log ρ)`` nats, ``ρ = (λ_q/λ_p)²``: exact, and the same for every V.

    Shapes: batch ``(layers,)``, event ``(m, n)``.

    Args:
        white: The whitened inducing matrix ``V``, ``(*batch, k_r, k_c)``.
        row: The side of the rows; None is the exact side, ``R_r = I``.
        column: The side of the columns; None is the exact side.
        noise: λ, ``(*batch,)``; None is λ = 0, a point mass at the conditional mean.
        colour: The declared prior as a map of white noise.

    Source: Lin et al. 2026 (Bayesian-LoRA); Ritter et al. 2021, eq. 8–12; Matheron's rule: Wilson et al. 2020, eq. 9.
    """

    arg_constraints = {}  # noqa: RUF012 - torch's own convention
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, white: Tensor, row: Side | None, column: Side | None, *, noise: Tensor | None, colour: Colouring
    ):
        self.white, self.row, self.column, self.noise, self.colour = white, row, column, noise, colour
        rows = white.shape[-2] if row is None else row.map.shape[-2]
        columns = white.shape[-1] if column is None else column.map.shape[-2]
        super().__init__(white.shape[:-2], torch.Size((rows, columns)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.colour(self._explain(self.white))

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        white = self._explain(self.white).expand(self._extended_shape(sample_shape))
        if self.noise is not None:
            white = white + self.noise[..., None, None] * self.residual(sample_shape)
        return self.colour(white)

    def residual(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        """``N``, white noise without the part that the inducing matrix explains: ``(*sample, *batch, m, n)``."""
        white, row, column = self.white, self.row, self.column
        noise = self._standard(self._extended_shape(sample_shape))
        inner = noise if row is None else row.map.mT @ noise
        inner = inner if column is None else inner @ column.map
        small = torch.Size((*sample_shape, *white.shape))
        if column is not None:
            rest = self._standard(small) @ column.remainder.mT
            inner = inner + (rest if row is None else row.explained @ rest)
        if row is not None:
            inner = inner + row.remainder @ self._standard(small)
        return noise - self._explain(inner)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density; at λ = 0 zero at the conditional mean and −∞ elsewhere."""
        rest = self.colour.inverse(value) - self._explain(self.white)
        if self.noise is None:
            near = (rest.abs() <= 1e-4 * (1 + self._explain(self.white).abs())).flatten(-2).all(-1)
            return torch.where(near, 0.0, -math.inf)
        # Woodbury: (I − R Rᵀ)⁻¹ = I + R (I − RᵀR)⁻¹ Rᵀ with R = R_c ⊗ R_r, and det(I − R Rᵀ) = det(I − RᵀR).
        inside = rest if self.row is None else self.row.map.mT @ rest
        inside = inside if self.column is None else inside @ self.column.map
        squared, half_log_det = self._left(inside)
        squared = squared + rest.square().sum((-2, -1))
        size = self.event_shape.numel()
        log_det = half_log_det + size * self.noise.log() + self.colour.log_det(self.event_shape)
        return -0.5 * (squared / self.noise.square() + size * math.log(2 * math.pi)) - log_det

    def expand(self, batch_shape: _size, _instance: object = None) -> InducedMatrixNormal:
        white = self.white.expand(*batch_shape, *self.white.shape[-2:])
        return InducedMatrixNormal(white, self.row, self.column, noise=self.noise, colour=self.colour)

    def _left(self, inside: Tensor) -> tuple[Tensor, Tensor]:
        """``tᵀ M⁻¹ t`` and ``½ log det M`` of ``M = I − G_c ⊗ G_r``, what the inducing variables leave in their span.

        Without a difference, which rounds to nothing where they explain nearly all: with ``S = I − G = F Fᵀ`` it is
        ``S_c ⊗ I + G_c ⊗ S_r``, and where one side is exact it is the other's S.
        """
        if self.row is None or self.column is None:
            side, t = (self.column, inside.mT) if self.row is None else (self.row, inside)
            assert side is not None, "with two exact sides V is all of the matrix, and there is no noise"
            white = torch.linalg.solve_triangular(side.remainder, t, upper=False)
            diagonal = side.remainder.diagonal(dim1=-2, dim2=-1)
            return white.square().sum((-2, -1)), t.shape[-1] * diagonal.log().sum(-1)
        r_r, r_c, f_r, f_c = (
            x.double() for x in (self.row.map, self.column.map, self.row.remainder, self.column.remainder)
        )
        one = torch.eye(r_r.shape[-1], dtype=r_r.dtype, device=r_r.device)
        left = _kronecker(one, f_c @ f_c.mT) + _kronecker(f_r @ f_r.mT, r_c.mT @ r_c)
        factor = _cholesky(left, "an inducing matrix")
        white = torch.linalg.solve_triangular(factor, inside.double().flatten(-2).unsqueeze(-1), upper=False)
        half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return white.square().sum((-2, -1)).to(inside.dtype), half_log_det.to(inside.dtype)

    def _explain(self, white: Tensor) -> Tensor:
        """``R_r V R_cᵀ``."""
        white = white if self.row is None else self.row.map @ white
        return white if self.column is None else white @ self.column.map.mT

    def _standard(self, shape: torch.Size) -> Tensor:
        return _standard_normal(shape, dtype=self.white.dtype, device=self.white.device)


@register_kl(InducedMatrixNormal, InducedMatrixNormal)
def kl_induced(q: InducedMatrixNormal, p: InducedMatrixNormal) -> Tensor:
    """Divergence of two conditionals that differ in λ alone (same V, sides and prior), in nats: ``(*batch,)``."""
    if q.noise is None and p.noise is None:
        return q.white.new_zeros(q.batch_shape)
    if q.noise is None or p.noise is None:
        raise NotImplementedError("a point mass has no finite divergence from a density")
    ratio = (q.noise / p.noise).square()
    return (0.5 * q.event_shape.numel() * (ratio - 1 - ratio.log())).expand(q.batch_shape)


def _cholesky(matrix: Tensor, where: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.device.type != "meta" and bool(info.any()):
        raise ValueError(
            f"{where}: the covariance of its inducing variables is not positive definite (rows of Z have become "
            "dependent or are not finite). Use fewer inducing variables, or a smaller learning rate"
        )
    return factor


def _narrow(tensor: Tensor) -> Tensor:
    """An expanded tensor without its copies: of size 1 where it was expanded."""
    return tensor[tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())]


def _kronecker(left: Tensor, right: Tensor) -> Tensor:
    """``left ⊗ right``, batched: of a matrix whose rows stand one after another, ``left`` acts on the rows."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2, -1)
