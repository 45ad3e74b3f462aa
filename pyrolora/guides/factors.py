"""Kronecker and diagonal factors of the Fisher information: sums that grow batch by batch, and merge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from pyrolora.adapters.sites import SiteGroup

Tokens = Literal["reduce", "expand", "last", "whole"]
Structure = Literal["low_rank", "dense", "diagonal"]


@dataclass
class Reduction:
    """How the tokens of an example enter its factors; padding never does.

    An example's exact gradient is ``W = Σ_t g_t a_tᵀ``. ``whole`` keeps it as it is, see `KroneckerFactors`; ``reduce``
    takes the mean input and the summed gradient for it, ``expand`` every token for an example of its own, ``last`` the
    last one alone.
    """

    kind: Tokens
    size: int
    mask: Tensor | None = field(default=None)

    def inputs(self, value: Tensor) -> Tensor:
        """``(rows, features)`` of the input side; reduced, the mean over an example's tokens."""
        tokens, real = self._tokens(value)
        rows = self._rows(tokens, real)
        return rows / real.sum(1, keepdim=True).clamp(min=1) if self.kind == "reduce" else rows

    def gradients(self, value: Tensor, inputs: Tensor) -> Tensor:
        """``(rows, features)`` of the output side; reduced, the sum over an example's tokens; whole, all the W."""
        if self.kind == "whole":
            return weight_gradients(value, inputs, self.size)
        return self._rows(*self._tokens(value))

    def weight(self, value: Tensor) -> float:
        """How many rows the input side counts for."""
        return float(self._tokens(value)[1].sum()) if self.kind == "expand" else float(self.size)

    def _tokens(self, value: Tensor) -> tuple[Tensor, Tensor]:
        tokens = value.detach().reshape(self.size, -1, value.shape[-1]).float()
        if self.mask is not None and self.mask.numel() == tokens.shape[0] * tokens.shape[1]:
            return tokens, self.mask.reshape(self.size, -1).to(tokens)
        # A head sees one row for an example, and the cross-attention of a decoder other tokens than the mask's.
        return tokens, tokens.new_ones(tokens.shape[:2])

    def _rows(self, tokens: Tensor, real: Tensor) -> Tensor:
        if self.kind == "expand":
            return tokens[real.bool()]
        if self.kind == "reduce":
            return (tokens * real.unsqueeze(-1)).sum(1)
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]


class Gram:
    """``Σ rows rowsᵀ`` of one side, whole: ``(layers, n, n)``."""

    def __init__(self, layers: int, size: int, *, device: torch.device):
        self.total = torch.zeros(layers, size, size, device=device)

    @property
    def trace(self) -> Tensor:
        return self.total.diagonal(dim1=-2, dim2=-1).sum(-1)

    def add(self, rows: Tensor) -> None:
        """Adds ``(layers, m, n)`` rows."""
        self.total += rows.mT @ rows

    def merge(self, other: Gram) -> Gram:
        """The sum of two workers' sums."""
        merged = copy.copy(self)
        merged.total = self.total + other.total
        return merged

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors ``(layers, n, n)``, eigenvalues ``(layers, n)``, and the mean of those left out: none, 0."""
        values, vectors = torch.linalg.eigh(self.total)
        return vectors, values.clamp(min=0), torch.zeros_like(values[..., 0])


class Sketch:
    """``Σ rows rowsᵀ`` of one side by its leading k directions and its exact trace; never ``n × n``.

    Attributes:
        columns: ``U √β``, ``(layers, n, ≤ k)``.
        trace: Exact, ``(layers,)``.
    """

    def __init__(self, layers: int, size: int, *, rank: int, device: torch.device):
        self.columns = torch.zeros(layers, size, 0, device=device)
        self.trace = torch.zeros(layers, device=device)
        self.rank = min(rank, size)

    def add(self, rows: Tensor) -> None:
        """Adds ``(layers, m, n)`` rows, and truncates to rank k by a small Gram matrix."""
        self.trace = self.trace + rows.square().sum((-2, -1))
        self.columns = truncated(torch.cat([self.columns, rows.mT], -1), self.rank)

    def merge(self, other: Sketch) -> Sketch:
        """Two workers' sketches, stacked and truncated; traces add."""
        merged = copy.copy(self)
        merged.columns = truncated(torch.cat([self.columns, other.columns], -1), self.rank)
        merged.trace = self.trace + other.trace
        return merged

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal ``(layers, n, k)``, eigenvalues ``(layers, k)``, and the mean ``(layers,)`` of those left out."""
        basis, scale, _ = torch.linalg.svd(self.columns, full_matrices=False)
        values = scale.square()
        left = (self.trace - values.sum(-1)).clamp(min=0) / max(basis.shape[-2] - self.rank, 1)
        padded = nn.functional.pad(values, (0, self.rank - values.shape[-1]))
        return completed(basis, self.rank), padded, left


class KroneckerFactors:
    """Sums for ``F ≈ S̄ ⊗ Ā`` of one site: a Gram matrix of its input side and one of its output side.

    Whole gradients of weights, ``W_n = Σ_t g_t a_tᵀ``, give ``F ≈ Σ W_n W_nᵀ ⊗ Σ W_nᵀ W_n / tr F``, whose trace and
    partial traces are exact. Source: Gupta et al. 2018 (Shampoo); Morwani et al. 2024 (close to the best such product).

    Attributes:
        inputs: ``Σ_n ā_n ā_nᵀ``, or ``Σ W_nᵀ W_n``.
        gradients: ``Σ_n G_n G_nᵀ``, or ``Σ W_n W_nᵀ``.
        weight: What the inputs' sum is divided by: examples, tokens in expanded form, or ``tr F``, ``(layers,)``.
    """

    def __init__(self, site: SiteGroup, structure: Structure, *, rank: int, device: torch.device):
        def side(size: int, large: bool) -> Gram | Sketch:
            if large and structure == "low_rank" and rank < size:
                return Sketch(site.num_layers, size, rank=rank, device=device)
            return Gram(site.num_layers, size, device=device)

        outputs, inputs = site.event_shape
        self.large_input = large_is_input(site)
        self.inputs = side(inputs, self.large_input)
        self.gradients = side(outputs, not self.large_input)
        self.weight: float | Tensor = 0.0

    def add_inputs(self, values: Sequence[Tensor], reduction: Reduction) -> None:
        """What the modules of a site were given for a batch."""
        if reduction.kind == "whole":  # counts with the gradients
            return
        self.weight += reduction.weight(values[0])
        self.inputs.add(torch.stack([reduction.inputs(value) for value in values]))

    def add_gradients(self, values: Tensor, reduction: Reduction) -> None:
        """One vector's gradients, as `Reduction.gradients` gives them, of all layers: ``(layers, …)``."""
        if reduction.kind == "whole":
            self.inputs.add(values.flatten(1, 2))
            self.gradients.add(values.mT.flatten(1, 2))
            self.weight = self.weight + values.square().sum((1, 2, 3))
            return
        self.gradients.add(values)

    def merge(self, other: KroneckerFactors) -> KroneckerFactors:
        """The sums of two workers."""
        merged = copy.copy(self)
        merged.inputs = self.inputs.merge(other.inputs)  # type: ignore[arg-type]
        merged.gradients = self.gradients.merge(other.gradients)  # type: ignore[arg-type]
        merged.weight = self.weight + other.weight
        return merged

    def parts(self) -> dict[str, Tensor]:
        """What `LowRankKroneckerNormal` is made from."""
        (large, small) = (self.inputs, self.gradients) if self.large_input else (self.gradients, self.inputs)
        basis, values, left = large.eigen()
        small_basis, small_values, _ = small.eigen()
        # Of the product alone the scale matters, so that the division may go to the small side.
        weight = torch.as_tensor(self.weight, device=values.device).clamp(min=torch.finfo(values.dtype).tiny)
        return {
            "basis": basis,
            "values": values,
            "remainder": left,
            "small_basis": small_basis,
            "small_values": small_values / weight.unsqueeze(-1),
        }


