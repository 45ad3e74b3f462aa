"""SWAG: a Gaussian from the trajectory of the optimiser at a constant learning rate."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro.distributions as dist
import torch
from datasets import Dataset
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.guides.base import Card, Guide, Step, key
from pyrolora.program import Batch, Latent, PyroLoRA

_MOMENTS = ("mean", "squares", "deviations")


class SWAG(Guide):
    """``θ = θ_SWA + (1/√2) (Σ_diag^½ z₁ + D̂ z₂ / √(K − 1))``, z standard normal, z₂ shared by all sites.

    ``θ_SWA`` and ``Σ_diag`` are the mean and the variances of weights along the last part of a run of MAP at a constant
    learning rate, D̂ the last K deviations from the running mean. At rank 0 it is ``N(θ_SWA, Σ_diag)``. Its width is
    that of the optimiser's wandering: learning rate and batch size set it, not only the data.

    The moments are buffers, and so in every checkpoint: a resumed run goes on with them.

    Args:
        rank: K.
        num_models: How many evenly spaced weights along the trajectory are used (every step, if there are fewer).
        start: The fraction of the run after which they are.

    Source: Maddox et al. 2019, algorithm 1; on LoRA, Onal et al. 2024.
    """

    card = Card("adapters and heads: a Gaussian of the trajectory", "1 a step", "S")

    def __init__(self, *, rank: int = 20, num_models: int = 40, start: float = 0.5):
        super().__init__()
        if not (num_models >= 2 and 0 <= start < 1 and (rank == 0 or rank >= 2)):
            raise ValueError("SWAG: num_models is at least 2, start in [0, 1), rank 0 or at least 2")
        self.rank, self.num_models, self.start = rank, num_models, start
        self._white: Tensor | None = None

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)
        # Until the run is over it is MAP: no site is random yet.
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("count", torch.tensor(0))
        super().bind(program)
        for latent in self._wanted_sites():
            shapes = {"mean": latent.shape, "squares": latent.shape, "deviations": (self.rank, *latent.shape)}
            for name, shape in shapes.items():
                self.register_buffer(f"{name}:{key(latent)}", torch.zeros(shape, device=latent.start.device))

    def is_random(self, latent: Latent) -> bool:
        """Adapters and heads, under any prior, once the run is over."""
        return latent.group is not None and bool(self.get_buffer("fitted"))

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        # The low-rank part is one draw for all sites: their covariances are part of it.
        columns = min(int(self.get_buffer("count")), self.rank)
        self._white = torch.randn(columns) if columns and bool(self.get_buffer("fitted")) else None
        return super().forward(batch)

    def family(self, latent: Latent) -> TorchDistributionMixin:
        mean, squares, deviations = self._moments(latent)
        variance = (squares / self.get_buffer("count")).clamp(min=torch.finfo(mean.dtype).tiny)
        if self._white is None:
            return dist.Normal(mean, variance.sqrt()).to_event(latent.event_dim)
        columns = len(self._white)
        white = self._white.to(mean) / math.sqrt(2 * (columns - 1))
        shift = torch.tensordot(white, deviations[:columns], dims=1)
        return dist.Normal(mean + shift, (variance / 2).sqrt()).to_event(latent.event_dim)

    def centre(self, latent: Latent) -> Tensor:
        return self._moments(latent)[0]

    def training_arguments(self, args: Any) -> Any:
        """A learning rate that is constant after warm-up: under one that decays the trajectory would come to rest."""
        args = copy.copy(args)
        args.lr_scheduler_type, args.lr_scheduler_kwargs = "constant_with_warmup", {}
        return args

    def after_step(self, step: Step) -> None:
        if step.is_one_of(self.num_models, start=self.start):
            self.collect()

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        if int(self.get_buffer("count")) < 2:
            raise ValueError(f"SWAG: fewer than two steps after {self.start:.0%} of the run; train longer")
        self.get_buffer("fitted").fill_(True)

    @torch.no_grad()
    def describe(self) -> dict[str, dict[str, float]]:
        """Root mean square of the standard deviations of each site, and how many weights they are from."""
        if not bool(self.get_buffer("fitted")):
            return {}
        count = float(self.get_buffer("count"))
        found = {s.name: float((self._moments(s)[1] / count).mean().sqrt()) for s in self._wanted_sites()}
        return {name: {"scale": scale, "models": count} for name, scale in found.items()}

    # -- SWAG's own --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self) -> None:
        """Takes the present weights into the moments (Welford's update, which loses no digits)."""
        count = self.get_buffer("count").add_(1)
        for latent in self._wanted_sites():
            mean, squares, deviations = self._moments(latent)
            value = self.points[key(latent)]
            before = value - mean
            mean += before / count
            squares += before * (value - mean)
            if self.rank:
                deviations[(int(count) - 1) % self.rank] = value - mean

    def _moments(self, latent: Latent) -> tuple[Tensor, Tensor, Tensor]:
        mean, squares, deviations = (self.get_buffer(f"{name}:{key(latent)}") for name in _MOMENTS)
        return mean, squares, deviations

    def _wanted_sites(self) -> list[Latent]:
        return [latent for latent in self.latents.values() if latent.group is not None]

    _is_held = Guide._is_hyper
