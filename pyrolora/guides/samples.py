"""Kept weights: a posterior as finitely many points, and the snapshots of one run as an ensemble."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from datasets import Dataset
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyrolora.guides.base import Card, Step, key
from pyrolora.guides.map import MAP
from pyrolora.program import Batch, Latent, PyroLoRA


class Samples(MAP):
    """``q(θ) = (1/M) Σ_m δ(θ − θ_m)``: points that a run or a sampler left, kept whole.

    Base class: what follows it decides which weights `keep` is called for. The points are buffers, and so in every
    checkpoint. Draw s is point ``s · k mod M`` with k near the golden section of M, so that few draws are spread over
    the whole run; more than M draws repeat. The posterior's mean is the last point, as averages of B and of A are no
    average of ``B A``.

    Args:
        size: M, at most; a run that is too short leaves fewer.
    """

    def __init__(self, size: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"{type(self).__name__}: size is at least 1, not {size}")
        self.size = size
        self._index = 0

    def bind(self, program: PyroLoRA) -> None:
        for name in [name for name, _ in self.named_buffers()]:
            delattr(self, name)
        # Until the run is over it is MAP: no site is random yet.
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("count", torch.tensor(0))
        super().bind(program)
        for latent in self.latents.values():
            empty = latent.start.new_zeros((self.size, *latent.shape))
            self.register_buffer(f"kept:{key(latent)}", empty)

    @property
    def num_kept(self) -> int:
        """M."""
        return int(self.get_buffer("count"))

    def is_random(self, latent: Latent) -> bool:
        """Every site, once there are several points."""
        return bool(self.get_buffer("fitted")) and self.num_kept > 1

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        if self.num_kept > 1:
            in_turn = self.turn is not None
            self._index = _spread(int(self.turn or 0), self.num_kept) if in_turn else _any(self.num_kept)
        return super().forward(batch)

    def family(self, latent: Latent) -> TorchDistributionMixin:
        return dist.Delta(self.kept(latent)[self._index], event_dim=latent.event_dim)

    def centre(self, latent: Latent) -> Tensor:
        return self.kept(latent)[self.num_kept - 1]

    def draws_for(self, num_draws: int) -> int:
        return max(min(num_draws, self.num_kept), 1) if self.random_sites() else 1

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        if not self.num_kept:
            raise ValueError(f"{type(self).__name__}: the run was too short to leave a single point; train longer")
        self.get_buffer("fitted").fill_(True)

    @torch.no_grad()
    def keep(self) -> None:
        """Takes the present point estimates as the next point."""
        count = self.get_buffer("count")
        if int(count) >= self.size:
            return
        for latent in self.latents.values():
            self.kept(latent)[int(count)] = self.point(latent)
        count += 1

    def kept(self, latent: Latent) -> Tensor:
        """The points of one site, ``(size, *shape)``, zeros after the first M."""
        return self.get_buffer(f"kept:{key(latent)}")

    _is_held = MAP._is_hyper


class Checkpoints(Samples):
    """A checkpoint ensemble: evenly spaced snapshots of one MAP run count as the members of an ensemble.

    Cheaper than `Ensemble` by the number of members, and less diverse: the snapshots share a start.

    Args:
        size: Number of snapshots, the last of them at the end of the run.
        start: The fraction of the run after which they are taken.

    Source: Huang et al. 2017 (snapshot ensembles), without their cycles; Chen et al. 2017 (checkpoint ensembles).
    """

    card = Card("which of M snapshots of a run it is", "1 a step", "M")

    def __init__(self, *, size: int = 5, start: float = 0.5):
        super().__init__(size)
        if not 0 <= start < 1:
            raise ValueError(f"Checkpoints: start is in [0, 1), not {start!r}")
        self.start = start

    def draws_for(self, num_draws: int) -> int:
        return self.num_kept if self.random_sites() and num_draws else 1

    def after_step(self, step: Step) -> None:
        if step.is_one_of(self.size, start=self.start):
            self.keep()


def _any(count: int) -> int:
    return int(torch.randint(count, ()))


def _spread(turn: int, count: int) -> int:
    """A permutation of ``0 … count − 1`` whose first elements are far apart."""
    stride = max(round(count * 0.618), 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return turn * stride % count
