"""Laplace: a Gaussian at the MAP estimate whose precision is the curvature of the objective there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.guides.base import Card, Guide, check_choice, key, matches
from pyrolora.guides.curvature import batches
from pyrolora.guides.factors import Factors, Structure, Tokens, large_is_input
from pyrolora.guides.linearised import (
    bridge,
    covariance_of,
    gaussian_points,
    jacobians,
    negative_log_likelihoods,
    probit,
    say_whether_noise_drowns,
    slices,
)
from pyrolora.guides.precision import (
    Precision,
    Scope,
    best_factor,
    check_precision,
    declared_precision,
    tuned,
    validates,
    validation_rows,
)
from pyrolora.guides.shares import shared_curvature
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.program import Batch, Latent, PyroLoRA

logger = logging.getLogger("pyrolora")

Predictive = Literal["linearised", "probit", "bridge", "joint", "weights"]


class Laplace(Guide):
    """``q(θ) = N(θ*, P⁻¹)``, ``P = λ I + F``: first MAP, then the Fisher information F there in one pass over the data.

    ``F ≈ Ā ⊗ S̄`` for each matrix, the large side at rank k plus its exact trace (`LowRankKroneckerNormal`). Predictions
    are linearised by default: ``f(x) ~ N(f*(x), J Σ Jᵀ)`` over the natural parameters, with J by one backward pass for
    each class, then averaged over quasi-Monte Carlo points. The model's own prediction stays in the centre, so that
    accuracy hardly moves. The evidence ``log p(y|θ*) + log p(θ*) + (D/2) log 2π − ½ log det P`` is in `describe`.
    The Jacobian takes ``4 K b`` bytes for each random number, b rows at once, and at most 1 GiB.

    Biases, and every site that does not match ``random``, keep their point estimates.

    Args:
        random: Pattern(s) of the matrices that are random: ``"lora.*"``, or ``"head.*"`` for last-layer Laplace.
        structure: ``"low_rank"``, ``"dense"`` (both Kronecker factors whole: an ``n × n`` matrix of the large side) or
            ``"diagonal"`` (the exact diagonal of F).
        rank: k of the large side.
        tokens: ``"whole"``, ``"reduce"`` (KFAC-reduce), ``"expand"`` or ``"last"``, see `Reduction`; the diagonal
            needs no such choice.
        precision: λ, the prior's precision: ``"marglik"`` maximises the evidence on the training data, ``"val_nll"``
            scales that λ by the factor that predicts the task's validation split best, ``"declared"`` takes the
            declared Normal prior's, and a number is λ itself. ``"auto"`` is ``"val_nll"`` for classes with a
            validation split, else ``"marglik"``: the evidence trusts the curvature, which far from a maximum, or
            where every training row is explained, is not that of the posterior.
        scope: ``"site"``, ``"layer"`` or ``"global"``: what shares one λ under ``"marglik"``.
        predictive: ``"linearised"``, or its closed forms ``"probit"`` or ``"bridge"``, for each input on its own;
            ``"joint"``: draws ``f*(x) + J(x)(θ_s − θ*)``, one θ_s for all inputs; ``"weights"``: draws of the weights,
            which at the λ of a low-rank adapter are usually unusable (the product of two noises is not small); of
            language models nothing else.
        num_points: Quasi-Monte Carlo points of the linearised predictive, whatever number of draws is asked for.
        optimise: False takes the model's present weights (an adapter trained elsewhere) for the MAP estimate.
        exact_up_to: The largest number of classes for which the Fisher information is exact; above, one draw each.
        batch_size: Of the pass over the data.

    Raises:
        ValueError: Arguments out of range; at `bind`, a language model under another predictive than ``"weights"``.

    Source: Yang et al. 2024 (Laplace-LoRA), section 3; MacKay 1992; Immer et al. 2021, eq. 5 (linearised predictive).
    """

    card = Card("adapter matrices: a Gaussian at MAP", "1 a step, then K over the data", "1 + K")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "lora.*",
        structure: Structure = "low_rank",
        rank: int = 10,
        tokens: Tokens = "whole",
        precision: Precision | float = "auto",
        scope: Scope = "site",
        predictive: Predictive = "linearised",
        num_points: int = 256,
        optimise: bool = True,
        exact_up_to: int = 32,
        batch_size: int = 16,
    ):
        super().__init__(random=random)
        check_choice("Laplace: structure", structure, Structure)
        check_choice("Laplace: tokens", tokens, Tokens)
        check_choice("Laplace: scope", scope, Scope)
        check_choice("Laplace: predictive", predictive, Predictive)
        check_precision(precision)
        if not (rank >= 1 and 1 <= num_points <= 2**20 and exact_up_to >= 0 and batch_size >= 1):
            raise ValueError(
                "Laplace: rank, num_points and batch_size are at least 1 (num_points ≤ 2^20), exact_up_to at least 0"
            )
        self.structure, self.rank, self.tokens = structure, rank, tokens
        self.precision, self.scope = precision, scope
        self.predictive, self.num_points, self.optimise = predictive, num_points, optimise
        self.exact_up_to, self.batch_size = exact_up_to, batch_size

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        if isinstance(program.likelihood, NextToken) and self.predictive != "weights":
            raise ValueError("The linearised predictive is of labels, not of texts: Laplace(predictive='weights')")
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)
        # Without curvature it is MAP: no site is random yet.
        self.register_buffer("fitted", torch.tensor(False))
        super().bind(program)
        for latent in self._wanted_sites():
            self._allocate(latent)
        self.register_buffer("log_likelihood", torch.zeros((), device=program.device))
        self.register_buffer("checksum", torch.zeros(2, dtype=torch.double, device=program.device))

    def is_random(self, latent: Latent) -> bool:
        """Matrices that match ``random``, once the curvature is known; before, the guide is MAP."""
        return self._wanted(latent) and self.is_fitted

    def family(self, latent: Latent) -> TorchDistributionMixin:
        assert latent.group is not None
        loc, own = self.centre(latent), {name: self._part(name, latent) for name in self._parts(latent)}
        if self.structure == "diagonal":
            return DiagonalPrecisionNormal(loc, **own, validate_args=False)
        basis = own.pop("basis")
        return LowRankKroneckerNormal(loc, basis, **own, transposed=large_is_input(latent.group), validate_args=False)

    def centre(self, latent: Latent) -> Tensor:
        return self.points[key(latent)]

    def point(self, latent: Latent) -> Tensor:
        return self.points[key(latent)] if self._wanted(latent) else super().point(latent)

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        found, total = shared_curvature(
            program,
            self._values(),
            self._groups(),
            data,
            structure=self.structure,
            rank=self.rank,
            tokens=self.tokens,
            exact_up_to=self.exact_up_to,
            batch_size=self.batch_size,
        )
        self.set_curvature(found, total)
        self._choose_precision(program)
        if isinstance(program.likelihood, ClassLikelihood) and self.predictive != "weights":
            few = batches(program, data.select(range(min(len(data), 16))), self.batch_size, label="check")
            seen = zip(*(self.linearised(program, batch) for batch in few), strict=True)
            say_whether_noise_drowns(*map(torch.cat, seen))

    def passes(self, num_draws: int, num_outputs: int) -> int:
        linearised = self.is_fitted and self.predictive != "weights" and num_draws > 0
        return 1 + num_outputs if linearised else super().passes(num_draws, num_outputs)

    def saw_validation(self, program: PyroLoRA) -> bool:
        return self.is_fitted and validates(self.precision, program)

    @property
    def joint_draws(self) -> bool:
        return not self.is_fitted or self.predictive in ("joint", "weights")

    def natural_parameters(
        self, program: PyroLoRA, num_draws: int, *, seed: int = 0
    ) -> Callable[[Batch], Tensor] | None:
        if not self.is_fitted:
            logger.warning("Laplace has no curvature yet: its predictions are the point estimate's. Fit it first")
            return None
        self._check_weights()
        if self.predictive == "weights":
            logger.warning(
                "Laplace(predictive='weights'): the noise of A times that of B is not small at this precision; "
                "compare with the linearised predictive before you trust it"
            )
            return None
        if self.predictive == "joint":
            noise = self._noise(num_draws, seed)
            return lambda batch: self._joint(program, batch, noise)
        return lambda batch: self._points(*self.linearised(program, batch), seed=seed)

    @torch.no_grad()
    def describe(self) -> dict[str, dict[str, float]]:
        """Prior precision λ and effective parameters of each matrix, and the log evidence of all, in nats."""
        if not self.is_fitted:
            return {}
        rows = {}
        for latent in self._wanted_sites():
            q: Any = self.family(latent)
            precision, effective = q.precision.log().mean().exp(), q.effective_dimension().sum()
            rows[latent.name] = {"precision": float(precision), "effective": float(effective)}
        rows["all"] = {"log_evidence": self.log_evidence()}
        return rows

    # -- Laplace's own -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_curvature(self, found: Mapping[str, Factors], log_likelihood: Tensor) -> None:
        """Takes factors for the posterior's, those of several workers after `Factors.merge`.

        Args:
            found: By site.
            log_likelihood: ``Σ_n log p(y_n | x_n, θ*)`` in nats.
        """
        for latent in self._wanted_sites():
            for name, value in found[latent.name].parts().items():
                self._part(name, latent).copy_(value)
        self.get_buffer("log_likelihood").copy_(log_likelihood)
        self.get_buffer("fitted").fill_(True)
        self.get_buffer("checksum").copy_(self._sums())

    @torch.no_grad()
    def log_evidence(self) -> float:
        """``log p(y|θ*) + Σ_sites log N(θ*; 0, I/λ) + (D/2) log 2π − ½ log det P``, in nats; random matrices only.

        The same as ``log p(y|θ*) − ½ Σ (λ‖θ*‖² + log |P/λ|)``.

        Comparable between ranks, targets and priors wherever the same data are explained.
        """
        self._need_curvature()
        total = self.get_buffer("log_likelihood").double()
        for latent in self._wanted_sites():
            q: Any = self.family(latent)
            squared = self.points[key(latent)].double().square().sum((-2, -1))
            # The ratio, not the determinants themselves: those are of the order of the number of weights.
            total = total - 0.5 * (q.precision.double() * squared + q.log_det_ratio().double()).sum()
        return float(total)

    def tune(
        self, program: PyroLoRA, *, precision: Precision | float | None = None, scope: Scope | None = None
    ) -> None:
        """Chooses λ again from the curvature that there is, without another pass over the training data.

        Args:
            program: The Pyro model; ``"val_nll"`` passes once over its task's validation split.
            precision: As for the constructor; None keeps the present way.
            scope: Likewise.
        """
        self._need_curvature()
        if precision is not None:
            self.precision = check_precision(precision)
        if scope is not None:
            self.scope = check_choice("Laplace: scope", scope, Scope)
        self._choose_precision(program)

    def linearised(self, program: PyroLoRA, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean ``f*(x)``, ``(b, K)``, and covariance ``J Σ Jᵀ``, ``(b, K, K)``, of the natural parameters."""
        self._need_curvature()
        laws: dict[str, Any] = {latent.name: self.family(latent) for latent in self._wanted_sites()}
        means, covariances = [], []
        for _, mean, jacobian in jacobians(program, self._values(), self._groups(), batch):
            with torch.no_grad():
                means.append(mean)
                covariances.append(covariance_of(laws, jacobian))
        return torch.cat(means), torch.cat(covariances)

    def _points(self, mean: Tensor, covariance: Tensor, *, seed: int = 0) -> Tensor:
        """Natural parameters ``(S, b, K)`` whose softmax averages to the predictive."""
        if self.predictive == "probit":
            return probit(mean, covariance).unsqueeze(0)
        if self.predictive == "bridge":
            return bridge(mean, covariance).unsqueeze(0)
        return gaussian_points(mean, covariance, self.num_points, seed=seed)

    @torch.no_grad()
    def _noise(self, num_draws: int, seed: int) -> dict[str, Tensor]:
        """``θ_s − θ*`` of every random site, ``(S, layers, *shape)``; draw s depends on the seed and s alone."""
        rows = []
        with torch.random.fork_rng():
            for s in range(num_draws):
                torch.manual_seed(seed * 1_000_003 + s)
                rows.append({latent.name: self._deviation(latent) for latent in self._wanted_sites()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _deviation(self, latent: Latent) -> Tensor:
        law: Any = self.family(latent)
        return law.sample() - law.mean

    def _joint(self, program: PyroLoRA, batch: Batch, noise: Mapping[str, Tensor]) -> Tensor:
        """``f*(x) + J(x)(θ_s − θ*)``, ``(S, b, K)``: a Jacobian-vector product from the K backward passes."""
        columns = []
        for mean, own in slices(program, self._values(), self._groups(), batch):  # noqa: B007 - the same every time
            columns.append(sum(torch.einsum("lnoi,sloi->sn", own[name], noise[name]) for name in own))
        return mean + torch.stack([torch.as_tensor(column) for column in columns], -1)

    def _choose_precision(self, program: PyroLoRA) -> None:
        wanted = self._wanted_sites()
        laws = {latent.name: self.family(latent) for latent in wanted}
        if isinstance(self.precision, (int, float)):
            chosen = {name: torch.tensor(float(self.precision)) for name in laws}
        elif self.precision == "declared":
            chosen = {latent.name: torch.tensor(declared_precision(latent)) for latent in wanted}
        else:  # by evidence, which is where the search by validation starts
            chosen = tuned(laws, {latent.name: self.points[key(latent)] for latent in wanted}, scope=self.scope)
        if validates(self.precision, program):
            factor = self._validated(program, laws, chosen)
            chosen = {name: value * factor for name, value in chosen.items()}
        for latent in wanted:
            self._part("precision", latent).copy_(chosen[latent.name])

    def _validated(self, program: PyroLoRA, laws: Mapping[str, Any], base: Mapping[str, Tensor]) -> float:
        """The factor on λ with the smallest NLL of the task's validation split."""
        data = validation_rows(program)
        found = batches(program, data, self.batch_size, label="validation")
        values, sites = self._values(), self._groups()
        factors = torch.logspace(-3, 3, 25)
        candidates = [{name: base[name] * factor for name in laws} for factor in factors.tolist()]
        scores = negative_log_likelihoods(program, values, sites, found, laws, candidates, self._points)
        return best_factor(factors, scores)

    def _allocate(self, latent: Latent) -> None:
        for name, shape in self._parts(latent).items():
            self.register_buffer(f"{name}:{key(latent)}", torch.ones(shape, device=latent.start.device))

    def _parts(self, latent: Latent) -> dict[str, tuple[int, ...]]:
        """What describes the posterior of a site beside its mean, with shapes."""
        layers = latent.shape[0]
        small, large = sorted(latent.shape[1:])
        if self.structure == "diagonal":
            return {"curvature": latent.shape, "precision": (layers,)}
        rank = min(self.rank, large) if self.structure == "low_rank" else large
        return {
            "basis": (layers, large, rank),
            "values": (layers, rank),
            "remainder": (layers,),
            "small_basis": (layers, small, small),
            "small_values": (layers, small),
            "precision": (layers,),
        }

    def _part(self, name: str, latent: Latent) -> Tensor:
        return self.get_buffer(f"{name}:{key(latent)}")

    # -- guards ------------------------------------------------------------------------------------------------------

    @property
    def is_fitted(self) -> bool:
        """Whether the curvature is known."""
        return bool(self.fitted)

    def _need_curvature(self) -> None:
        if not self.is_fitted:
            raise RuntimeError(
                "Laplace has no curvature yet: fit it with pyrolora.fit, or call post_fit(program, data)"
            )
        self._check_weights()

    @torch.no_grad()
    def _check_weights(self) -> None:
        if not torch.allclose(self._sums(), self.get_buffer("checksum"), rtol=1e-6, atol=1e-9):
            raise RuntimeError(
                "Laplace's weights changed after its curvature was taken, which holds at those weights alone: call "
                "post_fit(program, data) again"
            )

    @torch.no_grad()
    def _sums(self) -> Tensor:
        """Σ θ* and Σ θ*² of all point estimates: enough to see that they changed."""
        points = [value.detach().double().flatten() for value in self.points.values()]
        return torch.stack([sum(p.sum() for p in points), sum(p.square().sum() for p in points)])  # type: ignore[list-item]

    def _values(self) -> dict[str, Tensor]:
        return {name: self.point(latent) for name, latent in self.latents.items()}

    def _groups(self) -> list[SiteGroup]:
        return [latent.group for latent in self._wanted_sites() if latent.group is not None]

    def _wanted_sites(self) -> list[Latent]:
        return [latent for latent in self.latents.values() if self._wanted(latent)]

    def _wanted(self, latent: Latent) -> bool:
        return latent.group is not None and latent.event_dim == 2 and matches(latent.name, self.random)

    _is_held = Guide._is_hyper

    def _check_patterns(self) -> None:
        for pattern in [self.random] if isinstance(self.random, str) else self.random:
            if not any(self._wanted(latent) and matches(latent.name, pattern) for latent in self.latents.values()):
                raise ValueError(f"random={pattern!r} matches no matrix; the sites are {', '.join(self.latents)}")
