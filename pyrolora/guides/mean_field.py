"""Mean field: an independent Normal for every weight."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.centred import Centred
from pyrolora.guides.base import Card, Guide, key, unconstrained
from pyrolora.program import Batch, Latent, PyroLoRA


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
        scale_learning_rate: Learning rate of ``log σ`` as a multiple of that of ``μ``: Adam moves a logarithm by
            about its rate a step, so that at the weights' own rate σ would still stand where it started.
        noise: ``"weight"``: one draw for the whole batch. ``"example"``: an independent draw for each sequence,
            shared by its tokens (and, in multiple choice, by its choices), added in activation space: the same
            expected objective, its errors averaged over the batch, at the cost of one adapter-sized noise tensor per
            sequence. In evaluation mode, and so in predictions, draws are coherent.

    Source: Blundell et al. 2015, eq. 3 (Bayes by backprop); Wang et al. 2024 (BLoB) for random A only.
    """

    card = Card("entries of A: independent Normals", "1 a step", "S")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "*.A",
        init_scale: float = 0.1,
        scale_learning_rate: float = 20.0,
        noise: Literal["weight", "example"] = "weight",
    ):
        super().__init__(random=random)
        if noise not in ("weight", "example"):
            raise ValueError(f'MeanField: noise is "weight" or "example", not {noise!r}')
        if not (init_scale > 0 and scale_learning_rate > 0):
            raise ValueError("MeanField: init_scale and scale_learning_rate are positive numbers")
        self.init_scale = init_scale
        self.scale_learning_rate = scale_learning_rate
        self.noise = noise
        self._num_examples: int | None = None
        self.loc = nn.ParameterDict()
        self.log_scale = nn.ParameterDict()

    def bind(self, program: PyroLoRA) -> None:
        self.loc, self.log_scale = nn.ParameterDict(), nn.ParameterDict()
        super().bind(program)
        if self.noise == "example":
            _check_linear(program, [latent for latent in self.latents.values() if self._in_activations(latent)])

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        # The noise of each example is added while the model runs, where only rows can be counted.
        self._num_examples = None if batch is None else next(iter(batch.values())).shape[0]
        return super().forward(batch)

    def initialise(self, latent: Latent) -> None:
        loc = unconstrained(latent)
        self.loc[key(latent)] = nn.Parameter(loc)
        self.log_scale[key(latent)] = nn.Parameter(torch.full_like(loc, math.log(self.init_scale * latent.prior_scale)))

    def family(self, latent: Latent) -> TorchDistributionMixin:
        loc, scale = self.loc[key(latent)], self.log_scale[key(latent)].exp()
        if latent.group is None:
            return _constrained(latent, loc, scale)
        if self._in_activations(latent) and self.training:
            return Centred(loc, scale).to_event(latent.event_dim)
        return dist.Normal(loc, scale).to_event(latent.event_dim)

    def centre(self, latent: Latent) -> Tensor:
        return biject_to(latent.support)(self.loc[key(latent)])

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        scales = list(self.log_scale.parameters())
        own = {id(p) for p in scales}
        rest = [p for p in self.parameters() if id(p) not in own]
        return [
            {"params": rest, "lr": learning_rate},
            {"params": scales, "lr": learning_rate * self.scale_learning_rate},
        ]

    def hooks(self, program: PyroLoRA) -> AbstractContextManager:
        return self._example_noise(program) if self.noise == "example" else contextlib.nullcontext()

    def _in_activations(self, latent: Latent) -> bool:
        return self.noise == "example" and latent.group is not None and self.is_random(latent)

    @contextlib.contextmanager
    def _example_noise(self, program: PyroLoRA) -> Iterator[None]:
        """Adds each sequence's own noise to the outputs of the modules that hold random weights."""
        with contextlib.ExitStack() as stack:
            for latent in self.latents.values():
                if not self._in_activations(latent):
                    continue
                assert latent.group is not None
                for layer, (path, parameter) in enumerate(latent.group.holders):
                    hook = self._hook(latent, layer, parameter)
                    stack.callback(program.model.get_submodule(path).register_forward_hook(hook).remove)
            yield

    def _hook(self, latent: Latent, layer: int, parameter: str) -> Any:
        assert latent.group is not None
        name = latent.group.layers[layer]

        def add_noise(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.training:
                return output
            scale = self.log_scale[key(latent)][layer].exp()
            x = inputs[0]
            examples = self._num_examples or x.shape[0]
            if x.shape[0] % examples:
                raise ValueError(
                    f'{name} sees {x.shape[0]} rows for {examples} examples, so noise="example" cannot tell whose row '
                    'is whose; use noise="weight"'
                )
            noise = torch.randn(examples, *scale.shape, dtype=scale.dtype, device=scale.device)
            noise = (scale * noise).to(output.dtype)
            # Tokens, and the choices of one example, share its noise: all rows of an example stand together.
            rows = x.reshape(examples, -1, x.shape[-1]).to(noise.dtype)
            added = noise.unsqueeze(1).expand(-1, rows.shape[1], -1) if parameter == "bias" else rows @ noise.mT
            return output + added.reshape(output.shape)

        return add_noise


def _constrained(latent: Latent, loc: Tensor, scale: Tensor) -> TorchDistributionMixin:
    """A Normal on the unconstrained scale, carried to the site's support."""
    support: Any = latent.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, constraints.greater_than) and support.lower_bound == 0:
        # By its own name, because the KL between two log-Normals is known and that of a transformed Normal is not.
        return dist.LogNormal(loc, scale).to_event(latent.event_dim)
    return dist.TransformedDistribution(dist.Normal(loc, scale), [biject_to(latent.support)])


def _check_linear(program: PyroLoRA, latents: Sequence[Latent]) -> None:
    for latent in latents:
        group: SiteGroup | None = latent.group
        assert group is not None
        for path, _ in group.holders:
            if not isinstance(program.model.get_submodule(path), nn.Linear):
                raise ValueError(
                    f'{path} is not linear: noise="example" cannot serve {latent.name!r}; use noise="weight"'
                )
