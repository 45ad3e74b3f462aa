"""Laplace: a Gaussian at the MAP estimate whose precision is the curvature of the objective there."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from datasets import Dataset
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.guides.base import Guide, key, matches
from pyrolora.guides.curvature import Factors, Recorder, Tokens, curvature, large_is_input
from pyrolora.guides.precision import Scope, tuned
from pyrolora.program import Batch, Latent, PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")

Precision = Literal["marglik", "declared"]
Predictive = Literal["linearised", "probit", "bridge", "weights"]


class Laplace(Guide):
    """``q(θ) = N(θ*, P⁻¹)``, ``P = λ I + F``: first MAP, then the Fisher information F there in one pass over the data.

    ``F ≈ Ā ⊗ S̄`` for each matrix, the large side at rank k plus its exact trace (`LowRankKroneckerNormal`). Predictions
    are linearised by default: ``f(x) ~ N(f*(x), J Σ Jᵀ)`` over the natural parameters, with J by one backward pass for
    each class, then averaged over quasi-Monte Carlo points. The model's own prediction stays in the centre, so that
    accuracy hardly moves. The evidence ``log p(y|θ*) + log p(θ*) + (D/2) log 2π − ½ log det P`` is in `describe`.

    Biases, and every site that does not match ``random``, keep their point estimates.

    Args:
        random: Pattern(s) of the matrices that are random: ``"lora.*"``, or ``"head.*"`` for last-layer Laplace.
        rank: k of the large side.
        tokens: ``"reduce"``, ``"expand"`` or ``"last"``, see `Reduction`.
        precision: λ, the prior's precision: ``"marglik"`` maximises the evidence, ``"declared"`` takes the declared
            Normal prior's.
        scope: ``"site"``, ``"layer"`` or ``"global"``: what shares one λ under ``"marglik"``.
        predictive: ``"linearised"``, its closed forms ``"probit"`` or ``"bridge"``, or ``"weights"``: draws of the
            weights, which at the λ of a low-rank adapter are usually unusable (the product of two noises is not small).
        num_points: Quasi-Monte Carlo points of the linearised predictive, whatever number of draws is asked for.
        optimise: False takes the model's present weights (an adapter trained elsewhere) for the MAP estimate.
        exact_up_to: The largest number of classes for which the Fisher information is exact; above, one draw each.
        batch_size: Of the pass over the data.

    Source: Yang et al. 2024 (Laplace-LoRA), section 3; MacKay 1992; Immer et al. 2021, eq. 5 (linearised predictive).
    """

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "lora.*",
        rank: int = 10,
        tokens: Tokens = "reduce",
        precision: Precision = "marglik",
        scope: Scope = "site",
        predictive: Predictive = "linearised",
        num_points: int = 256,
        optimise: bool = True,
        exact_up_to: int = 32,
        batch_size: int = 16,
    ):
        super().__init__(random=random)
        for name, value, choices in (
            ("tokens", tokens, Tokens),
            ("precision", precision, Precision),
            ("scope", scope, Scope),
            ("predictive", predictive, Predictive),
        ):
            if value not in get_args(choices):
                raise ValueError(f"Laplace: {name} is one of {', '.join(get_args(choices))}, not {value!r}")
        if not (rank >= 1 and num_points >= 1 and exact_up_to >= 0 and batch_size >= 1):
            raise ValueError("Laplace: rank, num_points and batch_size are at least 1, exact_up_to at least 0")
        self.rank, self.tokens, self.precision, self.scope = rank, tokens, precision, scope
        self.predictive, self.num_points, self.optimise = predictive, num_points, optimise
        self.exact_up_to, self.batch_size = exact_up_to, batch_size

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)
        # Without curvature it is MAP: no site is random yet.
        self.register_buffer("fitted", torch.tensor(False))
        super().bind(program)
        for latent in self._wanted_sites():
            self._allocate(latent)
        self.register_buffer("log_likelihood", torch.zeros((), device=program.device))

    def is_random(self, latent: Latent) -> bool:
        """Matrices that match ``random``, once the curvature is known; before, the guide is MAP."""
        return self._wanted(latent) and bool(self.fitted)

    def family(self, latent: Latent) -> TorchDistributionMixin:
        own = {name: getattr(self, f"{name}:{key(latent)}") for name in _PARTS}
        basis = own.pop("basis")
        assert latent.group is not None
        return LowRankKroneckerNormal(
            self.points[key(latent)], basis, **own, transposed=large_is_input(latent.group), validate_args=False
        )

    def centre(self, latent: Latent) -> Tensor:
        return self.points[key(latent)]

    def point(self, latent: Latent) -> Tensor:
        return self.points[key(latent)] if self._wanted(latent) else super().point(latent)

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        values = {name: self.point(latent) for name, latent in self.latents.items()}
        wanted = self._wanted_sites()
        sites = [latent.group for latent in wanted if latent.group is not None]
        found, total = curvature(
            program,
            values,
            sites,
            data,
            rank=self.rank,
            tokens=self.tokens,
            exact_up_to=self.exact_up_to,
            batch_size=self.batch_size,
        )
        self.set_curvature(found, total)
        self._choose_precision(program)

    def passes(self, num_draws: int, num_outputs: int) -> int:
        linearised = bool(self.fitted) and self.predictive != "weights" and num_draws > 0
        return 1 + num_outputs if linearised else super().passes(num_draws, num_outputs)

    def natural_parameters(
        self, program: PyroLoRA, num_draws: int, *, seed: int = 0
    ) -> Callable[[Batch], Tensor] | None:
        if self.predictive == "weights" or not bool(self.fitted):
            if self.predictive == "weights":
                logger.warning(
                    "Laplace(predictive='weights'): the noise of A times that of B is not small at this precision; "
                    "compare with the linearised predictive before you trust it"
                )
            return None
        return lambda batch: self._points(*self.linearised(program, batch), seed=seed)

    @torch.no_grad()
    def describe(self) -> dict[str, dict[str, float]]:
        """Prior precision λ and effective parameters of each matrix, and the log evidence of all, in nats."""
        if not bool(self.fitted):
            return {}
        rows = {}
        for latent in self._wanted_sites():
            q: Any = self.family(latent)
            rows[latent.name] = {
                "precision": float(q.precision.log().mean().exp()),
                "effective": float(q.effective_dimension().sum()),
            }
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
            assert latent.group is not None
            factors = found[latent.name]
            # Ā is the mean over examples, S̄ the sum: the division goes where the input side is.
            share = 1.0 / max(factors.weight, 1.0)
            large, small = (share, 1.0) if large_is_input(latent.group) else (1.0, share)
            basis, scale, _ = torch.linalg.svd(factors.sketch * math.sqrt(large), full_matrices=False)
            values = scale.square()
            size = basis.shape[-2]
            left = (factors.trace * large - values.sum(-1)).clamp(min=0)
            eigen, vectors = torch.linalg.eigh(factors.small * small)
            parts = {
                "basis": _completed(basis, factors.rank),
                "values": torch.nn.functional.pad(values, (0, factors.rank - values.shape[-1])),
                "remainder": left / max(size - factors.rank, 1),
                "small_basis": vectors,
                "small_values": eigen.clamp(min=0),
            }
            for name, value in parts.items():
                getattr(self, f"{name}:{key(latent)}").copy_(value)
        self.get_buffer("log_likelihood").copy_(log_likelihood)
        self.get_buffer("fitted").fill_(True)

    @torch.no_grad()
    def log_evidence(self) -> float:
        """``log p(y|θ*) + Σ_sites log N(θ*; 0, I/λ) + (D/2) log 2π − ½ log det P``, in nats; random matrices only.

        The same as ``log p(y|θ*) − ½ Σ (λ‖θ*‖² + log |P/λ|)``.

        Comparable between ranks, targets and priors wherever the same data are explained.
        """
        total = self.get_buffer("log_likelihood").double()
        for latent in self._wanted_sites():
            q: Any = self.family(latent)
            squared = self.points[key(latent)].double().square().sum((-2, -1))
            # The ratio, not the determinants themselves: those are of the order of the number of weights.
            total = total - 0.5 * (q.precision.double() * squared + q.log_det_ratio().double()).sum()
        return float(total)

    def linearised(self, program: PyroLoRA, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean ``f*(x)``, ``(b, K)``, and covariance ``J Σ Jᵀ``, ``(b, K, K)``, of the natural parameters."""
        wanted = self._wanted_sites()
        sites = [latent.group for latent in wanted if latent.group is not None]
        recorder = Recorder(program, sites)
        values = {name: self.point(latent) for name, latent in self.latents.items()}
        with evaluating(program.model), recorder.watching(), torch.enable_grad():
            logits = recorder.run(values, batch)
            flat = logits.unsqueeze(-1) if logits.dim() == 1 else logits
            if flat.dim() != 2:
                raise ValueError(
                    "the linearised predictive is over a vector of natural parameters for each example, not "
                    f"{tuple(logits.shape)}: use Laplace(predictive='weights')"
                )
            outputs = flat.shape[-1]
            unit = torch.eye(outputs, dtype=flat.dtype, device=flat.device)
            slices: dict[str, list[Tensor]] = {latent.name: [] for latent in wanted}
            for c in range(outputs):
                gradients = recorder.gradients(flat, unit[c], keep=c + 1 < outputs)
                for site in sites:
                    slices[site.name].append(_jacobian(recorder, gradients, site.holders, len(flat)))
        covariance = flat.new_zeros(len(flat), outputs, outputs)
        with torch.no_grad():
            for latent in wanted:
                q: Any = self.family(latent)
                covariance += q.covariance_of(torch.stack(slices[latent.name], 2)).sum(0)
        return flat.detach(), covariance

    def _points(self, mean: Tensor, covariance: Tensor, *, seed: int) -> Tensor:
        """Natural parameters ``(S, b, K)`` whose softmax averages to the predictive."""
        if self.predictive == "probit":
            return _probit(mean, covariance).unsqueeze(0)
        if self.predictive == "bridge":
            return _bridge(mean, covariance).unsqueeze(0)
        engine = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=seed % 2**31)
        uniform = engine.draw(self.num_points, dtype=torch.double).clamp(1e-9, 1 - 1e-9)
        white = torch.special.ndtri(uniform).to(mean)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        return mean + torch.einsum("nkj,sj->snk", root, white)

    def _choose_precision(self, program: PyroLoRA) -> None:
        wanted = self._wanted_sites()
        laws = {latent.name: self.family(latent) for latent in wanted}
        if self.precision == "declared":
            chosen = {latent.name: torch.tensor(_declared(latent)) for latent in wanted}
        else:
            chosen = tuned(laws, {latent.name: self.points[key(latent)] for latent in wanted}, scope=self.scope)
        for latent in wanted:
            getattr(self, f"precision:{key(latent)}").copy_(chosen[latent.name])

    def _allocate(self, latent: Latent) -> None:
        layers = latent.shape[0]
        small, large = sorted(latent.shape[1:])
        rank = min(self.rank, large)
        shapes: dict[str, tuple[int, ...]] = {
            "basis": (layers, large, rank),
            "values": (layers, rank),
            "remainder": (layers,),
            "small_basis": (layers, small, small),
            "small_values": (layers, small),
            "precision": (layers,),
        }
        for name, shape in shapes.items():
            self.register_buffer(f"{name}:{key(latent)}", torch.ones(shape, device=latent.start.device))

    def _wanted_sites(self) -> list[Latent]:
        return [latent for latent in self.latents.values() if self._wanted(latent)]

    def _wanted(self, latent: Latent) -> bool:
        return latent.group is not None and latent.event_dim == 2 and matches(latent.name, self.random)

    def _is_held(self, latent: Latent) -> bool:
        owner = self._owner(latent)
        return owner is not None and owner is not latent

    def _check_patterns(self) -> None:
        for pattern in [self.random] if isinstance(self.random, str) else self.random:
            if not any(self._wanted(latent) and matches(latent.name, pattern) for latent in self.latents.values()):
                raise ValueError(f"random={pattern!r} matches no matrix; the sites are {', '.join(self.latents)}")


