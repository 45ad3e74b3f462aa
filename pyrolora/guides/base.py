"""The guide contract: how a posterior over the program's latent sites is approximated.

A guide is a callable module with the program's argument. It samples every latent site once, from its family *at the
site*, so that closed-form KLs apply, and returns ``{site: value}``. It knows nothing of the base model.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, get_args

import pyro
import pyro.distributions as dist
import torch
from datasets import Dataset
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import biject_to

from pyrolora.program import Batch, Latent, PyroLoRA, data_plate


@dataclass(frozen=True)
class Step:
    """Where a training run stands, as a guide needs to know it.

    Attributes:
        number: Of the optimiser's step, from 1.
        total: Steps of the whole run.
        learning_rate: Of this step, in the first parameter group.
        temperature: β of the objective ``L_β``.
        num_data: N; the gradients are those of ``−L_β / N``.
    """

    number: int
    total: int
    learning_rate: float
    temperature: float
    num_data: int

    def is_one_of(self, count: int, *, start: float) -> bool:
        """Whether this is one of ``count`` evenly spaced steps after the fraction ``start`` of the run.

        The last step is one; a run of fewer steps than ``count`` has them all.
        """
        done, before = ((n / self.total - start) / (1 - start) * count for n in (self.number, self.number - 1))
        return done > 1e-9 and math.floor(done + 1e-9) > math.floor(max(before, 0.0) + 1e-9)


@dataclass(frozen=True)
class Card:
    """A kind of guide in a table of methods; costs are passes through the base model.

    Attributes:
        random: What is random.
        training: What a fit costs.
        prediction: What a prediction costs: S draws, K classes, M members.
    """

    random: str
    training: str
    prediction: str


class Guide(nn.Module):
    """Base class of all guides.

    Life of a guide: construct (stores its arguments), `bind` (creates parameters for a program's sites), fit, draw.
    `fit` binds a copy, so one guide object serves many fits and programs.

    To write one, implement `family`: the distribution at a random site, and `initialise`: its parameters. Sites that
    are not random get a point estimate under the same declared prior.

    These are global latent variables: one value for all data. A guide with local ones, a value for each example, whose
    distribution it computes from the input (amortised inference), implements `local_sites`, `local_prior` and
    `local_family`, and `hooks`, which make the base model feel them. Both are sampled inside the plate ``data``.

    Args:
        random: Shell-style pattern(s) of the site names that are random, ``"*.A"`` for instance.

    Attributes:
        card: What is random, and what it costs, for the table of methods.
        optimise: Whether `fit` runs the optimiser; guides that start from a finished adapter set it to False.
        turn: The number of the draw to come, by which mixtures take their parts in turn; None: one at random.
    """

    card: ClassVar[Card] = Card("sites that match `random`", "1 a step", "S")
    optimise: bool = True
    turn: int | None = None

    def __init__(self, *, random: str | Sequence[str] = "*"):
        super().__init__()
        self.random = random
        self.latents: dict[str, Latent] = {}
        self.points = nn.ParameterDict()

    # -- a guide with random sites implements these three ------------------------------------------------------------

    def initialise(self, latent: Latent) -> None:
        """Creates the parameters of one random site, starting at ``latent.start``."""
        raise self._without_family(latent)

    def family(self, latent: Latent) -> TorchDistributionMixin:
        """The approximate posterior of one random site: batch ``(layers,)``, event as the site's."""
        raise self._without_family(latent)

    def centre(self, latent: Latent) -> Tensor:
        """The value of one random site that stands for the whole posterior (its mean): ``latent.shape``."""
        raise self._without_family(latent)

    # -- a guide with local latent variables implements these, and hooks ---------------------------------------------

    def local_sites(self) -> list[str]:
        """Names of the adapter sites with a random part for each example."""
        return []

    def local_prior(self, batch: Batch) -> dict[str, TorchDistributionMixin]:
        """The model's distributions of the local latent variables, by name ``<site>.<variable>``: batch ``(b,)``."""
        return {}

    def local_family(self, batch: Batch) -> dict[str, TorchDistributionMixin]:
        """The guide's distributions of them given the inputs: the same names and shapes."""
        return {}

    def describe_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the guide says of each input by itself, without a pass through the layers: ``{name: (b, layers)}``."""
        return {}

    # -- and may change these ----------------------------------------------------------------------------------------

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """Optimiser groups; guides whose log-scales need another learning rate give them one of their own."""
        return [{"params": list(self.parameters()), "lr": learning_rate}]

    def hooks(self, program: PyroLoRA) -> AbstractContextManager:
        """What stands on the base model while the guide trains: noise in activation space, for instance.

        With local latent variables, also while it predicts; their values are in ``program.running``. What hooks need of
        the guide's own state they note in ``program.notes``: there activation checkpointing finds it again.
        """
        return contextlib.nullcontext()

    def training_arguments(self, args: Any) -> Any:
        """The `TrainingArguments` of a run, with those that the method prescribes changed (on a copy)."""
        return args

    def before_step(self, step: Step) -> None:
        """Called before every step of the optimiser, when the gradients are complete: noise for a sampler, say."""

    def after_step(self, step: Step) -> None:
        """Called after every step of the optimiser and before a checkpoint, which holds what is noted in buffers."""

    def parts(self) -> Sequence[Guide]:
        """The parts of an ensemble, each of which `fit` trains on its own; empty where the guide is trained as one."""
        return ()

    def passes(self, num_draws: int, num_outputs: int) -> int:
        """Passes through the base model, forward and backward, that one prediction takes.

        Args:
            num_draws: S.
            num_outputs: Natural parameters of an example, K for K classes.
        """
        return self.draws_for(num_draws)

    def draws_for(self, num_draws: int) -> int:
        """How many draws serve a prediction that asks for S of them; at least 1, which is all that a point needs."""
        return max(num_draws, 1) if self.random_sites() or self.local_sites() else 1

    def reparametrisations(self) -> dict[str, Reparam]:
        """Model sites to Pyro reparametrisers: how a guide with auxiliary variables rewrites the model's statements."""
        return {}

    def describe(self) -> dict[str, dict[str, float]]:
        """What was learnt, for each random site: numbers that only this kind of guide has."""
        return {}

    def post_fit(self, program: PyroLoRA, data: Dataset) -> None:
        """A second stage on the training data after the optimiser's last step; most guides have none."""

    def saw_validation(self, program: PyroLoRA) -> bool:
        """Whether the task's validation split had a part in the posterior, so that figures on it are too good."""
        return any(part.saw_validation(program) for part in self.parts())

    @property
    def joint_draws(self) -> bool:
        """Whether a draw of a prediction is one value of the weights, the same for every input."""
        return True

    def natural_parameters(
        self, program: PyroLoRA, num_draws: int, *, seed: int = 0
    ) -> Callable[[Batch], Iterable[Tensor]] | None:
        """Draws of the natural parameters, of guides that predict by other means than draws of the weights.

        With local latent variables: of passes with `hooks`, in which every batch sees the same random numbers.

        Returns:
            A function from a batch to S draws of shape ``(b, K)``; None where draws of the weights serve.
        """
        if not self.local_sites():
            return None

        def passes(batch: Batch) -> Iterator[Tensor]:
            for s in range(num_draws):
                with self.hooks(program), poutine.block(), torch.random.fork_rng():
                    torch.manual_seed(seed * 1_000_003 + s)
                    logits = program.logits(self(batch), batch)
                yield logits

        return passes

    # -- what every guide does ---------------------------------------------------------------------------------------

    def bind(self, program: PyroLoRA) -> None:
        """Creates parameters for a program's latent sites, from PEFT's present weights; writes nothing on the program.

        Raises:
            ValueError: A `random` pattern that matches no site, or (``"*"`` apart) only sites that cannot be random.
        """
        self.latents = dict(program.latents)
        self._num_data = program.num_data
        self._check_patterns()
        self.points = nn.ParameterDict()
        for latent in self.latents.values():
            if self.is_random(latent):
                self.initialise(latent)
            elif not self._is_held(latent):
                self.points[key(latent)] = nn.Parameter(unconstrained(latent))

    def augmented(self, program: PyroLoRA) -> Callable[..., Tensor]:
        """The program together with this guide's auxiliary sites, for the ELBO; most guides have none.

        ``SVI(guide.augmented(program), guide, ...)`` is how to train such a guide with Pyro's own loop.
        """
        strategies = self.reparametrisations()
        model = poutine.reparam(program, config=strategies) if strategies else program
        return partial(model, local=lambda batch: _sampled(self.local_prior(batch))) if self.local_sites() else model

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        """Samples every latent site once.

        Args:
            batch: The program's argument. Without it only global latent variables are sampled.

        Returns:
            ``{site: value}`` in the model's order, then the local ones.
        """
        self._announce()
        plates: dict[str | None, AbstractContextManager] = {None: contextlib.nullcontext()}
        values = {}
        for name, latent in self.latents.items():
            if latent.plate not in plates:
                assert latent.plate is not None
                plates[latent.plate] = pyro.plate(latent.plate, latent.shape[0], dim=-1)
            with plates[latent.plate]:
                values[name] = pyro.sample(name, self.distribution(latent))
        if batch is not None and self.local_sites():
            with data_plate(self._num_data, batch):
                values |= _sampled(self.local_family(batch))
        return values

    def distribution(self, latent: Latent) -> TorchDistributionMixin:
        """The guide's distribution at a site: its family where random, a Delta elsewhere."""
        if self.is_random(latent):
            return self.family(latent)
        return dist.Delta(self.point(latent), event_dim=latent.event_dim)

    def point(self, latent: Latent) -> Tensor:
        """The point estimate of a site that is not random."""
        if self._is_held(latent):
            return latent.start
        return biject_to(latent.support)(self.points[key(latent)])

    def mean(self) -> dict[str, Tensor]:
        """One value for every site that stands for the whole posterior: ``{site: value}``, detached."""
        return {
            name: (self.centre(latent) if self.is_random(latent) else self.point(latent)).detach()
            for name, latent in self.latents.items()
        }

    def is_random(self, latent: Latent) -> bool:
        """Whether a site has a distribution rather than a point estimate.

        Adapter sites: by the `random` pattern, and never under a flat prior. Hyper-parameters of a prior: where the
        weights that they govern are random. The likelihood's own parameters: by the pattern.
        """
        owner = self._owner(latent)
        if owner is not None and owner is not latent:
            return self.is_random(owner)
        return not latent.flat and matches(latent.name, self.random)

    def random_sites(self) -> list[str]:
        """Names of the sites that have a distribution."""
        return [name for name, latent in self.latents.items() if self.is_random(latent)]

    @property
    def averages(self) -> bool:
        """Whether a prediction averages over anything: draws, noise of each input, masks, members, points."""
        return self.passes(2, 2) > 1

    def _announce(self) -> None:
        """Makes the parameters visible to Pyro's SVI by param statements; nothing enters Pyro's global store."""
        for name, parameter in self.named_parameters():
            parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
            effectful(type="param")(lambda *_, value=parameter, **__: value)(name, parameter, name=name)

    def _without_family(self, latent: Latent) -> TypeError:
        name = type(self).__name__
        return TypeError(f"{name} makes {latent.name!r} random: it must implement initialise, family and centre")

    def _is_held(self, latent: Latent) -> bool:
        # Scale and weights have no useful joint mode: the density is unbounded as both shrink to zero.
        return self._is_hyper(latent) and not self.is_random(self._owner(latent))  # type: ignore[arg-type]

    def _is_hyper(self, latent: Latent) -> bool:
        """Whether a site is a hyper-parameter of an adapter's prior."""
        owner = self._owner(latent)
        return owner is not None and owner is not latent

    def _owner(self, latent: Latent) -> Latent | None:
        """The adapter site that a latent is, or whose hyper-parameter it is; None for the likelihood's parameters."""
        if latent.group is not None:
            return latent
        return next((o for o in self.latents.values() if o.group and latent.name.startswith(f"{o.name}.")), None)

    def _check_patterns(self) -> None:
        for pattern in [self.random] if isinstance(self.random, str) else self.random:
            found = [latent for latent in self.latents.values() if fnmatchcase(latent.name, pattern)]
            if not found:
                raise ValueError(f"random={pattern!r} matches no site; the sites are {', '.join(self.latents)}")
            # "*" is whatever can be random, were it nothing; a pattern of one's own means sites that one named.
            local = self.local_sites()
            if pattern != "*" and not any(self.is_random(latent) or latent.name in local for latent in found):
                names = ", ".join(latent.name for latent in found)
                raise ValueError(
                    f"random={pattern!r} matches only site(s) that cannot be random: {names}. Declare a proper prior "
                    "for them in place of priors.Flat (a hyper-parameter is random where its weights are), or use MAP"
                )


def _sampled(laws: Mapping[str, TorchDistributionMixin]) -> dict[str, Tensor]:
    return {name: pyro.sample(name, law) for name, law in laws.items()}


def key(latent: Latent) -> str:
    """The site's name as a parameter name: torch forbids dots there."""
    return latent.name.replace(".", "/")


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a site name matches one of the shell-style patterns."""
    return any(fnmatchcase(name, p) for p in ([patterns] if isinstance(patterns, str) else patterns))


def check_choice(what: str, value: Any, choices: Any) -> Any:
    """The value, if it is one of a Literal's; else a ValueError that lists them."""
    if value not in get_args(choices):
        raise ValueError(f"{what} is one of {', '.join(get_args(choices))}, not {value!r}")
    return value


def unconstrained(latent: Latent) -> Tensor:
    """The starting value of a site on the unconstrained scale, a fresh tensor."""
    return biject_to(latent.support).inv(latent.start).detach().clone()
