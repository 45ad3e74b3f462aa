"""Prior and posterior predictive checks: labels that the model would make, against the labels that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from pyro import poutine
from torch import Tensor

from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.verdict import Finding
from pyrolora.diagnostics.weights import owner_of
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.likelihoods.base import ClassLikelihood, Likelihood
from pyrolora.likelihoods.normal import Normal
from pyrolora.program import PyroLoRA, evaluating

# A statistic so many standard deviations from what the model makes is worth a look, or bad. There are several of them.
_LOOK, _BAD = 2.5, 4.0
_MOST_CLASSES = 10


@dataclass(frozen=True)
class Predictive:
    """Natural parameters of n labelled rows under S draws, and labels made from them.

    Attributes:
        likelihood: The program's.
        logits: Natural parameters, ``(S, n, ...)``.
        parameters: The likelihood's own parameters of each draw.
        labels: What was observed, ``(n, ...)``.
        replicated: Labels that each draw makes for all rows, ``(S, n, ...)``.
        class_names: Of the K classes; empty for regression.
    """

    likelihood: Likelihood
    logits: Tensor
    parameters: Sequence[Mapping[str, Tensor]]
    labels: Tensor
    replicated: Tensor
    class_names: tuple[str, ...] = ()

    def log_prob(self, labels: Tensor) -> FloatArray:
        """``log p(y_n | θ_s)`` of any labels in nats, ``(S, n)``."""
        pairs = zip(self.logits, self.parameters, strict=True)
        rows = [self.likelihood.distribution(f, own, {}).log_prob(labels) for f, own in pairs]
        return torch.stack(rows).double().numpy()

    def log_score(self, labels: Tensor) -> FloatArray:
        """``log (1/S) Σ_s p(y_n | θ_s)``, ``(n,)``."""
        return np.logaddexp.reduce(self.log_prob(labels), 0) - math.log(len(self.logits))

    def probabilities(self) -> Tensor:
        """Class probabilities under each draw, ``(S, n, K)``."""
        pairs = zip(self.logits, self.parameters, strict=True)
        return torch.stack([self.likelihood.probabilities(f, own, {}) for f, own in pairs])


def can_be_checked(likelihood: Likelihood) -> bool:
    """Whether labels of this likelihood can be made anew for given inputs, which texts cannot."""
    return isinstance(likelihood, ClassLikelihood | Normal)


def posterior_predictive(posterior: Posterior, data: Dataset, num_draws: int, *, seed: int = 0) -> Predictive:
    """What the posterior says about labelled rows; draws are those of `Posterior.draw`.

    A draw makes the labels of all rows together, as one world would. Guides that know only the marginals of each row
    (Laplace, linearised) have no such draws: their rows are independent.
    """
    program = posterior.program
    logits = posterior.logits(data, num_draws, seed=seed)
    if len(logits) == 1:  # a point estimate, or a closed form, which makes labels too
        logits = logits.expand(num_draws, *logits.shape[1:])
    own: list[Mapping[str, Tensor]] = [{}] * len(logits)
    latents = program.latents.items()
    names = [name for name, site in latents if site.group is None and owner_of(name, program.latents) == name]
    if names:
        drawn = posterior.draw(len(logits), seed=seed)
        own = [{name: drawn[name][s].cpu() for name in names} for s in range(len(logits))]
    return _predictive(program, data, logits, own, seed=seed, joint=posterior.guide.joint_draws)


@torch.no_grad()
def prior_predictive(program: PyroLoRA, data: Dataset, num_draws: int, *, seed: int = 0) -> Predictive:
    """What the priors say about labelled rows before any fit; sites with a flat prior stand at their start."""
    assert program.task is not None
    start = {name: latent.start for name, latent in program.latents.items() if latent.flat}
    prior = poutine.condition(program.sample_latents, data=start)
    plain = data.remove_columns([c for c in ("text",) if c in data.column_names])
    batches = [range(i, min(i + 32, len(data))) for i in range(0, len(data), 32)]
    logits, own = [], []
    with evaluating(program.model), poutine.block():
        for s in range(num_draws):
            with isolated(spawn(seed, s)):
                draws, parameters = prior()
            parts = []
            for rows in batches:
                batch = {k: v.to(program.device) for k, v in program.task.collate([plain[i] for i in rows]).items()}
                parts.append(program.logits(draws, batch).cpu())
            logits.append(torch.cat(parts))
            own.append({name: value.cpu() for name, value in parameters.items()})
    return _predictive(program, data, torch.stack(logits), own, seed=seed, joint=True)


def check(predictive: Predictive) -> pd.DataFrame:
    """Statistics of the observed labels against those of the replicated ones.

    For classes: ``accuracy`` of the mean predictive's favourite, its ``log score`` ``(1/n) Σ log p̄(y_n)``, and the
    share of each class (of the ten most frequent). Confident predictions expect a high log score: one below what the
    replicates have is overconfidence. For regression: mean, standard deviation, log score.

    Returns:
        One row for each statistic: ``observed``, ``expected`` and ``sd`` over replicates, ``low`` and ``high`` (their
        95 % interval), and ``z = (observed − expected)/sd``.

    Source: Gelman et al. 1996, on posterior predictive assessment.
    """
    rows = {}
    for name, statistic in _statistics(predictive).items():
        made = np.array([statistic(labels) for labels in predictive.replicated])
        observed, expected, sd = statistic(predictive.labels), float(made.mean()), float(made.std(ddof=1))
        low, high = np.quantile(made, [0.025, 0.975])
        away = (observed - expected) / sd if sd > 0 else math.copysign(math.inf, observed - expected)
        z = 0.0 if math.isclose(observed, expected, abs_tol=1e-9) else away
        rows[name] = {"observed": observed, "expected": expected, "sd": sd, "low": low, "high": high, "z": z}
    return pd.DataFrame.from_dict(rows, orient="index")


def judge_posterior_check(table: pd.DataFrame, rows: int, split: str) -> Finding:
    """Whether the observed labels are such as the posterior makes; if not, in which direction it is wrong."""
    numbers = {
        f"{column} {name}": float(table.loc[name, column]) for name in table.index for column in ("observed", "z")
    }
    worst = table["z"].abs().idxmax()
    row = table.loc[worst]
    level = "fine" if abs(row["z"]) <= _LOOK else "look" if abs(row["z"]) <= _BAD else "bad"
    name = "accuracy" if "accuracy" in table.index else "log score"
    main = table.loc[name]
    words = f"on {rows} rows ({split}) it expects {_told(name, main)} and has {main['observed']:.3f}"
    if worst != name:
        words += f"; the statistic that fits worst is {_told(worst, row)}, observed {row['observed']:.3f}"
    words += f", {abs(row['z']):.1f} standard deviations away."
    if level == "fine":
        return Finding("posterior check", "fine", words, "", numbers)
    score = table.loc["log score", "z"]
    if score < -_LOOK:
        words += " The labels surprise it more than it expects: it is overconfident on these rows."
        advice = "More noise (a higher temperature β, a wider start), stronger regularisation, or temperature scaling."
    elif score > _LOOK:
        words += " The labels surprise it less than it expects: it is underconfident."
        advice = "A lower temperature β, longer training, or temperature scaling."
    else:
        advice = "Are these rows drawn as the training rows were? Look at the statistic in checks.png."
    return Finding("posterior check", level, words, advice, numbers)  # type: ignore[arg-type]


def judge_prior_check(predictive: Predictive, table: pd.DataFrame, flat: Sequence[str]) -> Finding:
    """What the priors believe before any data, and whether the observed labels are possible under it."""
    kept = [name for name in table.index if name not in ("accuracy", "log score")]
    numbers = {f"{column} {name}": float(table.loc[name, column]) for name in kept for column in ("observed", "z")}
    note = f" Flat at {', '.join(flat)}: they stand at their start, no draw." if flat else ""
    outside = [n for n in kept if not table.loc[n, "low"] <= table.loc[n, "observed"] <= table.loc[n, "high"]]
    if outside:
        told = "; ".join(f"{_told(n, table.loc[n])}, observed {table.loc[n, 'observed']:.3f}" for n in outside)
        advice = "Widen or move the prior; see program.prior_predictive(...)."
        return Finding("prior check", "look", f"prior–data conflict: the prior expects {told}.{note}", advice, numbers)
    if not isinstance(predictive.likelihood, ClassLikelihood):
        return Finding("prior check", "fine", f"the labels are such as the prior makes.{note}", "", numbers)
    p = predictive.probabilities()
    confidence, spread = float(p.amax(-1).mean()), float(p.std(0).mean())
    numbers |= {"confidence": confidence, "spread": spread}
    words = f"before any data a draw of the prior gives its favourite class {confidence:.2f} on average, and draws "
    words += f"differ by {spread:.2f} (sd of a probability).{note}"
    if confidence > 0.95:
        advice = "A prior that is sure of everything: make the scales of its sites smaller."
        return Finding("prior check", "look", words, advice, numbers)
    if spread < 0.01:
        advice = "A prior under which all draws are one function: make the scales of its sites larger."
        return Finding("prior check", "none" if flat else "look", words, "" if flat else advice, numbers)
    return Finding("prior check", "fine", words, "", numbers)


def _told(name: object, row: pd.Series) -> str:
    return f"{name} {row['expected']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _statistics(predictive: Predictive) -> dict[str, Callable[[Tensor], float]]:
    score = {"log score": lambda y: float(predictive.log_score(y).mean())}
    if not isinstance(predictive.likelihood, ClassLikelihood):
        return {"mean": lambda y: float(y.mean()), "standard deviation": lambda y: float(y.std()), **score}
    mean = predictive.probabilities().mean(0)
    log_mean, favourite = mean.log(), mean.argmax(-1)
    frequent = predictive.labels.bincount(minlength=mean.shape[-1]).argsort(descending=True)[:_MOST_CLASSES].tolist()
    shares = {
        f"share of {predictive.class_names[k] if predictive.class_names else k}": _share(k) for k in sorted(frequent)
    }
    return {
        "accuracy": lambda y: float((y == favourite).double().mean()),
        "log score": lambda y: float(log_mean.gather(-1, y.unsqueeze(-1)).mean()),
        **(shares if len(shares) > 2 else dict(list(shares.items())[:1])),  # of two classes one share says it all
    }


def _share(k: int) -> Callable[[Tensor], float]:
    return lambda y: float((y == k).double().mean())


def _predictive(
    program: PyroLoRA, data: Dataset, logits: Tensor, own: Sequence[Mapping[str, Tensor]], *, seed: int, joint: bool
) -> Predictive:
    assert program.task is not None
    labels = program.task.label_tensor(list(data[program.likelihood.site]))
    unknown = (labels < 0) if isinstance(program.likelihood, ClassLikelihood) else ~torch.isfinite(labels)
    if bool(unknown.any()):
        raise ValueError(f"{int(unknown.sum())} of {len(labels)} rows have no known label; a check needs them all")
    with isolated(spawn(seed, len(logits) + 1)):
        made = torch.stack(
            [program.likelihood.distribution(f, p, {}).sample() for f, p in zip(logits, own, strict=True)]
        )
        if not joint:
            made = torch.stack([made[torch.randperm(len(made)), n] for n in range(made.shape[1])], 1)
    names = program.task.class_names
    return Predictive(program.likelihood, logits, own, labels, made, names)
