"""A Normal over a matrix whose precision is a low-rank Kronecker curvature plus a multiple of the identity."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl
from torch.distributions.utils import _standard_normal
from torch.types import _size

# Largest entry of UᵀU − I that still counts as round-off: a basis in half precision passes, eigenvectors scaled by
# their eigenvalues do not.
ORTHONORMAL = 1e-2


class LowRankKroneckerNormal(TorchDistribution):
    """``vec X ~ N(vec M, P⁻¹)`` for a ``d × r`` matrix X, large side first; vec reads rows one after another.

    ``P = λ I + (U diag(β − ρ) Uᵀ + ρ I) ⊗ S,   S = Q diag(σ) Qᵀ``

    The eigenvalues of P are ``λ + β_i σ_j`` for the k directions in U and ``λ + ρ σ_j`` for the d − k others, so that
    everything is elementwise in that basis: nothing is inverted, no ``d × d`` matrix is made, and another λ costs
    nothing. It is the Laplace approximation of an adapter matrix: U, β and ρ describe its large side (inputs of A,
    outputs of B), S its small one, and λ is the precision of the prior. ρ = 0 is a plain low-rank curvature;
    ``ρ = (trace − Σβ)/(d − k)`` keeps the trace of what was truncated. Where k = d, ρ plays no part.

    Shapes: batch ``(layers,)``; event ``(d, r)``, or ``(r, d)`` where ``transposed``. The others broadcast over the
    batch.

    Args:
        loc: Mean ``M``, ``(*batch, *event)``.
        basis: ``U``, orthonormal columns, ``(*batch, d, k)`` with ``0 ≤ k ≤ d``, for either value of ``transposed``.
        values: ``β ≥ 0``, ``(*batch, k)``.
        remainder: ``ρ ≥ 0``, ``(*batch,)`` or a number.
        small_basis: ``Q``, orthogonal, ``(*batch, r, r)``.
        small_values: ``σ ≥ 0``, ``(*batch, r)``.
        precision: ``λ > 0``, ``(*batch,)`` or a number: one over the prior's variance.
        transposed: The event is ``Xᵀ``, large side last, as LoRA's A is stored.
        validate_args: As for every torch distribution; checks signs and that both bases are orthonormal.

    Raises:
        ValueError: Shapes that do not fit, or, where arguments are validated, a basis that is not orthonormal.

    Source: Yang et al. 2024 (Laplace-LoRA); Ritter et al. 2018 (Kronecker-factored Laplace).
    """

    arg_constraints = {  # noqa: RUF012 - torch's own convention
        "loc": constraints.independent(constraints.real, 2),
        "values": constraints.independent(constraints.nonnegative, 1),
        "remainder": constraints.nonnegative,
        "small_values": constraints.independent(constraints.nonnegative, 1),
        "precision": constraints.positive,
    }
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        basis: Tensor,
        *,
        values: Tensor,
        remainder: Tensor | float,
        small_basis: Tensor,
        small_values: Tensor,
        precision: Tensor | float,
        transposed: bool = False,
        validate_args: bool | None = None,
    ):
        self.remainder = torch.as_tensor(remainder, dtype=loc.dtype, device=loc.device)
        self.precision = torch.as_tensor(precision, dtype=loc.dtype, device=loc.device)
        self.basis, self.values = basis, values
        self.small_basis, self.small_values = small_basis, small_values
        self.transposed = transposed
        batch = self._fitting_batch(loc)
        self.loc = loc.expand(*batch, *loc.shape[-2:])
        super().__init__(batch, loc.shape[-2:], validate_args=validate_args)
        if self._validate_args:
            _check_orthonormal("basis", basis)
            _check_orthonormal("small_basis", small_basis)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Elementwise variance, the diagonal of ``P⁻¹``; a sum of positives."""
        inside, outside = self._eigenvalues()
        squares = self.basis.square()
        # What each large index keeps outside U; round-off could make it negative.
        left = (1 - squares.sum(-1)).clamp(min=0) * self._has_complement
        rotated = squares @ inside.reciprocal() + left.unsqueeze(-1) * outside.reciprocal().unsqueeze(-2)
        return self._orient(rotated @ self.small_basis.square().mT).expand(self.loc.shape)

    def rsample(self, sample_shape: _size = torch.Size()) -> Tensor:  # noqa: B008 - torch's signature
        shape = self._extended_shape(sample_shape)
        noise = self._orient(_standard_normal(shape, dtype=self.loc.dtype, device=self.loc.device))
        inside, outside = self._scaled(noise, -0.5)
        rotated = torch.einsum("...dk,...ks->...ds", self.basis, inside) + outside
        return self.loc + self._orient(torch.einsum("...ds,...rs->...dr", rotated, self.small_basis))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        parts = self._scaled(self._orient(value - self.loc), 0.5)
        squared = sum(part.square().sum((-2, -1)) for part in parts)
        return -0.5 * (squared + self.event_shape.numel() * math.log(2 * math.pi) - self.log_det_precision())

    def entropy(self) -> Tensor:
        """Differential entropy in nats, ``(*batch,)``."""
        return 0.5 * (self.event_shape.numel() * (1 + math.log(2 * math.pi)) - self.log_det_precision())

    def log_det_precision(self) -> Tensor:
        """``log|P| = (d − k) Σ_j log(λ + ρσ_j) + Σ_ij log(λ + β_iσ_j)``, ``(*batch,)``."""
        return (self.event_shape.numel() * self.precision.log() + self.log_det_ratio()).expand(self.batch_shape)

    def log_det_ratio(self) -> Tensor:
        """``log|P / λ|``, what the data add to the prior's log-determinant: 0 where there is no curvature.

        In the Laplace evidence all else that grows with the number of weights cancels:
        ``log Z ≈ log p(y|θ*) − ½ λ‖θ*‖² − ½ log|P/λ|``; it is kept apart so that no digits are lost. ``(*batch,)``.
        """
        return self._sum_spectrum(lambda curvature, precision: torch.log1p(curvature / precision))

    def effective_dimension(self) -> Tensor:
        """Number of directions that the data determine, ``Σ (1 − λ/eigenvalue)``, between 0 and ``d r``; ``(*batch,)``.

        Source: MacKay 1992, Bayesian Interpolation, section 4 (γ).
        """
        return self._sum_spectrum(lambda curvature, precision: curvature / (precision + curvature))

    def covariance_of(self, jacobian: Tensor) -> Tensor:
        """Covariance ``J P⁻¹ Jᵀ`` of outputs that are linear in X, batch entry by batch entry.

        The two sums over eigenvalues are sums of squares on the diagonal, which is therefore never negative.

        Args:
            jacobian: Slices of K outputs' Jacobian, ``(*batch, *examples, K, *event)``; ``examples`` may be empty.

        Returns:
            ``(*batch, *examples, K, K)``. Independent layers add up: sum over the batch for their joint effect.

        Raises:
            ValueError: A Jacobian of another shape.
        """
        return self.covariance_by_precision(jacobian)(self.precision)

    def covariance_by_precision(self, jacobian: Tensor) -> Callable[[Tensor | float], Tensor]:
        """`covariance_of` as a function of λ: what does not depend on it is done once.

        The eigenvalues outside U depend on the small side's direction alone, so that the long side is summed out.

        Args:
            jacobian: As for `covariance_of`.

        Returns:
            From λ, ``(*batch,)`` or a number, to ``(*batch, *examples, K, K)``.
        """
        first, last = len(self.batch_shape), jacobian.dim() - 3
        if last < first or jacobian.shape[:first] != self.batch_shape or jacobian.shape[-2:] != self.event_shape:
            raise ValueError(
                f"jacobian has shape {tuple(jacobian.shape)}; it needs batch {tuple(self.batch_shape)}, then examples "
                f"(if any) and outputs, then event {tuple(self.event_shape)}"
            )
        examples = (1,) * (last - first)
        large = self._orient(jacobian)
        between = lambda matrix, ones: matrix.reshape(*matrix.shape[:-2], *ones, *matrix.shape[-2:])  # noqa: E731
        rotated = large @ between(self.small_basis.expand(*self.batch_shape, -1, -1), (*examples, 1))
        basis = between(self.basis.expand(*self.batch_shape, -1, -1), (*examples, 1))
        inner = basis.mT @ rotated  # (*batch, *examples, K, k, r)
        outer = (rotated - basis @ inner) if self._has_complement else torch.zeros_like(rotated)
        columns = outer.movedim(-1, -3)  # (*batch, *examples, r, K, d)
        grams = columns @ columns.mT
        flat = inner.flatten(-2)

        def covariance(precision: Tensor | float) -> Tensor:
            inside, outside = self.with_precision(precision)._eigenvalues()
            scale = inside.reciprocal().sqrt().expand(*self.batch_shape, *inside.shape[-2:]).flatten(-2)
            rows = flat * scale.reshape(*self.batch_shape, *examples, 1, scale.shape[-1])
            weights = outside.reciprocal().expand(*self.batch_shape, outside.shape[-1])
            weights = weights.reshape(*self.batch_shape, *examples, outside.shape[-1], 1, 1)
            return rows @ rows.mT + (grams * weights).sum(-3)

        return covariance

    def with_precision(self, precision: Tensor | float) -> LowRankKroneckerNormal:
        """The same mean and curvature under another λ; shares every tensor.

        Raises:
            ValueError: A precision that is not positive, where arguments are validated.
        """
        if self._validate_args and not bool((torch.as_tensor(precision) > 0).all()):
            raise ValueError(f"precision is {precision}; it is one over a variance, and positive")
        return self._replace(self.loc, precision)

    def expand(self, batch_shape: _size, _instance: object = None) -> LowRankKroneckerNormal:
        return self._replace(self.loc.expand(*batch_shape, *self.event_shape), self.precision)

    def _replace(self, loc: Tensor, precision: Tensor | float) -> LowRankKroneckerNormal:
        new = LowRankKroneckerNormal(
            loc,
            self.basis,
            values=self.values,
            remainder=self.remainder,
            small_basis=self.small_basis,
            small_values=self.small_values,
            precision=precision,
            transposed=self.transposed,
            validate_args=False,  # the arguments have been checked
        )
        new._validate_args = self._validate_args
        return new

    @property
    def _has_complement(self) -> bool:
        return self.basis.shape[-1] < self.basis.shape[-2]

    def _orient(self, matrix: Tensor) -> Tensor:
        """From the event's orientation to large side first, or back."""
        return matrix.mT if self.transposed else matrix

    def _curvature(self) -> tuple[Tensor, Tensor]:
        """``β_i σ_j``, ``(*batch, k, r)``, and ``ρ σ_j``, ``(*batch, r)``."""
        inside = self.values.unsqueeze(-1) * self.small_values.unsqueeze(-2)
        return inside, self.remainder.unsqueeze(-1) * self.small_values

    def _eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of P on span U, ``(*batch, k, r)``, and on its complement, ``(*batch, r)``."""
        inside, outside = self._curvature()
        return self.precision[..., None, None] + inside, self.precision[..., None] + outside

    def _sum_spectrum(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sum of ``term(curvature, λ)`` over all ``d r`` eigenvalues."""
        inside, outside = self._curvature()
        count = self.basis.shape[-2] - self.basis.shape[-1]
        total = term(inside, self.precision[..., None, None]).sum((-2, -1))
        return (total + count * term(outside, self.precision[..., None]).sum(-1)).expand(self.batch_shape)

    def _scaled(self, matrix: Tensor, power: float) -> tuple[Tensor, Tensor]:
        """``P^power X`` in two orthogonal parts: coordinates on span U, ``(…, k, r)``, and the rest, ``(…, d, r)``.

        X is ``(*sample, *batch, d, r)``; columns are those of Q. Einsum, unlike matmul, makes no copy of U per sample.
        """
        rotated = torch.einsum("...dr,...rs->...ds", matrix, self.small_basis)
        inner = torch.einsum("...dk,...ds->...ks", self.basis, rotated)
        if self._has_complement:
            outer = rotated - torch.einsum("...dk,...ks->...ds", self.basis, inner)
        else:  # exactly nothing, rather than round-off under the weight of the smallest eigenvalues
            outer = torch.zeros_like(rotated)
        inside, outside = self._eigenvalues()
        return inner * inside.pow(power), outer * outside.pow(power).unsqueeze(-2)

    def _fitting_batch(self, loc: Tensor) -> torch.Size:
        """The batch shape that all arguments broadcast to.

        Raises:
            ValueError: Naming the argument that does not fit.
        """
        if loc.dim() < 2:
            raise ValueError(f"loc has shape {tuple(loc.shape)}; it needs (*batch, rows, columns)")
        large, small = reversed(loc.shape[-2:]) if self.transposed else loc.shape[-2:]
        rank = self.basis.shape[-1]
        side = "last" if self.transposed else "first"
        event = f"a {loc.shape[-2]} × {loc.shape[-1]} matrix with its large side {side}"
        if self.basis.shape[-2:-1] != (large,) or rank > large:
            raise ValueError(
                f"basis has shape {tuple(self.basis.shape)}; {event} needs {large} × k, with k at most {large}"
            )
        fitting = {"values": (rank,), "small_basis": (small, small), "small_values": (small,)}
        batches = [loc.shape[:-2], self.basis.shape[:-2], self.remainder.shape, self.precision.shape]
        for name, needed in fitting.items():
            given = getattr(self, name).shape
            if given[-len(needed) :] != needed:
                raise ValueError(
                    f"{name} has shape {tuple(given)}; {event} and a basis of {rank} columns need "
                    f"{' × '.join(map(str, needed))}"
                )
            batches.append(given[: -len(needed)])
        try:
            return torch.broadcast_shapes(*batches)
        except RuntimeError:
            names = ("loc", "basis", "remainder", "precision", *fitting)
            found = ", ".join(f"{name} {tuple(batch)}" for name, batch in zip(names, batches, strict=True))
            raise ValueError(f"batch shapes do not broadcast: {found}") from None


