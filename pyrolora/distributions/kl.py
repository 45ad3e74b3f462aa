"""Closed-form Kullback–Leibler divergences, registered with ``torch.distributions.kl_divergence``.

With these, `TraceMeanField_ELBO` and `TemperedELBO` need no Monte Carlo for the KL of a Gaussian guide.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, register_kl

from pyrolora.distributions.matrix_normal import MatrixNormal, log_det_tril


@register_kl(Independent, MatrixNormal)
def kl_independent_matrix_normal(q: Independent, p: MatrixNormal) -> Tensor:
    """KL of an elementwise Normal ``N(M, s²)`` from a matrix Normal ``MN(M_p, K_r, K_c)``, in nats.

    ``½[ Σ_ij s_ij² (K_r⁻¹)_ii (K_c⁻¹)_jj + ‖L_r⁻¹(M − M_p)L_c⁻ᵀ‖² − mn ] + ½ log|K_c ⊗ K_r| − Σ log s_ij``

    Shape: ``(*batch,)``. Raises NotImplementedError (Pyro then samples) where ``q`` is not a Normal.
    """
    if not isinstance(q.base_dist, Normal) or len(q.event_shape) != 2:
        raise NotImplementedError("only an elementwise Normal over matrices has this closed form")
    scale = q.base_dist.scale
    rows, columns = q.event_shape
    row, column = _inverse_diagonal(p.row_scale_tril, rows, p), _inverse_diagonal(p.column_scale_tril, columns, p)
    trace = (scale.square() * row.unsqueeze(-1) * column.unsqueeze(-2)).sum((-2, -1))
    squared = p.whiten(q.base_dist.loc - p.loc).square().sum((-2, -1))
    return 0.5 * (trace + squared - rows * columns) + p.half_log_det() - scale.log().sum((-2, -1))


@register_kl(MatrixNormal, MatrixNormal)
def kl_matrix_normal_matrix_normal(q: MatrixNormal, p: MatrixNormal) -> Tensor:
    """KL between matrix Normals, in nats.

    ``½[ tr(K_r⁻¹ Q_r) tr(K_c⁻¹ Q_c) + ‖L_r⁻¹(M_q − M_p)L_c⁻ᵀ‖² − mn ] + ½ log|K_c ⊗ K_r| − ½ log|Q_c ⊗ Q_r|``

    Shape: ``(*batch,)``.
    """
    rows, columns = q.event_shape
    trace = _trace_ratio(q.row_scale_tril, p.row_scale_tril, rows) * _trace_ratio(
        q.column_scale_tril, p.column_scale_tril, columns
    )
    squared = p.whiten(q.loc - p.loc).square().sum((-2, -1))
    log_ratio = columns * (log_det_tril(p.row_scale_tril) - log_det_tril(q.row_scale_tril)) + rows * (
        log_det_tril(p.column_scale_tril) - log_det_tril(q.column_scale_tril)
    )
    return 0.5 * (trace + squared - rows * columns) + log_ratio


def _inverse_diagonal(factor: Tensor | None, size: int, p: MatrixNormal) -> Tensor:
    """``diag((L Lᵀ)⁻¹)``, the squared norms of the columns of ``L⁻¹``."""
    if factor is None:
        return p.loc.new_ones(size)
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(-2)


def _trace_ratio(q: Tensor | None, p: Tensor | None, size: int) -> Tensor:
    if q is None and p is None:
        return torch.tensor(float(size))
    if p is None:
        assert q is not None
        return q.square().sum((-2, -1))
    q = torch.eye(size, dtype=p.dtype, device=p.device) if q is None else q
    return torch.linalg.solve_triangular(p, q, upper=False).square().sum((-2, -1))
