"""Inducing variables for adapter matrices: the sparse Gaussian-process guide (Bayesian-LoRA)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor, nn

from pyrolora.distributions.inducing import Colouring, InducedMatrixNormal, Side
from pyrolora.guides.base import Card, Guide, check_choice, key, matches, unconstrained
from pyrolora.guides.inducing_families import Diagonal, Ensemble, Family, Flow, Full, Matrix
from pyrolora.priors.base import checked
from pyrolora.program import Batch, Latent, PyroLoRA

Structure = Literal["factors", "product"]
Posterior = Literal["diagonal", "matrix", "full", "flow", "ensemble"]
Conditional = Literal["prior", "learned", "fixed"]


class Inducing(Guide):
    """Uncertainty in a small inducing matrix V per layer, from which the adapter matrices follow.

    ``structure="factors"``: a sparse Gaussian process. Each random matrix ``W`` with a Gaussian prior ``W = s X``,
    ``X ~ N(0, I)``, gets inducing variables ``V ~ N(0, I)`` with ``X | V ~ N(R_r V R_cᵀ, λ²(I − P_c ⊗ P_r))``, see
    `InducedMatrixNormal`. At λ = 1, the default, q(W | V) is the prior's own conditional: whatever V does not say about
    W is as uncertain as the prior has it, and costs nothing. The side of W that is the rank is exact unless
    ``rank_size`` is less. ``ELBO = data − KL(q(V) ‖ N(0, I)) − (m n / 2)(λ² − 1 − 2 log λ)`` per matrix; the last term
    is exact, and zero at λ = 1.

    ``structure="product"``: ``ΔW = s · T_r V T_c`` with one ``r × r`` matrix V per layer, ``V ~ N(0, I)``. ``T_r``
    stands in LoRA's B role and ``T_c`` in its A role, both point estimates under the priors declared for B and A (any
    prior, `Flat` too). There is no conditional noise: r² random numbers per layer. Whichever of the two sites matches
    ``random`` is the one that V multiplies (A, if both do); the distribution of ΔW is the same.

    Both start exactly at the adapter that the model has (ΔW = 0 for a new one) and have plain LoRA as the limit of no
    noise: σ_V, λ → 0. It is a limit of the functions only: both KL terms diverge there.

    Extra sites: ``<site>.V``, and in product form ``<site>.T``; `augmented` gives the program that has them too.

    Args:
        structure: ``"factors"`` or ``"product"``.
        random: Pattern(s) of the adapter matrices that are random; the rest, and heads, get a point estimate. In
            factor form the noise of A is multiplied by B, which starts at zero, so that training starts at the base
            model; noise in B, or in both, is felt from the first step.
        posterior: q(V): ``"diagonal"``, ``"matrix"`` (Kronecker), ``"full"``, ``"flow"`` or ``"ensemble"``.
        size: Inducing variables on the long side (``in_features`` of A, ``out_features`` of B); default the rank.
            Factors only, as the next three.
        rank_size: Inducing variables on the side of the rank; default exact. With both sides inexact the density takes
            a matrix of (size · rank_size)² doubles for each layer.
        conditional: λ: ``"prior"`` (1, the default), ``"learned"`` or ``"fixed"``.
        conditional_scale: λ where fixed, and where learned at the start; default 0.1. There is none to give at
            ``"prior"``.
        init_scale: σ_V at the start; the prior's is 1.
        scale_learning_rate: Learning rate of all logarithms of scales (σ_V, λ, D) as a multiple of the weights'. In
            product form σ_V grows while B is near zero and nothing resists it: at 10 it is the prior's before anything
            is learnt.
        depth: Number of flows of ``posterior="flow"``.
        members: Number of point masses of ``posterior="ensemble"``.

    Raises:
        ValueError: Sizes that do not fit the matrix or cannot start at its present value; a prior that is not Gaussian.

    Source: Lin et al. 2026 (arXiv 2601.21003); Ritter et al. 2021 (FFG-U, Ens-U).
    """

    card = Card("A: a small inducing matrix for each layer, the rest as its prior", "1 a step", "S")

    def __init__(
        self,
        *,
        structure: Structure = "factors",
        random: str | Sequence[str] = "*.A",
        posterior: Posterior = "diagonal",
        size: int | None = None,
        rank_size: int | None = None,
        conditional: Conditional = "prior",
        conditional_scale: float | None = None,
        init_scale: float = 0.1,
        scale_learning_rate: float = 7.0,
        depth: int = 1,
        members: int = 5,
    ):
        super().__init__(random=random)
        check_choice("Inducing: structure", structure, Structure)
        check_choice("Inducing: posterior", posterior, Posterior)
        check_choice("Inducing: conditional", conditional, Conditional)
        if structure == "product" and not (size is rank_size is None and conditional == "prior"):
            raise ValueError("Inducing: size, rank_size and conditional belong to structure='factors'")
        if conditional == "prior" and conditional_scale is not None:
            raise ValueError("Inducing: conditional_scale is λ where conditional is 'learned' or 'fixed'; now λ = 1")
        self.structure, self.posterior, self.size, self.rank_size = structure, posterior, size, rank_size
        self.conditional, self.conditional_scale = conditional, conditional_scale
        if not all(x > 0 for x in (init_scale, scale_learning_rate, self._conditional_scale, depth, members)):
            raise ValueError("Inducing: scales, the learning rate's factor, depth and members are positive")
        self.init_scale, self.scale_learning_rate = init_scale, scale_learning_rate
        self.depth, self.members = depth, members
        self._reset()

    def _reset(self) -> None:
        self.families = nn.ModuleDict()
        self.inducing = nn.ParameterDict()
        self.log_diagonal = nn.ParameterDict()
        self.log_noise = nn.ParameterDict()
        self.colours: dict[str, Colouring] = {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Inducing:
        # The declared priors are no parameters of the guide, and go where it goes.
        super()._apply(fn, recurse)
        self.colours = {name: colour.apply(fn) for name, colour in self.colours.items()}
        return self

    # -- binding -----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        self._reset()
        if self.structure == "factors":
            wanted = [latent for latent in program.latents.values() if self._wanted(latent)]
            for latent in wanted:
                if not latent.flat or all(each.flat for each in wanted):  # all flat: an error that says what to do
                    self.colours[latent.name] = _colouring(program, latent)
        super().bind(program)

    def is_random(self, latent: Latent) -> bool:
        """Adapter matrices by the pattern; in product form also under a flat prior, and A alone where both match."""
        if not self._wanted(latent):
            return False
        if self.structure == "factors":
            return not latent.flat
        assert latent.group is not None
        return latent.group.role == "A" or not self._wanted(self.latents.get(_partner(latent.name)))

    def initialise(self, latent: Latent) -> None:
        if self.structure == "product":
            self.points[key(latent)] = nn.Parameter(unconstrained(latent))
            rank = min(latent.shape[-2:])
            start = torch.eye(rank, device=latent.start.device).expand(latent.shape[0], rank, rank)
        else:
            start = self._initialise_sides(latent)
        self.families[key(latent)] = self._make(start)

    def _initialise_sides(self, latent: Latent) -> Tensor:
        """Chooses Z so that the present weights lie in the span of R; returns the V that gives them back."""
        white = self.colours[latent.name].inverse(latent.start)
        assert latent.group is not None
        rank_side = "row" if latent.group.role == "A" else "column"
        for name, matrix in (("row", white.mT), ("column", white)):
            full = matrix.shape[-1]
            chosen = self.rank_size if name == rank_side else (self.size or min(latent.shape[-2:]))
            if chosen is None or chosen == full:
                continue
            if not 0 < chosen < full:
                raise ValueError(f"{latent.name}: {chosen} inducing {name}s for {full} {name}s; at most {full}")
            z = _spanning(matrix, chosen, f"{latent.name}: {chosen} inducing {name}s")
            self.inducing[f"{key(latent)}/{name}"] = nn.Parameter(z)
            self.log_diagonal[f"{key(latent)}/{name}"] = nn.Parameter(z.new_full(z.shape[:-1], math.log(0.1)))
        if self.conditional == "learned" and self._has_sides(latent):
            start = white.new_full(white.shape[:1], math.log(self._conditional_scale))
            self.log_noise[key(latent)] = nn.Parameter(start)
        with torch.no_grad():
            row, column = self._sides(latent)
            white = white if row is None else torch.linalg.pinv(row.map) @ white
            return white if column is None else white @ torch.linalg.pinv(column.map).mT

    def _make(self, start: Tensor) -> Family:
        own: dict[str, Callable[[], Family]] = {
            "diagonal": lambda: Diagonal(start, self.init_scale),
            "matrix": lambda: Matrix(start, self.init_scale),
            "full": lambda: Full(start, self.init_scale),
            "flow": lambda: Flow(start, self.init_scale, self.depth),
            "ensemble": lambda: Ensemble(start, self.init_scale, self.members),
        }
        return own[self.posterior]()

    # -- sampling ----------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        ensembles = [f for f in self.families.values() if isinstance(f, Ensemble)]
        chosen = torch.randint(self.members, ()) if ensembles else None
        # One member for all sites: members are whole models.
        for family in ensembles:
            family.chosen = chosen
        try:
            return super().forward(batch)
        finally:
            for family in ensembles:
                family.chosen = None

    def family(self, latent: Latent) -> TorchDistributionMixin:
        white = pyro.sample(f"{latent.name}.V", self._family(latent).distribution())
        map_ = None
        if self.structure == "product":
            map_ = pyro.sample(f"{latent.name}.T", dist.Delta(self.points[key(latent)], event_dim=2))
        return self._given(latent, white, map_, self._noise(latent))

    def centre(self, latent: Latent) -> Tensor:
        map_ = self.points[key(latent)] if self.structure == "product" else None
        return self._given(latent, self._family(latent).mean(), map_, None).mean

    def reparametrisations(self) -> dict[str, Reparam]:
        return {latent.name: _Augment(self, latent) for latent in self.latents.values() if self.is_random(latent)}

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        scales = [*self.log_diagonal.parameters(), *self.log_noise.parameters()]
        for family in self.families.values():
            assert isinstance(family, Family)
            scales += family.scales()
        own = {id(p) for p in scales}
        rest = [p for p in self.parameters() if id(p) not in own]
        return [
            {"params": rest, "lr": learning_rate},
            {"params": scales, "lr": learning_rate * self.scale_learning_rate},
        ]

    # -- what was learnt ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def describe(self) -> dict[str, dict[str, float]]:
        """For every random matrix: λ, σ_V (root mean square), both KL terms in nats, and effective parameters.

        Effective parameters: ``Σ (1 − var_q V_ij)`` and ``m n (1 − λ²)``, where negative zero: how many numbers the
        data have determined (MacKay 1992), the prior's variance being 1. A flow's moments and KL are estimated from
        draws.
        """
        rows = {}
        for latent in self.latents.values():
            if not self.is_random(latent):
                continue
            family, noise = self._family(latent), self._noise(latent)
            variance = family.variance()
            size = latent.shape[1:].numel()
            row = {"sigma_V": float(variance.mean().sqrt()), "kl_V": float(family.divergence().sum())}
            row["effective"] = float((1 - variance).clamp(min=0).sum())
            if noise is not None:
                row["lambda"] = float(noise.mean())
                row["kl_conditional"] = float((0.5 * size * (noise.square() - 1 - 2 * noise.log())).sum())
                row["effective"] += float((size * (1 - noise.square())).clamp(min=0).sum())
            rows[latent.name] = row
        return rows

    # -- parts -------------------------------------------------------------------------------------------------------

    def _given(self, latent: Latent, white: Tensor, map_: Tensor | None, noise: Tensor | None) -> InducedMatrixNormal:
        """``q(W | V)``, and at λ = 1 ``p(W | V)``."""
        if map_ is not None:
            assert latent.group is not None
            value = white @ map_ if latent.group.role == "A" else map_ @ white
            plain = Colouring(value.new_zeros(()), value.new_ones(()))
            return InducedMatrixNormal(value, None, None, noise=None, colour=plain)
        row, column = self._sides(latent)
        return InducedMatrixNormal(white, row, column, noise=noise, colour=self.colours[latent.name])

    def _sides(self, latent: Latent) -> tuple[Side | None, Side | None]:
        sides: list[Side | None] = []
        for name in ("row", "column"):
            own = f"{key(latent)}/{name}"
            present = own in self.inducing
            where = f"{latent.name}, {name}s"
            sides.append(Side.of(self.inducing[own], self.log_diagonal[own], where=where) if present else None)
        return sides[0], sides[1]

    def _noise(self, latent: Latent) -> Tensor | None:
        if self.structure == "product" or not self._has_sides(latent):
            return None
        if key(latent) in self.log_noise:
            return self.log_noise[key(latent)].exp()
        value = 1.0 if self.conditional == "prior" else self._conditional_scale
        return next(self._family(latent).parameters()).new_full(latent.shape[:1], value)

    @property
    def _conditional_scale(self) -> float:
        return 0.1 if self.conditional_scale is None else self.conditional_scale

    def _has_sides(self, latent: Latent) -> bool:
        return any(f"{key(latent)}/{name}" in self.inducing for name in ("row", "column"))

    def _family(self, latent: Latent) -> Family:
        family = self.families[key(latent)]
        assert isinstance(family, Family)
        return family

    def _wanted(self, latent: Latent | None) -> bool:
        named = latent is not None and latent.group is not None and latent.group.role in ("A", "B")
        return named and matches(latent.name, self.random)  # type: ignore[union-attr]

    _is_held = Guide._is_hyper


class _Augment(Reparam):
    """Rewrites the model's statement ``W ~ prior`` as ``V ~ N(0, I)``, ``W ~ p(W | V)``."""

    def __init__(self, guide: Inducing, latent: Latent):
        self.guide, self.latent = guide, latent

    def apply(self, msg: Any) -> Any:
        guide, latent = self.guide, self.latent
        white = pyro.sample(f"{latent.name}.V", guide._family(latent).prior())
        map_ = pyro.sample(f"{latent.name}.T", msg["fn"]) if guide.structure == "product" else None
        noise = None if guide._noise(latent) is None else white.new_ones(white.shape[:1])
        fn = guide._given(latent, white, map_, noise)
        return {"fn": fn, "value": msg["value"], "is_observed": msg["is_observed"]}