@register_kl(LowRankKroneckerNormal, Independent)
def kl_low_rank_kronecker_normal(q: LowRankKroneckerNormal, p: Independent) -> Tensor:
    """KL from an elementwise Normal ``N(m, s²)``, in nats; s may be one for all, one for each layer, or elementwise.

    ``½[ Σ_ab (V_ab/s_ab² − 1) + Σ_ab (M_ab − m_ab)²/s_ab² + Σ_ab log(λ s_ab²) + log|P/λ| ]``,  V = diag P⁻¹

    Terms are grouped so that each is small where the posterior is near the prior: single precision is enough.

    Shape: ``(*batch,)``. Raises NotImplementedError (Pyro then samples) for any other prior.
    """
    base = p.base_dist
    if not isinstance(base, Normal) or len(p.event_shape) != 2:
        raise NotImplementedError("only an elementwise Normal prior over matrices has this closed form")
    excess = (q.variance / base.scale.square() - 1).sum((-2, -1))
    squared = ((q.loc - base.loc) / base.scale).square().sum((-2, -1))
    scales = (q.precision[..., None, None] * base.scale.square()).log().sum((-2, -1))
    return 0.5 * (excess + squared + scales + q.log_det_ratio())


def _check_orthonormal(name: str, basis: Tensor) -> None:
    gram = basis.mT @ basis
    error = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs()
    if error.numel() and not float(error.max()) <= ORTHONORMAL:
        raise ValueError(
            f"the columns of {name} are not orthonormal: an inner product is off by {float(error.max()):.2g}. Give "
            "eigenvectors, such as those of torch.linalg.eigh, and their eigenvalues apart"
        )
