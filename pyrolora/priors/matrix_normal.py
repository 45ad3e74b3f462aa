"""A matrix Normal prior: correlation between ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.matrix_normal import MatrixNormal as MatrixNormalDistribution
from pyrolora.priors.base import PriorError, positive


class MatrixNormal:
    """``θ ~ MN(0, K_rank ⊗ scale² I)``: the ranks of one adapter matrix are correlated, its features are not.

    Args:
        scale: Standard deviation of each element when ``K_rank`` has a unit diagonal, in the units of the weight.
        rank_correlation: ``ρ`` of an exchangeable ``K_rank = (1 − ρ) I + ρ 11ᵀ`` (valid for ``−1/(r−1) < ρ < 1``),
            or ``K_rank`` itself, an ``r × r`` positive-definite matrix.

    Shape: ``(layers, rank, in)`` for A and ``(layers, out, rank)`` for B; batch ``(layers,)``.

    Raises:
        PriorError: A site without a rank dimension, a matrix of another size, or one that is not symmetric and
            positive definite.
    """

    def __init__(self, scale: float, rank_correlation: float | Sequence[Sequence[float]] = 0.0):
        positive("MatrixNormal", scale=scale)
        self.scale = scale
        self.rank_correlation = rank_correlation

    def __call__(self, site: SiteGroup) -> MatrixNormalDistribution:
        if "rank" not in site.dims or site.event_dim != 2:
            raise PriorError(f"site {site.name!r} has no rank dimension: declare priors.Normal for it")
        rows = site.dims.index("rank") == 1
        factor = self.scale * self._cholesky(site, site.shape[1 if rows else 2])
        loc = torch.zeros(()).expand(site.shape)
        return MatrixNormalDistribution(loc, factor if rows else None, None if rows else factor)

    def _cholesky(self, site: SiteGroup, rank: int) -> Tensor:
        if isinstance(self.rank_correlation, int | float):
            covariance = (1 - self.rank_correlation) * torch.eye(rank) + self.rank_correlation
        else:
            covariance = torch.tensor(self.rank_correlation, dtype=torch.get_default_dtype())
        if covariance.shape != (rank, rank):
            shape = tuple(covariance.shape)
            raise PriorError(f"site {site.name!r}: rank_correlation is {shape}, the rank is {rank}")
        factor, failed = torch.linalg.cholesky_ex(covariance)
        # Cholesky reads one triangle only: symmetry is a check of its own.
        if failed or not torch.equal(covariance, covariance.mT):
            raise PriorError(
                f"site {site.name!r}: rank_correlation {self.rank_correlation} is not symmetric positive definite"
            )
        return factor
