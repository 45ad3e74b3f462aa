"""Input-adaptive noise: how uncertain each adapted layer is, computed from the input (BaLoRA)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn import functional

from pyrolora.adapters.noise import Change, Kind, Stack, changed_outputs, full_precision, require_linear
from pyrolora.adapters.sites import SiteGroup
from pyrolora.distributions.multipliers import Multipliers
from pyrolora.guides.base import Card, Guide, check_choice, matches
from pyrolora.guides.features import Kind as FeatureKind
from pyrolora.guides.features import frozen_features
from pyrolora.priors.base import checked
from pyrolora.program import Batch, Latent, PyroLoRA

LocalPrior = Literal["dropout", "declared"]
LocalKL = Literal["sum", "mean"]


class InputAdaptive(Guide):
    """``q(A_ij | x) = N(θ_ij, α_l(x) θ_ij²)``: one α for each adapted layer l and input x, from one small network.

    As a program: ``A = θ ∘ w``, where θ is global, a point estimate under its declared prior, and the multipliers w are
    local latent variables of each example, ``w ~ N(0, ς)`` with ``ς = p/(1 − p)`` and ``q(w | x) = N(1, α_l(x))``. They
    stand in the trace as ``<site>.multiplier``, inside the plate ``data``. With A at its prior N(0, ς θ²),

        KL = r d_in · ½[(α + 1)/ς + log ς − log α − 1]  nats for each layer and example,

    which does not depend on θ and pulls α towards ς. ``prior="declared"``: ``A ~`` the Normal declared for the site,
    for each example, in place of both; θ has no prior of its own then.

    B is a point estimate, and a new adapter's starts at zero, where no noise is felt. The noise is added at the
    bottleneck, ``h = θ x + √d ∘ ε``, ``d = α (θ²)(x²)``. ``α = softplus(network(features(x)))`` starts at ς everywhere.
    The mean is an ordinary adapter: ``predict(num_draws=0)``, ``export_peft``.

    **The scale of the KL.** The ELBO counts it r d_in times for each layer and example, ``kl="sum"``: thousands of nats
    against the few of one label, so that at β = 1 no label moves α from ς, and the guide is Gaussian dropout. The
    default, ``kl="mean"``, counts one multiplier of a layer for all: a local KL tempered by ``1/(r d_in)``, and the
    ``elbo`` in the log is no bound then. It is also in units of ``β``, the temperature, which tempers every KL.

    **What α says.** Log-likelihoods are concave in the natural parameters, so that to first order noise only costs and
    labels only lower α: it is near ``1/(1/ς + F(x))``, F being 1/β times the Fisher information of one multiplier at x
    (for ``kl="mean"``). α stays at ς where the adapter's weights do not matter, at noisy labels that no feature
    explains among others, and falls where they do. It is no estimate of label noise: where noisy and clear inputs
    share their features its ranking can go either way. Entropy and mutual information of the prediction say how much
    the model doubts; α says at which layers.

    Args:
        random: Pattern(s) of the A sites with noise.
        features: ``"embedding"`` (mean frozen token embedding, no extra pass) or ``"backbone"`` (mean last hidden state
            of the frozen model, one extra pass for each batch).
        prior: ``"dropout"`` or ``"declared"``.
        rate: p, the dropout rate of the prior; under a declared prior too α starts at its ς. On three of four small
            tasks 0.8, a noise of twice the weights' size, was best or next to it (on the fourth plain LoRA is not too
            sure, and any noise costs): at 0.1, as published, the NLL is plain LoRA's or near it.
        kl: ``"mean"`` or ``"sum"``.
        noise: Kind of noise in training, see `bottleneck_noise`. ``"weight"``: one ε for the batch, scaled by each
            input's α. ``"local"``, as published, averages out over the tokens of a text and regularises less.
        predictive: Kind of noise in evaluation. ``"weight"``: one ε for all inputs, so that a draw is one coherent
            function, and does not depend on the batch; others depend on an input's place in its batch. A module that
            runs several times in one pass, as ALBERT's do, draws one ε each time.
        hidden: Width of the network's one hidden layer.
        scale_learning_rate: Learning rate of the network as a multiple of the weights'.

    Raises:
        ValueError: A site that is not a linear lora_A; with ``prior="declared"`` one whose prior is no plain Normal.

    Source: Coscia et al. 2026 (arXiv 2605.08110); Kingma et al. 2015 (variational dropout).
    """

    card = Card("A, for each input: one scale a layer", "1 a step (backbone: 1 frozen more)", "S")

    def __init__(
        self,
        *,
        random: str | Sequence[str] = "*.A",
        features: FeatureKind = "embedding",
        prior: LocalPrior = "dropout",
        rate: float = 0.8,
        kl: LocalKL = "mean",
        noise: Kind = "weight",
        predictive: Kind = "weight",
        hidden: int = 32,
        scale_learning_rate: float = 1.0,
    ):
        super().__init__(random=random)
        check_choice("InputAdaptive: features", features, FeatureKind)
        check_choice("InputAdaptive: prior", prior, LocalPrior)
        check_choice("InputAdaptive: kl", kl, LocalKL)
        check_choice("InputAdaptive: noise", noise, Kind)
        check_choice("InputAdaptive: predictive", predictive, Kind)
        if not (0 < rate < 1 and hidden >= 1 and scale_learning_rate > 0):
            raise ValueError("InputAdaptive: rate is between 0 and 1, hidden at least 1, scale_learning_rate positive")
        self.features, self.prior, self.rate, self.kl = features, prior, rate, kl
        self.noise, self.predictive = noise, predictive
        self.hidden, self.scale_learning_rate = hidden, scale_learning_rate

    @property
    def prior_variance(self) -> float:
        """``ς = p/(1 − p)``."""
        return self.rate / (1 - self.rate)

    # -- contract ----------------------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        super().bind(program)
        self._groups = {name: _linear_a(program, self.latents[name]) for name in self.local_sites()}
        declared = self._groups if self.prior == "declared" else ()
        self._declared = {name: _declared_scale(program, self.latents[name]) for name in declared}
        self._features, width = frozen_features(program, self.features)
        self._seen: tuple[Batch, Tensor] | None = None
        self._factors: dict[str, tuple[Tensor, ...]] = {}  # √α of the present batch, by layer
        layers = sum(group.num_layers for group in self._groups.values())
        last = nn.Linear(self.hidden, layers)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(math.expm1(self.prior_variance)))
        self.network = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.hidden), nn.GELU(), last)

    def is_random(self, latent: Latent) -> bool:
        """No site is random for all examples at once; see `local_sites`."""
        return False

    def local_sites(self) -> list[str]:
        """The sites with noise for each example."""
        return [name for name, x in self.latents.items() if x.group is not None and matches(name, self.random)]

    def local_prior(self, batch: Batch) -> dict[str, TorchDistributionMixin]:
        size = len(next(iter(batch.values())))
        return {_name(site): self._prior_of(site).expand(torch.Size([size])) for site in self._groups}

    def local_family(self, batch: Batch) -> dict[str, TorchDistributionMixin]:
        alphas = self._alphas(batch)
        self._factors = {site: alpha.sqrt().unbind(-1) for site, alpha in alphas.items()}
        return {
            _name(site): Multipliers(alpha.new_ones(()), 1 / alpha, alpha.log(), size=self._count(site))
            for site, alpha in alphas.items()
        }

    def reparametrisations(self) -> dict[str, Reparam]:
        return {name: _NoDensity() for name in self._declared}

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        return [
            {"params": list(self.points.parameters()), "lr": learning_rate},
            {"params": list(self.network.parameters()), "lr": learning_rate * self.scale_learning_rate},
        ]

    @property
    def joint_draws(self) -> bool:
        """Whether a draw is one function of all inputs."""
        return self.predictive == "weight"

    def passes(self, num_draws: int, num_outputs: int) -> int:
        return super().passes(num_draws, num_outputs) + (self.features == "backbone")

    def describe_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """α of every layer, ``{"<site>.alpha": (b, layers)}``."""
        return {f"{site}.alpha": alpha.detach() for site, alpha in self._alphas(batch).items()}

    @contextlib.contextmanager
    def hooks(self, program: PyroLoRA) -> Iterator[None]:
        """Noise on the outputs of the lora_A modules, of passes with this guide's local latent variables."""
        # θ as it stands in the module, in this pass as where it is recomputed.
        modules: dict[str, list[Any]] = {
            site: [program.model.get_submodule(path) for path, _ in group.holders]
            for site, group in self._groups.items()
        }
        stack = Stack(
            program.model,
            self._groups.values(),
            lambda site, layer: modules[site][layer].weight,
            lambda: program.notes,
        )
        changes = [
            (path, self._change(program, site, layer, stack))
            for site, group in self._groups.items()
            for layer, (path, _) in enumerate(group.holders)
        ]
        try:
            with changed_outputs(program.model, changes):
                yield
        finally:
            self._factors = {}  # they hold the last batch's graph, which cannot be copied

    # -- parts -------------------------------------------------------------------------------------------------------

    def _change(self, program: PyroLoRA, site: str, layer: int, stack: Stack) -> Change:
        where = self._groups[site].layers[layer]

        def change(x: Tensor, output: Tensor) -> Tensor:
            # The values of this pass, also where it is recomputed. A pass for features, or without noise, has none.
            if _name(site) not in program.running:
                return output
            kind = self.noise if self.training else self.predictive
            factor = program.notes.setdefault(self, self._factors)[site][layer]
            noise = stack.noise(kind, x, site, layer, examples=len(factor), factor=factor, where=where)
            return output + noise.to(output.dtype)

        return change

    def _alphas(self, batch: Batch) -> dict[str, Tensor]:
        """``{site: (b, layers)}``, of all layers by one run of the network; features are computed once for a batch."""
        if self._seen is None or self._seen[0] is not batch:
            self._seen = (batch, self._features(batch))
        features = self._seen[1]
        with full_precision(features.device):
            # A softplus may underflow; its logarithm must not.
            alpha = functional.softplus(self.network(features)).clamp(min=1e-12)
        sizes = [group.num_layers for group in self._groups.values()]
        return dict(zip(self._groups, alpha.split(sizes, -1), strict=True))

    def _prior_of(self, site: str) -> Multipliers:
        if site not in self._declared:
            variance = torch.full(
                (self._groups[site].num_layers,), self.prior_variance, device=self.point(self.latents[site]).device
            )
            return Multipliers(variance.new_zeros(()), 1 / variance, variance.log(), size=self._count(site))
        # A = θ ∘ w ~ N(0, s²) is w ~ N(0, s²/θ²).
        ratio = self.point(self.latents[site]).square().clamp(min=1e-12) / self._declared[site].square()
        inverse, log_variance = ratio.mean((-2, -1)), -ratio.log().mean((-2, -1))
        return Multipliers(inverse.new_zeros(()), inverse, log_variance, size=self._count(site))

    def _count(self, site: str) -> int:
        return self._groups[site].event_shape.numel() if self.kl == "sum" else 1