_PARTS = ("basis", "values", "remainder", "small_basis", "small_values", "precision")


def _jacobian(
    recorder: Recorder, gradients: Mapping[str, Tensor], holders: Sequence[tuple[str, str]], size: int
) -> Tensor:
    """``∂f_c/∂W = Σ_t g_t a_tᵀ`` of each example, ``(layers, b, out, in)``."""
    rows = []
    for path, _ in holders:
        g = gradients[path].float().reshape(size, -1, gradients[path].shape[-1])
        a = recorder.inputs[path].float().reshape(size, -1, recorder.inputs[path].shape[-1])
        rows.append(g.mT @ a)
    return torch.stack(rows)


def _probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """``log p_k`` up to a constant, ``p_k ≈ 1/(1 + Σ_{j≠k} exp(−(μ_k − μ_j)/√(1 + π/8 V_kj)))``, V of the difference.

    For two classes it is MacKay's probit approximation. Source: Lu et al. 2020 (mean-field softmax), pairwise form.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    margin = (mean.unsqueeze(-1) - mean.unsqueeze(-2)) / (1 + math.pi / 8 * spread.clamp(min=0)).sqrt()
    return -torch.logsumexp(-margin, -1)  # j = k contributes the 1


def _bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logarithm of the mean of the Dirichlet that matches the Gaussian (Hobbhahn et al. 2022, eq. 10).

    The logits are centred first, because a softmax does not see their sum. For two classes the bridge's mean is that
    of the point estimate, whatever the covariance.
    """
    classes = mean.shape[-1]
    centring = torch.eye(classes, dtype=mean.dtype, device=mean.device) - 1 / classes
    mean = mean @ centring
    variance = (centring @ covariance @ centring).diagonal(dim1=-2, dim2=-1)
    exponent = mean.exp() / classes**2 * (-mean).exp().sum(-1, keepdim=True)
    alpha = (1 - 2 / classes + exponent) / variance.clamp(min=1e-12)
    return alpha.clamp(min=1e-12).log()


def _declared(latent: Latent) -> float:
    if latent.flat:
        raise ValueError(
            f"Laplace(precision='declared'): site {latent.name!r} has a flat prior; declare priors.Normal for it, or "
            "use precision='marglik'"
        )
    return latent.prior_scale**-2


def _completed(basis: Tensor, size: int) -> Tensor:
    """Orthonormal columns up to ``size``, where fewer rows than that were seen: their values are zero."""
    missing = size - basis.shape[-1]
    if missing <= 0:
        return basis
    # Any further columns will do: Householder's Q is orthonormal even where they depend on the basis.
    more = torch.eye(basis.shape[-2], missing, dtype=basis.dtype, device=basis.device).expand(len(basis), -1, -1)
    filled = torch.linalg.qr(torch.cat([basis, more], -1)).Q
    return torch.cat([basis, filled[..., -missing:]], -1)