def _colouring(program: PyroLoRA, latent: Latent) -> Colouring:
    group = latent.group
    assert group is not None
    advice = (
        f"site {latent.name!r}: inducing variables need a Gaussian prior of known scale: declare priors.Normal or "
        "priors.MatrixNormal for it, or use structure='product', which bears any prior"
    )
    if any(name.startswith(f"{latent.name}.") for name in program.latents):
        raise ValueError(f"{advice} (its prior has hyper-parameters)")
    try:
        with program._on_device(), pyro.poutine.block():
            return Colouring.of(checked(program.priors[latent.name], group))
    except TypeError as error:
        raise ValueError(f"{advice} ({error})") from None


def _spanning(matrix: Tensor, size: int, where: str) -> Tensor:
    """Orthonormal ``Z``, ``(layers, size, n)``, whose rows span those of ``matrix``, filled up at random."""
    _, values, directions = torch.linalg.svd(matrix, full_matrices=False)
    needed = int((values > 1e-6 * values.amax(-1, keepdim=True).clamp(min=1e-12)).sum(-1).max())
    if needed > size:
        raise ValueError(
            f"{where} cannot start at the present weights, which have rank {needed}: use at least {needed}, or exact"
        )
    layers, _, full = matrix.shape
    rest = torch.randn(layers, full, size - needed, device=matrix.device, dtype=matrix.dtype)
    return torch.linalg.qr(torch.cat([directions[:, :needed].mT, rest], -1)).Q.mT.contiguous()


def _partner(name: str) -> str:
    """The B of an A, the A of a B: ``lora.query.B`` of ``lora.query.A``, ``lora.query.1.B`` of ``lora.query.1.A``."""
    head, role = name.rsplit(".", 1)
    return f"{head}.{'B' if role == 'A' else 'A'}"
