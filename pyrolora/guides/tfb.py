"""TFB: training-free Bayesianisation, the widest noise on a trained adapter that its anchor data bear."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.guides.base import Card, Guide, key, matches
from pyrolora.guides.curvature import batches
from pyrolora.program import Latent, PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")


class TFB(Guide):
    """``A' ~ N(VᵀA, σ_q²/d_i²)`` row by row, for ``B = U diag(d) Vᵀ`` and ``ΔW = s (U diag(d)) A'``; one number σ_q.

    σ_q is the largest with ``|NLL(σ_q) − NLL(0)| / NLL(0) ≤ tolerance`` on an anchor set, NLL that of the mean
    predictive: doubled until it breaks, then by bisection, every evaluation under the same noise. In the coordinates
    of the adapter, which stays as it is, ``A ~ N(A, (V diag(σ_q²/d²) Vᵀ) ⊗ I)``: the rotation leaves ΔW unchanged.

    Args:
        random: Pattern(s) of the A matrices that are random.
        tolerance: Relative change of the NLL that is borne.
        num_draws: Draws of the mean predictive while σ_q is sought.
        anchor_size: Rows of the training split, spread evenly, that are the anchor set.
        precision: Where bisection stops: relative width of the bracket of σ_q.
        optimise: False takes the model's present weights (an adapter trained elsewhere); True trains MAP first.
        batch_size: Of the passes over the anchor set.

    Raises:
        ValueError: An adapter whose B is zero, which no noise of A can change.

    Source: Shi et al. 2024 (arXiv 2412.05723).
    """

    card = Card("A: one scale over all layers", "none; some 20 S over the anchor rows", "S")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "*.A",
        tolerance: float = 0.003,
        num_draws: int = 10,
        anchor_size: int = 256,
        precision: float = 0.01,
        optimise: bool = False,
        batch_size: int = 16,
    ):
        super().__init__(random=random)
        if not (tolerance > 0 and 0 < precision < 1 and min(num_draws, anchor_size, batch_size) >= 1):
            raise ValueError("TFB: tolerance and precision (below 1) are positive, sizes at least 1")
        self.tolerance, self.precision, self.optimise = tolerance, precision, optimise
        self.num_draws, self.anchor_size, self.batch_size = num_draws, anchor_size, batch_size

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)
        # Without σ_q it is MAP: no site is random yet.
        self.register_buffer("found", torch.zeros(3, dtype=torch.double, device=program.device))
        super().bind(program)
        for latent in self.latents.values():
            if self._wanted(latent) and "expert" in latent.group.holders[0][0]:  # type: ignore[union-attr]
                raise ValueError(f"TFB: {latent.name!r} holds several experts, whose A and B do not pair up as one B A")

    @property
    def sigma(self) -> float:
        """σ_q; 0 before it is found."""
        return float(self.get_buffer("found")[0])

    def is_random(self, latent: Latent) -> bool:
        """A matrices that match ``random``, once σ_q is known."""
        return self._wanted(latent) and self.sigma > 0

    def family(self, latent: Latent) -> TorchDistributionMixin:
        return MatrixNormal(self.points[key(latent)], self.sigma * self.unit_scale(latent))

    def centre(self, latent: Latent) -> Tensor:
        return self.points[key(latent)]

    def point(self, latent: Latent) -> Tensor:
        return self.points[key(latent)] if self._wanted(latent) else super().point(latent)

    def describe(self) -> dict[str, dict[str, float]]:
        """σ_q and the NLL of the anchor set without and with its noise, nats per example."""
        if not self.sigma:
            return {}
        sigma, before, after = self.get_buffer("found").tolist()
        return {"all": {"sigma": sigma, "anchor_nll": before, "anchor_nll_noisy": after}}

    @torch.no_grad()
    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        anchor = _spread(data, self.anchor_size)
        noise = self._noise()
        with evaluating(program.model):
            reference = self._nll(program, anchor, noise, 0.0)

            def admissible(sigma: float) -> bool:
                return abs(self._nll(program, anchor, noise, sigma) - reference) <= self.tolerance * abs(reference)

            sigma = largest(admissible, precision=self.precision)
            after = self._nll(program, anchor, noise, sigma)
        self.get_buffer("found").copy_(torch.tensor([sigma, reference, after]))
        logger.info(
            "TFB: σ_q = %.4g; NLL of %d anchor rows %.4f without noise, %.4f with it",
            sigma,
            len(anchor),
            reference,
            after,
        )

    # -- TFB's own ---------------------------------------------------------------------------------------------------

    def unit_scale(self, latent: Latent) -> Tensor:
        """Lower triangular L, ``(layers, r, r)``, with ``L Lᵀ = V diag(1/d²) Vᵀ``: the rows' covariance at σ_q = 1."""
        b = self.points[key(latent).removesuffix("A") + "B"].detach()
        _, d, v = rotation(b)
        # V diag(1/d) is one square root; QR makes the triangular one of it without squaring its condition.
        factor = torch.linalg.qr((v / d.unsqueeze(-2)).mT).R.mT
        return factor * factor.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

    def _noise(self) -> dict[str, Tensor]:
        """Draws of ``A − mean`` at σ_q = 1, ``(S, layers, r, d_in)``: common random numbers for every σ_q."""
        noise = {}
        for latent in self.latents.values():
            if self._wanted(latent):
                white = torch.randn(self.num_draws, *latent.shape).to(latent.start.device)
                noise[latent.name] = self.unit_scale(latent) @ white
        return noise

    def _nll(self, program: PyroLoRA, data: Dataset, noise: Mapping[str, Tensor], sigma: float) -> float:
        """``−(1/n) Σ_n log (1/S) Σ_s p(y_n | x_n, A + σ E_s)`` in nats."""
        values = {name: self.point(latent) for name, latent in self.latents.items()}
        total, draws = 0.0, self.num_draws if sigma else 1
        for batch in batches(program, data, self.batch_size, label=f"σ = {sigma:.3g}"):
            rows = []
            for s in range(draws):
                own = {**values, **{name: values[name] + sigma * e[s] for name, e in noise.items()}}
                parameters = {name: value for name, value in own.items() if name not in program.sites}
                rows.append(program.likelihood.log_prob(program.logits(own, batch), parameters, batch))
            total -= float((torch.stack(rows).logsumexp(0) - torch.tensor(float(draws)).log()).sum())
        return total / len(data)

    def _wanted(self, latent: Latent) -> bool:
        return latent.group is not None and latent.group.role == "A" and matches(latent.name, self.random)

    _is_held = Guide._is_hyper

    def _check_patterns(self) -> None:
        for pattern in [self.random] if isinstance(self.random, str) else self.random:
            if not any(self._wanted(latent) and matches(latent.name, pattern) for latent in self.latents.values()):
                raise ValueError(
                    f"TFB: random={pattern!r} matches no A matrix; the sites are {', '.join(self.latents)}"
                )


