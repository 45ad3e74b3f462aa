"""Regression with Gaussian noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.likelihoods.base import Batch, Likelihood


class Normal(Likelihood):
    """A real number with Gaussian noise: ``y ~ N(f, scale²)``, ``scale ~ LogNormal(prior_loc, prior_scale)``.

    The noise scale is a global latent site, ``likelihood.scale``, unless it is given. It is in the units of the
    labels: with labels far from unit size, set ``prior_loc`` to the log of a plausible noise scale.

    Shapes: model output (b, 1) or (b, D), logits (b,) or (b, D), labels the same.

    Args:
        scale: a fixed noise scale, in the units of the labels; ``None`` to learn it.
        prior_loc: mean of ``log scale`` under its prior.
        prior_scale: standard deviation of ``log scale`` under its prior.
    """

    scale_site = "likelihood.scale"

    def __init__(self, scale: float | None = None, *, prior_loc: float = 0.0, prior_scale: float = 1.0) -> None:
        if scale is not None and scale <= 0:
            raise ValueError(f"the noise scale must be positive, not {scale}; pass None to learn it.")
        if prior_scale <= 0:
            raise ValueError(f"prior_scale must be positive, not {prior_scale}; to fix the noise pass scale instead.")
        self.scale = scale
        self.prior_loc = prior_loc
        self.prior_scale = prior_scale

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """The predicted mean in float32; shape (b,), or (b, D) for D > 1 outputs."""
        return output.logits.float().squeeze(-1)

    def sample_parameters(self) -> dict[str, Tensor]:
        """``{"likelihood.scale": scalar}``, or nothing where the scale is fixed."""
        if self.scale is not None:
            return {}
        loc, spread = torch.tensor(float(self.prior_loc)), torch.tensor(float(self.prior_scale))
        return {self.scale_site: pyro.sample(self.scale_site, dist.LogNormal(loc, spread, validate_args=False))}

    def distribution(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> TorchDistributionMixin:
        """``N(f, scale²)``; batch shape (b,), event shape () or (D,)."""
        if self.scale is not None:
            scale = torch.tensor(float(self.scale))
        elif self.scale_site in parameters:
            scale = parameters[self.scale_site]
        else:
            raise KeyError(
                f"no value for the site '{self.scale_site}': pass what sample_parameters() returned, or construct "
                "Normal(scale=...) with a fixed noise scale."
            )
        noise = dist.Normal(logits, scale.to(logits), validate_args=False)
        return noise.to_event(logits.dim() - 1)

    def fisher_factors(
        self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch, *, exact_up_to: int = 32
    ) -> Iterator[Tensor]:
        """``e_d / scale`` for each output d: the Fisher information is ``I / scale²``."""
        outputs = 1 if logits.dim() == 1 else logits.shape[-1]
        if outputs > exact_up_to:
            yield from super().fisher_factors(logits, parameters, batch, exact_up_to=exact_up_to)
            return
        scale = parameters[self.scale_site] if self.scale is None else torch.tensor(float(self.scale))
        unit = torch.eye(outputs, dtype=logits.dtype, device=logits.device) / scale.to(logits)
        for d in range(outputs):
            yield unit[d].expand(logits.shape) if logits.dim() > 1 else unit[d].expand(len(logits))

    def probabilities(self, logits: Tensor, parameters: Mapping[str, Tensor], batch: Batch) -> NoReturn:
        """Not defined: the support is the real line."""
        raise NotImplementedError(
            "Normal has no class probabilities; use distribution(...) for the predictive density or log_prob(...)."
        )
