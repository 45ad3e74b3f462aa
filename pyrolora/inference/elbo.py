"""The tempered evidence lower bound, its terms kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence
from torch.nn.parallel import DistributedDataParallel

from pyrolora.guides.base import Guide
from pyrolora.program import Batch, PyroLoRA


@dataclass
class Terms:
    """The parts of the objective at the last evaluation, detached, in nats over the whole training set.

    Attributes:
        data: ``E_q Σ_n log p(y_n | x_n, θ)``, scaled up from the minibatch.
        kl: Site to ``KL(q ‖ p)``. A point estimate has no finite KL: its entry is ``−log p(θ)``.
        rows: ``log p(y_n | x_n, θ)`` of each example of the minibatch.
        points: The sites with a point estimate.
    """

    data: Tensor
    kl: dict[str, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None
    points: frozenset[str] = frozenset()


class TemperedELBO(TraceMeanField_ELBO):
    """``L_β = E_q[ Σ_n log p(y_n | x_n, θ) ] − β Σ_sites KL(q ‖ p)``; β = 1 is the evidence lower bound.

    Divergences are closed forms where one is registered and one-sample estimates elsewhere. Unlike its parent it does
    not evaluate the prior's log density at sites whose KL is known, and it keeps the terms apart for the log.

    Args:
        temperature: β, the posterior temperature.
        num_particles: Number of draws per evaluation.

    Attributes:
        terms: Mean over particles of the last evaluation's parts, see `Terms`.
    """

    def __init__(self, temperature: float = 1.0, num_particles: int = 1):
        super().__init__(num_particles=num_particles)
        if not temperature >= 0:
            raise ValueError(f"temperature is a number ≥ 0, not {temperature!r}")
        self.temperature = temperature
        self.terms: Terms | None = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """``−L_β`` in nats over the whole training set, differentiable."""
        loss: Tensor | float = 0.0
        particles = []
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            loss = loss + self._differentiable_loss_particle(model_trace, guide_trace)[1] / self.num_particles
            particles.append(self.terms)
        self.terms = _average(particles)
        assert isinstance(loss, Tensor)
        return loss

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[poutine.Trace, poutine.Trace]:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)

    def _differentiable_loss_particle(
        self, model_trace: poutine.Trace, guide_trace: poutine.Trace
    ) -> tuple[Tensor, Tensor]:
        data: Tensor | float = 0.0
        rows = None
        divergences, points = {}, set()
        nodes: Any = model_trace.nodes
        for name, site in nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                rows = site["fn"].log_prob(site["value"])
                data = data + scale_and_mask(rows, site["scale"], site["mask"]).sum()
            else:
                divergences[name] = _divergence(guide_trace.nodes[name], site)
                if _is_point(guide_trace.nodes[name]["fn"]):
                    points.add(name)
        total = sum(divergences.values(), torch.zeros(()))
        surrogate = self.temperature * total - data
        detached = {name: value.detach() for name, value in divergences.items()}
        kept = rows.detach() if rows is not None else None
        self.terms = Terms(torch.as_tensor(data).detach(), detached, kept, frozenset(points))
        return surrogate.detach(), surrogate


class Objective(nn.Module):
    """What the optimiser sees: ``−L_β / N`` in nats per training example, as a module over program and guide.

    Its state is the guide's alone, so checkpoints never hold base weights.

    Args:
        program: The Pyro model.
        guide: A bound guide.
        temperature: β.
        num_particles: Draws per evaluation.
    """

    def __init__(self, program: PyroLoRA, guide: Guide, temperature: float = 1.0, num_particles: int = 1):
        super().__init__()
        self.program = program
        self.guide = guide
        self.elbo = TemperedELBO(temperature, num_particles)
        self._model = guide.augmented(program)
        # Every process has loaded the same frozen base: DDP need not send it, and cannot where it is sharded.
        states = (*self.program.named_parameters(prefix="program"), *self.program.named_buffers(prefix="program"))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, [name for name, _ in states])
        self._validated = False
        self._mode: bool | None = None

    def forward(self, batch: Batch) -> Tensor:
        # Shapes and supports cannot change between steps: Pyro's checks run on the first batch only.
        gradients = torch.enable_grad() if self.training else torch.no_grad()
        with gradients, pyro.validation_enabled(not self._validated), self.program.full_precision():
            loss = self.elbo.differentiable_loss(self._model, self.guide, batch) / self.program.num_data
        self._validated = True
        return loss

    def train(self, mode: bool = True) -> Objective:
        # The Trainer asks at every step, and a walk over the base model's hundreds of modules costs as much as Pyro.
        if mode != self._mode or mode != self.program.model.training:
            super().train(mode)
            self._mode = mode
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.guide.zero_grad(set_to_none)  # nothing else has a gradient

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.guide.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        # The Trainer asks for leniency on resuming; a checkpoint of another guide must not pass for this one's.
        return self.guide.load_state_dict(state_dict, strict=True, assign=assign)


def _is_point(fn: Any) -> bool:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _divergence(q: Mapping[str, Any], p: Mapping[str, Any]) -> Tensor:
    try:
        value = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        value = q["fn"].log_prob(q["value"]) - p["fn"].log_prob(q["value"])
    return scale_and_mask(value, p["scale"], p["mask"]).sum()


def _average(particles: list[Terms | None]) -> Terms:
    terms = [t for t in particles if t is not None]
    if len(terms) == 1:
        return terms[0]
    rows = [t.rows for t in terms if t.rows is not None]
    return Terms(
        data=torch.stack([t.data for t in terms]).mean(),
        kl={name: torch.stack([t.kl[name] for t in terms]).mean() for name in terms[0].kl},
        rows=torch.stack(rows).mean(0) if rows else None,
        points=terms[0].points,
    )
