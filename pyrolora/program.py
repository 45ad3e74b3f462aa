"""The probabilistic program: adapters drawn from their priors, placed on the base model, data observed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyro
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Independent, constraints

from pyrolora.adapters.checkpoint import fingerprint, load_adapter
from pyrolora.adapters.noise import full_precision
from pyrolora.adapters.placement import Pass, Placement
from pyrolora.adapters.sites import SiteGroup, find_sites
from pyrolora.distributions.flat import Flat
from pyrolora.likelihoods.base import Likelihood
from pyrolora.priors.base import Prior, PriorError, checked
from pyrolora.priors.by_site import by_site
from pyrolora.priors.sites import Sites
from pyrolora.tasks.base import Task
from pyrolora.tasks.text import TextTask

Batch = Mapping[str, Tensor]
# Samples the local latent variables of a batch; returns ``{site: (b, ...)}``.
Local = Callable[[Batch], Mapping[str, Tensor]]

# Under this name a draw may hold the natural parameters themselves, which then stand for the model's output.
NATURAL = "natural parameters"


@dataclass(frozen=True)
class Latent:
    """One latent site of the program, as a guide needs to know it.

    Attributes:
        name: The Pyro site.
        plate: Name of the plate over layers that the site stands in, or None (hyper-parameters).
        shape: Shape of a value.
        event_dim: How many of its last dimensions are one event.
        support: The constraint that values satisfy.
        start: A starting value: PEFT's present weights for an adapter, the prior median for a hyper-parameter.
        group: The site group for an adapter or head, None for a hyper-parameter.
        prior_scale: Root mean square of the prior's standard deviation, for sizing a guide's first noise; for a
            hyper-parameter 1, on the unconstrained scale.
        flat: Whether the prior is improper, so that only a point estimate makes sense.
    """

    name: str
    plate: str | None
    shape: torch.Size
    event_dim: int
    support: constraints.Constraint
    start: Tensor
    group: SiteGroup | None
    prior_scale: float
    flat: bool


class PyroLoRA(nn.Module):
    """A Pyro model: ``θ ~ prior``, ``y_n ~ likelihood(base model with adapters θ, x_n)``.

    ``log p(y, θ) = Σ_sites log p(θ_site) + Σ_n log p(y_n | x_n, θ)``; a minibatch of b counts N/b times.

    It is an ordinary Pyro model: ``poutine.trace``, ``condition``, ``SVI``, ``Predictive`` and ``MCMC`` work on it.
    Calling it with a batch draws every site, places the draw on PEFT's modules, runs the base model and observes the
    labels. The base model's own weights never change.

    Args:
        model: A Hugging Face model (PEFT injects the adapters into it), or one that is a `PeftModel` already.
        adapter: A `peft.LoraConfig`, or the folder of an adapter that PEFT saved (which is then where every guide
            starts); None for a `PeftModel`.
        priors: Site patterns to priors, the first match wins: ``{"*.A": Normal("fan_in"), "*.B": Normal(0.1)}``.
        task: The data and their likelihood. Or else:
        likelihood: A likelihood, and
        num_data: the number of training examples N, which weighs the likelihood against the prior.

    Attributes:
        sites: The adapter sites; print it.
        latents: All latent sites with the priors' and the likelihood's own hyper-parameters, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: LoraConfig | str | Path | None = None,
        *,
        priors: Mapping[str, Prior],
        task: Task | None = None,
        likelihood: Likelihood | None = None,
        num_data: int | None = None,
    ):
        super().__init__()
        self.likelihood, self.num_data = _data_side(task, likelihood, num_data)
        self.task = task
        if isinstance(task, TextTask):
            task.check_model(model)
        self.model = _inject(model, adapter)
        # The program owns the adapters: they are drawn, not trained in place.
        self.model.requires_grad_(False)
        self.adapter_name = self.model.active_adapters[0]
        self.declared = dict(priors)
        sites = find_sites(self.model, adapter=self.adapter_name)
        self.priors = by_site(priors, sites)
        self.sites = Sites(sites, self.priors)
        self.placement = Placement(self.model, self.sites)
        self._running: list[Pass] = []
        self._precision: Callable[[], AbstractContextManager] = contextlib.nullcontext
        self._watch_checkpointing()
        self.latents = self._find_latents()

    @property
    def device(self) -> torch.device:
        """Where the adapters are: draws are made there."""
        return self.placement.device

    @cached_property
    def fingerprint(self) -> str:
        """Of the base model's weights, which never change: see `adapters.fingerprint`."""
        return fingerprint(self.model)

    @property
    def running(self) -> Mapping[str, Tensor]:
        """All values of the pass that the base model makes now, also while it is recomputed: for hooks."""
        return self._running[-1].values if self._running else {}

    @property
    def notes(self) -> dict[Any, Any]:
        """What hooks have to know again where this pass is recomputed, and forget with it; under keys of their own."""
        return self._running[-1].notes if self._running else {}

    def forward(self, batch: Batch, local: Local | None = None) -> Tensor:
        """Runs the program once.

        Global latent variables, one value for all data, are sampled first. Local ones, a value for each example, stand
        inside the plate ``data``: there the densities of a minibatch count N/b times, as the likelihood does.

        Args:
            batch: Tensors as `Task.collate` makes them; without labels the data site is sampled, not observed.
            local: Samples local latent variables, ``{site: (b, ...)}``. Hooks find them in `running`.

        Returns:
            The likelihood's natural parameters, ``(b, K)`` for K classes.
        """
        draws, parameters = self.sample_latents()
        with data_plate(self.num_data, batch):
            logits = self.logits({**draws, **(local(batch) if local else {})}, batch)
            self.likelihood.observe(logits, parameters, batch)
        return logits

    def sample_latents(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Samples every latent site: the adapters, and the likelihood's own parameters."""
        plates: dict[str, Any] = {}
        draws: dict[str, Tensor] = {}
        with self._on_device():
            for name, site in self.sites.items():
                fn = checked(self.priors[name], site)
                if site.plate not in plates:
                    plates[site.plate] = pyro.plate(site.plate, site.num_layers, dim=-1)
                with plates[site.plate]:
                    draws[name] = pyro.sample(name, fn)
            return draws, self.likelihood.sample_parameters()

    def logits(self, draws: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Natural parameters of the likelihood under one draw of the adapters; nothing is sampled.

        Args:
            draws: ``{site: value}``; absent sites keep the model's own weights. What is no adapter is for hooks.
            batch: Tensors as `Task.collate` makes them.
        """
        if NATURAL in draws:
            return draws[NATURAL]
        with self.placed(draws):
            return self.likelihood.evaluate(self.model, batch)

    @contextlib.contextmanager
    def placed(self, draws: Mapping[str, Tensor]) -> Iterator[None]:
        """Puts one draw on the model for the duration of the block; afterwards it is bitwise what it was."""
        with self._precision(), self._pass(draws):
            yield

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """A block without autocast, but for passes of the base model: those have what was on before.

        The Trainer's ``bf16`` is for the base model. Covariances, their factors and divergences are not computed so.
        """
        kind = self.device.type
        if kind == "meta" or not torch.is_autocast_enabled(kind):
            yield
            return
        before, self._precision = self._precision, partial(torch.autocast, kind, torch.get_autocast_dtype(kind))
        try:
            with full_precision(self.device):
                yield
        finally:
            self._precision = before

    @torch.no_grad()
    def prior_predictive(self, batch: Batch, num_draws: int = 100, *, seed: int = 0) -> Tensor:
        """Class probabilities that the priors imply before any fit.

        A prior whose draws say 0.99 about every input, or 0.50 about all, is a strong belief: better seen now. Sites
        with a flat prior, which has no draws, stand at their starting values.

        Args:
            batch: A batch of inputs, as `Task.collate` makes them.
            num_draws: Number of draws S.
            seed: Of the draws.

        Returns:
            ``(num_draws, b, K)`` probabilities.
        """
        flat = {name: latent.start for name, latent in self.latents.items() if latent.flat}
        prior = poutine.condition(self.sample_latents, data=flat)
        with evaluating(self.model), torch.random.fork_rng(), poutine.block():
            torch.manual_seed(seed)
            rows = []
            for _ in range(num_draws):
                draws, parameters = prior()
                rows.append(self.likelihood.probabilities(self.logits(draws, batch), parameters, batch))
            return torch.stack(rows)

    def enable_activation_checkpointing(self) -> None:
        """Turns on non-reentrant activation checkpointing, so that recomputation in backward sees the same draw.

        Backward happens after the draw was taken off; a context saved with each checkpoint puts it back on for the
        recomputation. `fit` calls this for ``TrainingArguments(gradient_checkpointing=True)``.
        """
        options = {"use_reentrant": False, "context_fn": self._recompute_context}
        base: Any = self.model.get_base_model()
        # transformers renames "gradient" to "activation" checkpointing in 5.x; older releases know the first only.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable(options)
        # The input-require-grads hooks of Hugging Face and PEFT break vectorised prediction; without re-entrance,
        # nothing needs them. Both libraries may have set one, while their own removal knows only of the last.
        for module in base.modules():
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad"):
                    del module._forward_hooks[key]

    def _watch_checkpointing(self) -> None:
        if self._is_checkpointing():
            self.enable_activation_checkpointing()

    def _is_checkpointing(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def _recompute_context(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        # The checkpoint itself remembers autocast.
        return contextlib.nullcontext(), self._pass(self.running, self.notes)

    def _pass(self, draws: Mapping[str, Tensor], notes: dict[Any, Any] | None = None) -> Pass:
        adapters = {name: value for name, value in draws.items() if name in self.sites}
        return Pass(self._running, draws, self.placement.placed(adapters), notes)

    def _on_device(self) -> AbstractContextManager:
        device = self.device
        return contextlib.nullcontext() if device.type == "cpu" else device

    def _find_latents(self) -> dict[str, Latent]:
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            torch.manual_seed(0)
            medians = self._hyper_medians()
            # Priors are read at the medians of their hyper-parameters, which gives their typical scale.
            program = poutine.condition(self.sample_latents, data=medians)
            nodes: Any = poutine.trace(program).get_trace().nodes
            start = {**self.placement.current(), **medians}
        latents = {}
        for name, node in nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            group = self.sites.get(name)
            latents[name] = Latent(
                name=name,
                plate=group.plate if group else None,
                shape=node["value"].shape,
                event_dim=len(node["fn"].event_shape),
                support=node["fn"].support,
                start=start[name].float(),
                group=group,
                prior_scale=_rms_scale(node["fn"]) if group else 1.0,
                flat=isinstance(node["fn"], Flat),
            )
        return latents

    def _hyper_medians(self) -> dict[str, Tensor]:
        """Prior medians of the hyper-parameters: they exist also where a mean does not (half-Cauchy)."""

        def medians(function: Callable[[], Any]) -> dict[str, Tensor]:
            with InitMessenger(lambda site: _median(site["fn"])):
                nodes: Any = poutine.trace(function).get_trace().nodes
            return {n: node["value"] for n, node in nodes.items() if node["type"] == "sample"}

        values = medians(self.likelihood.sample_parameters)
        for name, site in self.sites.items():
            own = medians(partial(checked, self.priors[name], site))
            for hyper in own:
                _check_hyper_name(hyper, site)
            values |= own
        return values


def data_plate(num_data: int, batch: Batch) -> Any:
    """The plate over examples, which program and guides with local latent variables share."""
    size = next(iter(batch.values())).shape[0]
    # Indices are given so that the plate draws no random permutation of the whole data set at every step.
    return pyro.plate("data", num_data, subsample=torch.arange(size))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration of the block; afterwards every module is in the mode that it was in.

    bitsandbytes' maps go into training mode instead. It changes nothing in what they compute, but in evaluation mode on
    a CPU they pack their weights for a kernel that has no backward, for good.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        module.training = type(module).__module__.startswith("bitsandbytes")
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _check_hyper_name(name: str, site: SiteGroup) -> None:
    if not name.startswith(f"{site.name}."):
        raise PriorError(
            f'site {site.name!r}: its prior samples {name!r}; name it f"{{site.name}}.{name}", so that guides know '
            "whose hyper-parameter it is"
        )


def _median(fn: TorchDistributionMixin, num_draws: int = 1001) -> Tensor:
    """Elementwise median: exact where the distribution has quantiles, by simulation elsewhere."""
    base: Any = fn
    while isinstance(base, Independent):
        base = base.base_dist
    try:
        return base.icdf(torch.tensor(0.5)).expand(fn.shape()).clone()
    except NotImplementedError:
        return fn.sample(torch.Size((num_draws,))).median(0).values


def _rms_scale(fn: TorchDistributionMixin) -> float:
    if isinstance(fn, Flat):
        return 1.0
    scale = float(fn.variance.mean().sqrt())
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def _inject(model: nn.Module, adapter: LoraConfig | str | Path | None) -> PeftModel:
    if isinstance(adapter, LoraConfig):
        if isinstance(model, PeftModel):
            raise TypeError("the model is a PeftModel already: leave out the LoraConfig, or give the model below it")
        if adapter.bias != "none":
            raise ValueError(
                f'LoraConfig(bias={adapter.bias!r}) trains base biases, which have no site: use bias="none"'
            )
        return get_peft_model(model, adapter)  # type: ignore[arg-type,return-value]
    if adapter is not None:
        return load_adapter(model, adapter)
    if not isinstance(model, PeftModel):
        raise TypeError(
            "give a peft.LoraConfig or an adapter folder as the second argument, or a PeftModel as the first"
        )
    return model


def _data_side(task: Task | None, likelihood: Likelihood | None, num_data: int | None) -> tuple[Likelihood, int]:
    if task is not None and likelihood is None and num_data is None:
        if task.train is None:
            raise ValueError("the task has no training split, so the number of examples N is unknown; give num_data")
        return task.likelihood, len(task.train)
    if task is None and likelihood is not None and num_data is not None and num_data > 0:
        return likelihood, num_data
    raise TypeError("give either task=, or likelihood= and a positive num_data=")
