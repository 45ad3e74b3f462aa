"""The diagnosis of a posterior: every diagnostic that can be had at a stated cost, each with a plain verdict."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from arviz_stats import ELPDData
from datasets import Dataset
from xarray import DataTree

from pyrolora.diagnostics import checks, psis
from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.convergence import judge_runs
from pyrolora.diagnostics.evidence import Evidence, gather, tree
from pyrolora.diagnostics.sensitivity import judge_sensitivity, power_scaling
from pyrolora.diagnostics.verdict import Finding, show
from pyrolora.diagnostics.weights import judge_noise, judge_prior, layer_table
from pyrolora.guides.base import matches
from pyrolora.inference.posterior import Posterior
from pyrolora.tasks.base import Task

_PRIOR_DRAWS = 50
_FEWEST_ROWS = 10
# Where a probability is known to no better than this fraction of itself, more draws are needed.
_COARSE = 0.1


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        title: The posterior in one line.
        findings: The verdicts, one for each diagnostic.
        layers: KL, noise-to-mean ratio and effective rank of each kind of module and layer, see `layer_table`.
        checks: Prior and posterior predictive statistics by name, see `checks.check`.
        loo: PSIS-LOO over training rows, or None.
        comparison: Of LOO with other posteriors, or None.
        tree: What pictures are made from, see `evidence.tree`.
        settings: Draws, rows, budget, seed.
    """

    title: str
    findings: tuple[Finding, ...]
    layers: pd.DataFrame
    checks: dict[str, pd.DataFrame]
    loo: ELPDData | None
    comparison: pd.DataFrame | None
    tree: DataTree
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return {
            "title": self.title,
            "settings": self.settings,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": self.layers.to_dict("records"),
            "checks": {name: table.to_dict("index") for name, table in self.checks.items()},
            "comparison": None if self.comparison is None else json.loads(self.comparison.to_json(orient="index")),
        }

    def __str__(self) -> str:
        parts = [self.title, "", show(self.findings)]
        if self.comparison is not None:
            parts += ["", "Leave-one-out (nats over all rows), the best first:", self.comparison.round(2).to_string()]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def diagnose(
    posterior: Posterior,
    *,
    runs: Sequence[Posterior] = (),
    against: Mapping[str, Posterior] | None = None,
    num_draws: int = 100,
    budget: int = 40_000,
    sites: str = "*",
    seed: int = 0,
) -> Diagnosis:
    """Diagnoses a posterior.

    Costs S passes over training rows and S over a quarter as many held-out rows (of the validation split), and 50 over
    those under the prior. ``budget`` bounds rows × draws of the first: beyond it LOO is over a random part of the
    training rows, and the k̂ of guide against model, which needs all, is refused.

    Args:
        posterior: With the program's task, for its data.
        runs: Fits of the same program and guide with other seeds, for R-hat.
        against: Other posteriors on the same training data by name, compared by LOO.
        num_draws: S, at least 25.
        budget: Most training rows × draws.
        sites: Pattern of the random sites over which the k̂ of guide against model is taken, with the others at their
            means: fewer random numbers, and a shared beginning of the model where they are in late layers. Another
            pass over the training rows, where not ``"*"``.
        seed: Of the draws and of the choice of rows.

    Raises:
        ValueError: Too few draws; no task; sites that match nothing; runs or rivals on other data.
    """
    rivals = dict(against or {})
    task = _checked(posterior, runs, rivals, num_draws=num_draws, sites=sites)
    split = "train" if task.validation is None else "validation"
    train = _part(task.train, budget // num_draws, seed)
    held_out = _part(task.train if task.validation is None else task.validation, budget // num_draws // 4, seed)
    first = gather(posterior, train, held_out, num_draws, seed=seed)
    others = [gather(run, None, held_out, num_draws, seed=seed) for run in runs]
    tables, findings = _checks(first, held_out, split, seed=seed)
    loo = None
    if posterior.guide.random_sites():
        loo, loo_finding = _loo(first, None if split == "train" else first.log_score())
        guide = _guide(first, train, sites, num_draws, seed=seed)
        findings = [*_of_draws(first), guide, loo_finding, _sensitivity(first, seed=seed), *findings]
        findings.append(judge_runs([run.scalars() for run in (first, *others)], [r.held_out for r in (first, *others)]))
    else:
        findings.insert(0, _POINT)
    settings = {"num_draws": num_draws, "budget": budget, "sites": sites, "seed": seed}
    settings |= {"train_rows": len(train), "held_out_rows": len(held_out), "held_out_split": split}
    return Diagnosis(
        title=repr(posterior),
        findings=tuple(findings),
        layers=layer_table(posterior, first.weights),
        checks=tables,
        loo=loo,
        comparison=_comparison(first, rivals, train, num_draws, seed=seed) if rivals else None,
        tree=tree([first, *others], num_draws, seed=seed),
        settings={**settings, "temperature": posterior.temperature},
    )


_POINT = Finding(
    "posterior",
    "none",
    "a point estimate: no site is random, so that there is no noise, no guide to compare with the model, nothing to "
    "reweight for leave-one-out, and nothing for R-hat.",
    "Fit a guide with random sites, or put one at this adapter without training: Laplace(optimise=False).",
)


def _refusal(evidence: Evidence) -> str | None:
    """Why the weights π(θ)/q(θ) cannot be had, or None."""
    posterior = evidence.posterior
    name = type(posterior.guide).__name__
    if posterior.temperature == 0:
        return "at β = 0 the fit approximates no posterior: the prior does not count."
    if evidence.weights.natural:
        return (
            f"{name} predicts from linearised natural parameters, not from draws of the weights: whether such draws "
            "fit the model says nothing of its predictions."
        )
    if evidence.weights.atoms is not None:
        return (
            f"{name} has point masses at {evidence.weights.atoms}, which have no density to compare with the model's."
        )
    return None


def _guide(evidence: Evidence, train: Dataset, sites: str, num_draws: int, *, seed: int) -> Finding:
    """Pareto k̂ of guide against model, or why not."""
    posterior, weights = evidence.posterior, evidence.weights
    if reason := _refusal(evidence):
        return Finding("guide", "none", f"no k̂ of guide against model: {reason}")
    if not evidence.whole:
        rows = posterior.program.num_data
        advice = f"Allow it with --budget {rows * num_draws}, or take fewer draws (at least {psis.MIN_DRAWS})."
        words = f"it needs all {rows:,} training rows under {num_draws} draws, more than the budget of rows × draws"
        return Finding("guide", "none", f"no k̂ of guide against model: {words}.", advice)
    beta = posterior.temperature
    if sites == "*":
        khat = psis.guide_khat(evidence.total() + weights.log_ratio())
        return psis.judge_khat(khat, num_draws, sum(weights.random.values()), temperature=beta)
    chosen = [name for name in weights.random if matches(name, sites)]
    values = posterior.log_likelihood(train, num_draws, sites=sites, seed=seed).double().numpy()
    ratio = np.sum([weights.log_prior[name] - weights.log_guide[name] for name in chosen], 0)
    khat = psis.guide_khat(values.sum(1) / beta + ratio)
    size = sum(weights.random[name] for name in chosen)
    return psis.judge_khat(khat, num_draws, size, temperature=beta, sites=chosen)


def _loo(evidence: Evidence, held_out: FloatArray | None) -> tuple[ELPDData | None, Finding]:
    """PSIS-LOO, corrected for the guide where its k̂ allows it."""
    posterior = evidence.posterior
    if evidence.train is None or len(evidence.train) < psis.MIN_DRAWS or posterior.temperature == 0:
        words = "no leave-one-out: there are no draws to reweight"
        return None, Finding("loo", "none", f"{words} (a closed-form predictive, a point estimate, or β = 0).")
    if atoms := evidence.weights.atoms:
        words = f"no leave-one-out: {atoms} is a point mass in every draw, one of a few, which weights cannot move"
        return None, Finding("loo", "none", f"{words}.")
    weights = None
    if evidence.whole and _refusal(evidence) is None:
        ratio = evidence.total() + evidence.weights.log_ratio()
        weights = ratio if psis.guide_khat(ratio) <= min(psis.CORRECTABLE, psis.good_k(len(ratio))) else None
    result = psis.loo(evidence.train, temperature=posterior.temperature, log_weights=weights)
    beta = posterior.temperature
    return result, psis.judge_loo(result, temperature=beta, corrected=weights is not None, held_out=held_out)


def _comparison(
    first: Evidence, rivals: Mapping[str, Posterior], train: Dataset, num_draws: int, *, seed: int
) -> pd.DataFrame:
    """ArviZ's table of LOO differences with their standard errors; every guide is taken for its posterior."""
    results = {}
    for name, posterior in {"this": first.posterior, **rivals}.items():
        values = first.train
        if posterior is not first.posterior:
            values = posterior.log_likelihood(train, num_draws, seed=seed).double().numpy()
        assert values is not None
        results[name] = psis.loo(values, temperature=posterior.temperature)
    return psis.compare_loo(results)


def _of_draws(evidence: Evidence) -> list[Finding]:
    posterior, weights = evidence.posterior, evidence.weights
    return [judge_noise(posterior, weights), judge_prior(posterior, weights), _judge_draws(evidence)]


def _judge_draws(evidence: Evidence) -> Finding:
    """Whether S is enough: the Monte Carlo error of held-out probabilities, ``sd(p)/(√S p̄)``, averaged over rows."""
    if not evidence.posterior.guide.joint_draws:
        points = 1 if evidence.train is None else len(evidence.train)
        words = (
            "a closed form, without draws" if points == 1 else f"{points} quasi-random points of the natural parameters"
        )
        return Finding("draws", "fine", f"{words}, whatever number is asked for.", "", {"num_draws": points})
    p = np.exp(evidence.held_out - evidence.held_out.max(0))
    size = len(p)
    error = float((p.std(0, ddof=1) / math.sqrt(size) / p.mean(0)).mean())
    default = error * math.sqrt(size / 16)
    words = (
        f"with {size} draws the probability of a held-out label has a Monte Carlo error of {error:.1%}, with the 16 "
        f"that predict takes by default {default:.1%}"
    )
    numbers = {"error": error, "error_16": default, "num_draws": size}
    if error <= _COARSE:
        return Finding("draws", "fine", f"{words}.", "", numbers)
    advice = f"Take {math.ceil(size * (error / _COARSE) ** 2)} draws for {_COARSE:.0%}."
    return Finding("draws", "look", f"{words}: too few draws.", advice, numbers)


def _sensitivity(evidence: Evidence, *, seed: int) -> Finding:
    reason = _refusal(evidence)
    if reason or evidence.train is None:
        return Finding("sensitivity", "none", f"no power scaling: {reason or 'there are no training rows.'}")
    prior = np.sum(list(evidence.weights.log_prior.values()), 0)
    likelihood = evidence.total()
    for name, values in {"prior": prior, "likelihood": likelihood}.items():
        if np.ptp(values) < 1e-9:
            return Finding("sensitivity", "none", f"no power scaling: the {name} is the same under all draws.")
    table = power_scaling(evidence.scalars(), log_prior=prior, log_likelihood=likelihood, seed=seed)
    return judge_sensitivity(table, len(prior))


def _checks(
    evidence: Evidence, data: Dataset, split: str, *, seed: int
) -> tuple[dict[str, pd.DataFrame], list[Finding]]:
    program = evidence.posterior.program
    if evidence.predictive is None:
        kind = type(program.likelihood).__name__
        return {}, [Finding("checks", "none", f"no predictive checks: labels of {kind} cannot be made anew for a row.")]
    prior = checks.prior_predictive(program, data, _PRIOR_DRAWS, seed=seed)
    tables = {"prior": checks.check(prior), "posterior": checks.check(evidence.predictive)}
    flat = [name for name, latent in program.latents.items() if latent.flat]
    return tables, [
        checks.judge_prior_check(prior, tables["prior"], flat),
        checks.judge_posterior_check(tables["posterior"], len(data), split),
    ]


def _part(data: Dataset, size: int, seed: int) -> Dataset:
    """At most so many rows (and at least ten), drawn without replacement, in their order."""
    size = max(size, _FEWEST_ROWS)
    if len(data) <= size:
        return data
    return data.select(sorted(np.random.default_rng(seed).choice(len(data), size, replace=False).tolist()))


def _checked(
    posterior: Posterior, runs: Sequence[Posterior], rivals: Mapping[str, Posterior], *, num_draws: int, sites: str
) -> Task:
    """The task, after all that can be refused before anything is computed."""
    task = posterior.program.task
    if task is None:
        raise ValueError("a diagnosis needs the program's task for its data: PyroLoRA(..., task=task)")
    if num_draws < psis.MIN_DRAWS:
        raise ValueError(f"num_draws is at least {psis.MIN_DRAWS}, not {num_draws}")
    there = posterior.guide.random_sites()
    if sites != "*" and not any(matches(name, sites) for name in there):
        raise ValueError(f"sites={sites!r}: they match no random site; there are {', '.join(there) or 'none'}")
    for run in runs:
        if type(run.guide) is not type(posterior.guide) or run.guide.random_sites() != there:
            raise ValueError(f"{run!r} is no run of {posterior!r}: R-hat compares one guide, fitted with several seeds")
    site = posterior.program.likelihood.site
    for other in (*runs, *rivals.values()):
        theirs = other.program.task
        if theirs is None or len(theirs.train) != len(task.train) or theirs.train[site][:] != task.train[site][:]:
            raise ValueError(f"{other!r} was fitted to other training data, so the two cannot be compared")
    for name, rival in {"this posterior": posterior, **rivals}.items() if rivals else ():
        if not rival.guide.random_sites() or rival.temperature == 0:
            raise ValueError(f"{name}: LOO compares posteriors; this one has no draws. Compare it by held-out rows")
    return task
