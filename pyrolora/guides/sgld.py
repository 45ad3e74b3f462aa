"""SGLD: Langevin sampling of all adapters by stochastic gradients, a cheap reference."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from pyrolora.guides.base import Card, Step
from pyrolora.guides.samples import Samples
from pyrolora.program import PyroLoRA


class SGLD(Samples):
    """Points from ``p(y | θ)^{1/β} p(θ)``: steps of SGD on ``U = −L_β / N`` with noise, under a cyclical learning rate.

    ``v ← μ v − η ∇U + n``, ``θ ← θ + v``, ``n ~ N(0, 2 (1 − μ) β η / N)``: at momentum μ = 0 Langevin dynamics with
    time step ``η / N``, otherwise SGHMC. In each cycle ``η`` falls from ``step_size`` to 0 as a cosine; the first part
    of it has no noise and looks for a mode, the rest samples. Right in the limit of small steps and whole-data
    gradients; a minibatch adds noise of its own, which nothing here corrects.

    The optimiser, its schedule and clipping are prescribed; the learning rate of the training arguments has no effect.

    Args:
        size: Points kept, the same number in every cycle.
        cycles: Of the learning rate.
        step_size: η at the start of a cycle: in the scale of ``U``, the loss per example.
        momentum: μ.
        exploration: The fraction of a cycle before its noise begins.

    Source: Welling & Teh 2011; Chen et al. 2014 (SGHMC), eq. 15; Zhang et al. 2020 (cyclical), eq. 1.
    """

    card = Card("every site: samples", "1 a step", "S")

    def __init__(
        self,
        *,
        size: int = 32,
        cycles: int = 4,
        step_size: float = 0.1,
        momentum: float = 0.9,
        exploration: float = 0.5,
    ):
        super().__init__(size)
        if not (1 <= cycles <= size and step_size > 0 and 0 <= momentum < 1 and 0 <= exploration < 1):
            raise ValueError(
                "SGLD: step_size is positive, cycles at least 1 and at most size, momentum and exploration in [0, 1)"
            )
        self.cycles, self.step_size, self.momentum, self.exploration = cycles, step_size, momentum, exploration

    def bind(self, program: PyroLoRA) -> None:
        super().bind(program)
        for name, parameter in self.points.items():
            self.register_buffer(f"velocity:{name}", torch.zeros_like(parameter))

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        return [{"params": list(self.parameters()), "lr": self.step_size}]

    def training_arguments(self, args: Any) -> Any:
        """Plain SGD under cosine cycles, neither warmed up nor clipped: what the noise is made for."""
        args = copy.copy(args)
        args.optim, args.max_grad_norm, args.warmup_steps = "sgd", 0.0, 0
        args.lr_scheduler_type, args.lr_scheduler_kwargs = "cosine_with_restarts", {"num_cycles": self.cycles}
        return args

    @torch.no_grad()
    def before_step(self, step: Step) -> None:
        rate = step.learning_rate
        if rate <= 0:
            return
        noisy = self._phase(step.number - 1, step) >= self.exploration
        variance = 2 * (1 - self.momentum) * step.temperature * rate / step.num_data if noisy else 0.0
        for name, parameter in self.points.items():
            if parameter.grad is None:
                continue
            # The velocity is kept here, not as the optimiser's sum of gradients: that would be multiplied by the new
            # rate where a cycle begins, after noise in the scale of the old one.
            velocity = self.get_buffer(f"velocity:{name}")
            velocity.mul_(self.momentum).sub_(parameter.grad, alpha=rate)
            velocity.add_(torch.randn_like(velocity), alpha=math.sqrt(variance))
            parameter.grad.copy_(velocity / -rate)

    def after_step(self, step: Step) -> None:
        if math.floor(self._due(step.number, step)) > math.floor(self._due(step.number - 1, step)):
            self.keep()

    def _phase(self, number: int, step: Step) -> float:
        """How much of its cycle is over after a number of steps, in [0, 1)."""
        return number * self.cycles / step.total % 1

    def _due(self, number: int, step: Step) -> float:
        """How many points should be kept after a number of steps: evenly many over the noisy part of each cycle."""
        done = number * self.cycles / step.total
        within = max(done % 1 - self.exploration, 0.0) / (1 - self.exploration)
        return (math.floor(done) + within) * self.size / self.cycles + 1e-9
