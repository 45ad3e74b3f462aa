"""What the draws of a posterior say of training rows and of held-out rows: computed once, looked at by every check."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from arviz_base import from_dict
from datasets import Dataset
from xarray import DataTree

from pyrolora.diagnostics import checks
from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.weights import Weights, prior_sizes, summarise
from pyrolora.inference.datatree import layer_numbers
from pyrolora.inference.posterior import Posterior
from pyrolora.likelihoods.base import ClassLikelihood


@dataclass(frozen=True)
class Evidence:
    """A posterior, and what S of its draws say.

    Attributes:
        posterior: Whose draws they are.
        weights: Summaries of the weights.
        train: ``log p(y_n | θ_s)`` of training rows, ``(S, n)``, or None where they were not asked for.
        held_out: The same of held-out rows.
        predictive: Labels made anew for the held-out rows; None where the likelihood makes none.
    """

    posterior: Posterior
    weights: Weights
    train: FloatArray | None
    held_out: FloatArray
    predictive: checks.Predictive | None

    @property
    def whole(self) -> bool:
        """Whether all training rows were seen."""
        return self.train is not None and self.train.shape[1] == self.posterior.program.num_data

    def total(self) -> FloatArray:
        """``Σ_n log p(y_n | θ_s)/β``, ``(S,)``: the likelihood as it counted in the fit; estimated from a part."""
        assert self.train is not None
        share = self.train.shape[1] / self.posterior.program.num_data
        return self.train.sum(1) / share / self.posterior.temperature

    def log_score(self) -> FloatArray:
        """``log (1/S) Σ_s p(y_n | θ_s)`` of held-out rows, ``(n,)``."""
        return np.logaddexp.reduce(self.held_out, 0) - math.log(len(self.held_out))

    def scalars(self) -> dict[str, FloatArray]:
        """Identifiable scalars of each draw, ``(S,)``: mean log p(y) of held-out rows, and over classes confidence."""
        found = {"log score": self.held_out.mean(1)}
        if self.predictive is not None and isinstance(self.predictive.likelihood, ClassLikelihood):
            found["confidence"] = self.predictive.probabilities().amax(-1).mean(-1).double().numpy()
        return found


def gather(
    posterior: Posterior, train: Dataset | None, held_out: Dataset, num_draws: int, *, seed: int = 0
) -> Evidence:
    """Runs the model over both splits under S draws; a point estimate runs once and is repeated.

    Args:
        posterior: With its program's task.
        train: Training rows, or None to leave them out.
        held_out: Other rows.
        num_draws: S.
        seed: Of the draws.
    """
    predictive = None
    if checks.can_be_checked(posterior.program.likelihood):
        predictive = checks.posterior_predictive(posterior, held_out, num_draws, seed=seed)
        outside = predictive.log_prob(predictive.labels)
    else:
        outside = _repeated(posterior.log_likelihood(held_out, num_draws, seed=seed).double().numpy(), num_draws)
    inside = None
    if train is not None and posterior.guide.random_sites():
        inside = posterior.log_likelihood(train, num_draws, seed=seed).double().numpy()
    return Evidence(posterior, summarise(posterior, num_draws, seed=seed), inside, outside, predictive)


def tree(runs: Sequence[Evidence], num_draws: int, *, seed: int = 0) -> DataTree:
    """The evidence as ArviZ takes it, one chain for each run.

    Groups: ``posterior`` with identifiable scalars, ``‖ΔW‖`` of each kind by layer, and the root mean square of each
    random adapter matrix by layer and rank (``size.<site>``); ``prior`` with the same sizes; of the first run also
    ``sample_stats`` and ``log_likelihood`` of training rows.
    """
    first = runs[0]
    program, weights = first.posterior.program, first.weights
    drawn = {name: [run.weights.size[name] for run in runs] for name in weights.size}
    groups: dict[str, dict[str, FloatArray]] = {
        "posterior": {name: _chains([run.scalars()[name] for run in runs]) for name in first.scalars()}
    }
    if not weights.natural:
        updates = {f"update {kind}": _chains([run.weights.update[kind] for run in runs]) for kind in weights.update}
        groups["posterior"] |= updates
    groups["posterior"] |= {f"size {name}": _chains(values) for name, values in drawn.items()}
    layers = {f"update {kind}": layer_numbers(program.sites[f"{kind}.A"]) for kind in weights.update}
    layers |= {f"size {name}": layer_numbers(program.sites[name]) for name in drawn}
    dims, coords = _dimensions({n: (layers[n], v.shape[2:]) for n, v in groups["posterior"].items() if n in layers})
    prior = prior_sizes(program, drawn, num_draws, seed=seed)
    groups["prior"] = {f"size {name}": value[None] for name, value in prior.items()}
    groups["sample_stats"] = {
        "log_prior": np.sum(list(weights.log_prior.values()), 0)[None],
        "log_guide": np.sum(list(weights.log_guide.values()), 0)[None],
    }
    if first.train is not None:
        groups["log_likelihood"] = {program.likelihood.site: first.train[None]}
        dims[program.likelihood.site] = ["example"]
    return from_dict({name: group for name, group in groups.items() if group}, dims=dims, coords=coords)


def _dimensions(
    layers: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Names ``layer`` and ``rank``, and the layers' own numbers; qualified by the variable where two would clash."""
    alike = [
        len({numbers for numbers, _ in layers.values()}) < 2,
        len({shape[1:] for _, shape in layers.values() if shape[1:]}) < 2,
    ]
    dims, coords = {}, {}
    for name, (numbers, shape) in layers.items():
        names = [plain if same else f"{plain} of {name}" for plain, same in zip(("layer", "rank"), alike, strict=True)]
        dims[name] = names[: len(shape)]
        coords[names[0]] = list(numbers)
    return dims, coords


def _chains(values: Sequence[FloatArray]) -> FloatArray:
    shortest = min(len(value) for value in values)
    return np.stack([value[:shortest] for value in values])


def _repeated(values: FloatArray, num_draws: int) -> FloatArray:
    return np.repeat(values, num_draws, 0) if len(values) == 1 else values
