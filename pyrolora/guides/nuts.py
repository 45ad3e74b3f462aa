"""NUTS: the posterior itself, sampled by Hamiltonian Monte Carlo; for models tiny enough to bear it."""

from __future__ import annotations

import logging

import torch
from datasets import Dataset
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer import NUTS as Kernel
from pyro.infer.autoguide.initialization import init_to_value
from torch.distributions import biject_to

from pyrolora.guides.base import Card, key, unconstrained
from pyrolora.guides.samples import Samples
from pyrolora.program import PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")


class NUTS(Samples):
    """Points from ``p(θ | y)`` of the declared program, at β = 1 whatever temperature the fit has: ground truth.

    Every leapfrog step is a pass, forward and backward, over all training data at once. Chains start around the
    adapter that the model has, one after another in this process; hyper-parameters of priors are sampled too.

    Args:
        size: Points kept, of all chains together.
        warmup: Steps of each chain before, in which Pyro adapts step size and mass matrix.
        chains: Number of chains.
        max_tree_depth: At most ``2^depth`` leapfrog steps for a point.
        spread: Standard deviation of the starts, as a fraction of the prior's.

    Source: Hoffman & Gelman 2014; as in Pyro.
    """

    card = Card("every site: samples", "2^depth over the data for each", "S")
    optimise = False

    def __init__(
        self,
        *,
        size: int = 500,
        warmup: int = 300,
        chains: int = 2,
        max_tree_depth: int = 6,
        spread: float = 0.1,
    ):
        super().__init__(size)
        if not (chains >= 1 and size >= 4 * chains and warmup >= 1 and max_tree_depth >= 1 and spread >= 0):
            raise ValueError("NUTS: at least 4 points a chain; chains, warmup and max_tree_depth at least 1, spread 0")
        self.warmup, self.chains, self.max_tree_depth, self.spread = warmup, chains, max_tree_depth, spread

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        assert program.task is not None
        plain = data.remove_columns([c for c in ("text",) if c in data.column_names])
        batch = {name: value.to(program.device) for name, value in program.task.collate(list(plain)).items()}
        divergences = 0
        with evaluating(program.model), poutine.block():
            for chain in range(self.chains):
                wanted = self.size // self.chains + (chain < self.size % self.chains)
                divergences += self._run(program, batch, wanted)
        if divergences:
            logger.warning("NUTS: %d of %d transitions diverged; a longer warmup may help", divergences, self.size)
        super().post_fit(program, data)

    def _run(self, program: PyroLoRA, batch: dict, wanted: int) -> int:
        """One chain; returns the number of its divergent transitions."""
        start = {}
        for latent in self.latents.values():
            value = unconstrained(latent)
            value = value + self.spread * latent.prior_scale * torch.randn_like(value)
            start[latent.name] = biject_to(latent.support)(value)
        kernel = Kernel(program, max_tree_depth=self.max_tree_depth, init_strategy=init_to_value(values=start))
        chain = MCMC(kernel, num_samples=wanted, warmup_steps=self.warmup, disable_progbar=True)
        chain.run(batch)
        self._take({name: value.detach() for name, value in chain.get_samples().items()}, wanted)
        return sum(len(found) for found in chain.diagnostics()["divergences"].values())

    @torch.no_grad()
    def _take(self, samples: dict[str, torch.Tensor], wanted: int) -> None:
        count = self.get_buffer("count")
        first = int(count)
        for latent in self.latents.values():
            self.kept(latent)[first : first + wanted] = samples[latent.name]
            if key(latent) in self.points:
                last = biject_to(latent.support).inv(samples[latent.name][-1])
                self.points[key(latent)].copy_(last)
        count += wanted