class DiagonalFactors:
    """The exact diagonal of one site's Fisher information: ``Σ_n Σ_c (∂(v_c · f_n)/∂W)²``, ``(layers, out, in)``."""

    def __init__(self, site: SiteGroup, *, device: torch.device):
        self.total = torch.zeros(site.shape, device=device)

    def add_inputs(self, values: Sequence[Tensor], reduction: Reduction) -> None:
        """Nothing: inputs count with their gradients."""

    def add_gradients(self, values: Tensor, reduction: Reduction) -> None:
        """One vector's whole gradients, ``(layers, b, out, in)``."""
        self.total += values.square().sum(1)

    def merge(self, other: DiagonalFactors) -> DiagonalFactors:
        """The sums of two workers."""
        merged = copy.copy(self)
        merged.total = self.total + other.total
        return merged

    def parts(self) -> dict[str, Tensor]:
        """What `DiagonalPrecisionNormal` is made from."""
        return {"curvature": self.total}


Factors = KroneckerFactors | DiagonalFactors


def large_is_input(site: SiteGroup) -> bool:
    """Whether the input side of a matrix ``(out, in)`` is its large one: of A and of heads it is, of B it is not."""
    rows, columns = site.event_shape
    return columns >= rows


def weight_gradients(gradients: Tensor, inputs: Tensor, size: int) -> Tensor:
    """``∂f/∂W = Σ_t g_t a_tᵀ`` of each of ``size`` examples, ``(size, out, in)``."""
    g = gradients.detach().float().reshape(size, -1, gradients.shape[-1])
    return g.mT @ inputs.float().reshape(size, -1, inputs.shape[-1])


def truncated(columns: Tensor, rank: int) -> Tensor:
    """The best rank-k factor W with ``W Wᵀ ≈ X Xᵀ``, by the eigenvectors of ``Xᵀ X``; ``(layers, n, ≤ k)``."""
    if columns.shape[-1] <= rank:
        return columns
    _, vectors = torch.linalg.eigh((columns.mT @ columns).double())
    return columns @ vectors[..., -rank:].to(columns.dtype)


def completed(basis: Tensor, size: int) -> Tensor:
    """Orthonormal columns up to ``size``, where fewer rows than that were seen: their values are zero."""
    missing = size - basis.shape[-1]
    if missing <= 0:
        return basis
    # Any further columns will do: Householder's Q is orthonormal even where they depend on the basis.
    more = torch.eye(basis.shape[-2], missing, dtype=basis.dtype, device=basis.device).expand(len(basis), -1, -1)
    filled = torch.linalg.qr(torch.cat([basis, more], -1)).Q
    return torch.cat([basis, filled[..., -missing:]], -1)