def rotation(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``B = U diag(d) Vᵀ`` for each layer: U ``(layers, d_out, r)``, d ``(layers, r)``, V ``(layers, r, r)``.

    ``B' = U diag(d)`` and ``A' = VᵀA`` have the product ``B' A' = B A``. Singular values below a ten-thousandth of the
    largest count as that: their directions, which ΔW hardly has, would get noise without bound.

    Raises:
        ValueError: B is zero in a layer.
    """
    u, d, vt = torch.linalg.svd(b, full_matrices=False)
    largest_value = d.amax(-1, keepdim=True)
    if not bool((largest_value > 0).all()):
        raise ValueError(
            "TFB: B of a layer is zero, so that no noise of A changes anything: give a trained adapter (the folder as "
            "the program's second argument, in a recipe `adapter: FOLDER`), or TFB(optimise=True)"
        )
    return u, d.clamp(min=1e-4 * largest_value), vt.mT


def largest(admissible: Any, *, precision: float, start: float = 1e-3, most: float = 1e3) -> float:
    """The largest admissible number, within a relative ``precision``: doubled until it is not, then by bisection.

    Args:
        admissible: Of a number > 0; expected to hold up to some bound.
        precision: Relative width of the bracket at the end, whose admissible end is returned.
        start: The first number tried; halved where it is not admissible.
        most: Where doubling stops.
    """
    low = start
    while not admissible(low):
        low /= 2
        if low < start * 1e-6:
            raise ValueError("TFB: no noise is small enough for this tolerance; raise it")
    high = 2 * low
    while admissible(high):
        low, high = high, 2 * high
        if low > most:
            logger.warning("TFB: σ_q = %.3g changes nothing yet: the anchor data do not depend on these adapters", low)
            return low
    while high - low > precision * low:
        middle = (low + high) / 2
        low, high = (middle, high) if admissible(middle) else (low, middle)
    return low


def _spread(data: Dataset, size: int) -> Dataset:
    """``size`` rows at even distances: of every part of the data, none by chance."""
    rows = torch.linspace(0, len(data) - 1, min(size, len(data))).round().long().tolist()
    return data.select(rows)
