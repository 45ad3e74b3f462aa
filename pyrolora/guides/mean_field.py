"""Mean field: an independent Normal for every weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrolora.adapters.noise import Change, Kind, Stack, bottleneck_noise, changed_outputs, require_linear
from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.centred import Centred
from pyrolora.guides.base import Card, Guide, check_choice, key, unconstrained
from pyrolora.program import Batch, Latent, PyroLoRA

Parametrisation = Literal["log", "square"]


class MeanField(Guide):
    """``q(θ_ij) = N(μ_ij, σ_ij²)`` at every random site; closed-form KL against Normal and matrix Normal priors.

    ``KL = Σ ½ (σ² + μ²)/σ_p² − ½ − log(σ/σ_p)`` nats. Hyper-parameters on a constrained scale (a positive prior
    scale) get a Normal on the unconstrained scale; under a log-Normal prior their KL is the same formula, under
    others a Monte Carlo estimate.

    Tens of thousands of weights on hundreds of examples: at β = 1 the ELBO prefers the prior, and says so by a KL
    near zero and chance accuracy. Either choose a temperature β on validation data (``fit(temperature=0.1)``), or make
    few numbers random.

    Args:
        random: Pattern(s) of the sites that are random; the rest get a point estimate. The default is A: its noise is
            multiplied by B, which starts at zero, so that training starts at the base model whatever σ is.
        init_scale: σ at the start as a fraction of the prior's (root mean square) standard deviation; a fraction c
            starts the KL at ``−log c − ½`` nats for every weight. At 1 the noise hides the signal from the gradient.
        scale_learning_rate: Learning rate of ``log σ``, and of the logarithms of a prior's scales, as a multiple of
            that of ``μ``: Adam moves a logarithm by about its rate a step, so that at the weights' own rate σ and the
            scales of a prior would still stand where they started.
        noise: ``"weight"``: one draw for the whole batch. The others are added in activation space, see
            `bottleneck_noise`: errors of the gradient average out over the batch. ``"example"``: an independent draw
            for each sequence, shared by its tokens (and, in multiple choice, by its choices): the same expected
            objective, at the cost of one adapter-sized noise tensor per sequence. ``"local"`` and ``"flipout"``:
            noise that differs between tokens, cheaper, and no longer that of one matrix for a sequence. In evaluation
            mode, and so in predictions, draws are coherent.
        parametrisation: ``"log"``: ``σ = exp(ρ)``, all at init_scale at first. ``"square"``: ``σ = G²``, with
            ``G ~ U(ε/√2, ε)`` at first, where ε² is what σ is under ``"log"``.

    Source: Blundell et al. 2015, eq. 3 (Bayes by backprop); Wang et al. 2024 (BLoB) for random A only, see `blob`.
    """

    card = Card("entries of A: independent Normals", "1 a step", "S")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "*.A",
        init_scale: float = 0.1,
        scale_learning_rate: float = 20.0,
        noise: Kind = "weight",
        parametrisation: Parametrisation = "log",
    ):
        super().__init__(random=random)
        check_choice("MeanField: noise", noise, Kind)
        check_choice("MeanField: parametrisation", parametrisation, Parametrisation)
        if not (init_scale > 0 and scale_learning_rate > 0):
            raise ValueError("MeanField: init_scale and scale_learning_rate are positive numbers")
        self.init_scale = init_scale
        self.scale_learning_rate = scale_learning_rate
        self.noise = noise
        self.parametrisation = parametrisation
        # Of the present step: how many examples, and σ by layer.
        self._present: tuple[int | None, dict[str, tuple[Tensor, ...]]] = (None, {})
        self.loc = nn.ParameterDict()
        self.log_scale = nn.ParameterDict()
        self.root_scale = nn.ParameterDict()

    @classmethod
    def blob(cls, *, init_scale: float = 0.0125) -> MeanField:
        """BLoB's configuration: A random, ``σ = G²``, flipout in training, coherent draws in predictions.

        With ``priors={"*.A": Normal(0.2), "*.B": Flat(), ...}`` the default starts at BLoB's ``G ~ U(ε/√2, ε)``,
        ε = 0.05. Its objective weighs the KL by a schedule of its own; here that is the temperature β. On four small
        tasks 0.3 was best on the whole, and 1 on three of them. Of flipout's signs the inputs' are left out, see
        `bottleneck_noise`.

        Source: Wang et al. 2024 (NeurIPS), section 3 and appendix B.
        """
        return cls(noise="flipout", parametrisation="square", init_scale=init_scale, scale_learning_rate=1.0)

    def bind(self, program: PyroLoRA) -> None:
        self.loc, self.log_scale, self.root_scale = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        super().bind(program)
        for latent in self.latents.values():
            if self._in_activations(latent):
                assert latent.group is not None
                require_linear(program.model, latent.group, f'noise="{self.noise}"', 'use noise="weight"')

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        # The noise of each example is added while the model runs, where only rows can be counted.
        examples = None if batch is None else next(iter(batch.values())).shape[0]
        noisy = [latent for latent in self.latents.values() if self.training and self._in_activations(latent)]
        self._present = examples, {latent.name: self.scale(latent).unbind() for latent in noisy}
        return super().forward(batch)

    def initialise(self, latent: Latent) -> None:
        loc = unconstrained(latent)
        self.loc[key(latent)] = nn.Parameter(loc)
        start = torch.full_like(loc, self.init_scale * latent.prior_scale)
        if self.parametrisation == "log":
            self.log_scale[key(latent)] = nn.Parameter(start.log())
        else:
            self.root_scale[key(latent)] = nn.Parameter(start.sqrt() * torch.empty_like(loc).uniform_(0.5**0.5, 1.0))

    def family(self, latent: Latent) -> TorchDistributionMixin:
        loc, scale = self.loc[key(latent)], self.scale(latent)
        if latent.group is None:
            return _constrained(latent, loc, scale)
        if self._in_activations(latent) and self.training:
            return Centred(loc, scale).to_event(latent.event_dim)
        return dist.Normal(loc, scale).to_event(latent.event_dim)

    def centre(self, latent: Latent) -> Tensor:
        return biject_to(latent.support)(self.loc[key(latent)])

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        hypers = [self.loc[key(latent)] for latent in self.latents.values() if self._is_scale(latent)]
        scales = [*self.log_scale.parameters(), *self.root_scale.parameters(), *hypers]
        own = {id(p) for p in scales}
        rest = [p for p in self.parameters() if id(p) not in own]
        return [
            {"params": rest, "lr": learning_rate},
            {"params": scales, "lr": learning_rate * self.scale_learning_rate},
        ]

    @contextlib.contextmanager
    def hooks(self, program: PyroLoRA) -> Iterator[None]:
        groups = [latent.group for latent in self.latents.values() if latent.group and self._in_activations(latent)]
        stack = Stack(
            program.model, groups, lambda site, layer: self._noted(program)[1][site][layer], lambda: program.notes
        )
        changes = [
            (path, self._change(program, group, layer, parameter, stack))
            for group in groups
            for layer, (path, parameter) in enumerate(group.holders)
        ]
        try:
            with changed_outputs(program.model, changes):
                yield
        finally:
            self._present = None, {}  # they hold the last step's graph, which cannot be copied

    def scale(self, latent: Latent) -> Tensor:
        """σ of a random site, on the unconstrained scale for a hyper-parameter: ``latent.shape``."""
        if key(latent) in self.log_scale:
            return self.log_scale[key(latent)].exp()
        return self.root_scale[key(latent)].square().clamp(min=1e-12)

    def _is_scale(self, latent: Latent) -> bool:
        """Whether a site is a random hyper-parameter that is learnt as a logarithm, such as a scale of ARD."""
        each = getattr(latent.support, "base_constraint", latent.support)
        logarithm = each in (constraints.positive, constraints.nonnegative)
        return logarithm and self._is_hyper(latent) and self.is_random(latent)

    def _in_activations(self, latent: Latent) -> bool:
        return self.noise != "weight" and latent.group is not None and self.is_random(latent)

    def _noted(self, program: PyroLoRA) -> tuple[int | None, dict[str, tuple[Tensor, ...]]]:
        """How many examples the pass that runs now has, and σ by layer: also where it is recomputed, after others."""
        return program.notes.setdefault(self, self._present)

    def _change(self, program: PyroLoRA, group: SiteGroup, layer: int, parameter: str, stack: Stack) -> Change:
        """Adds the noise of one module's weight or bias to its output, while the guide trains."""

        def change(x: Tensor, output: Tensor) -> Tensor:
            if not self.training:
                return output
            examples, scales = self._noted(program)
            options: dict[str, Any] = {"examples": examples or len(x), "where": group.layers[layer]}
            if parameter == "weight":
                noise = stack.noise(self.noise, x, group.name, layer, **options)
            else:  # a bias is the weight of an input that is always 1
                ones, scale = x.new_ones(*x.shape[:-1], 1), scales[group.name][layer].unsqueeze(-1)
                noise = bottleneck_noise(self.noise, ones, scale, **options)
            return output + noise.to(output.dtype)

        return change


def _constrained(latent: Latent, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
    """A Normal on the unconstrained scale, carried to the site's support."""
    support: Any = latent.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, constraints.greater_than) and support.lower_bound == 0:
        # By its own name, because the KL between two log-Normals is known and that of a transformed Normal is not.
        return dist.LogNormal(loc, scale).to_event(latent.event_dim)
    return dist.TransformedDistribution(dist.Normal(loc, scale), [biject_to(latent.support)])