class _NoDensity(Reparam):
    """Takes the density away from a global site whose prior is stated for each example instead."""

    def apply(self, msg: Any) -> Any:
        return {"fn": msg["fn"].mask(False), "value": msg["value"], "is_observed": msg["is_observed"]}


def _name(site: str) -> str:
    return f"{site}.multiplier"


def _linear_a(program: PyroLoRA, latent: Latent) -> SiteGroup:
    group = latent.group
    if group is None or group.role != "A":
        raise ValueError(f"InputAdaptive: {latent.name!r} is not an A; B and heads are point estimates: random='*.A'")
    require_linear(program.model, group, "InputAdaptive", "name other sites with random=")
    return group


def _declared_scale(program: PyroLoRA, latent: Latent) -> Tensor:
    """Standard deviation of the declared prior, broadcast to the site."""
    assert latent.group is not None
    with program._on_device(), poutine.block(), torch.no_grad():
        law: Any = checked(program.priors[latent.name], latent.group)
    while isinstance(law, Independent):
        law = law.base_dist
    hyper = any(name.startswith(f"{latent.name}.") for name in program.latents)
    if hyper or not isinstance(law, Normal) or bool((law.loc != 0).any()):
        raise ValueError(
            f"site {latent.name!r}: InputAdaptive(prior='declared') needs a Normal prior of mean 0 and known scale: "
            "declare priors.Normal for it, or use prior='dropout'"
        )
    return law.scale.expand(latent.shape)
