"""How much of the uncertainty the draws disagree about, and how well a finite number of draws knows it.

Every function takes `draws (S, n, K)`, the natural logarithm of p(k | x_n, θ_s) for each draw s, as `Prediction.draws`
holds them. `Prediction` itself has the decomposition in single precision, also where the draws were too many to keep;
what needs the draws is here: Monte Carlo errors, and scores as a function of their number. All in nats.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, logsumexp

from pyrolora.diagnostics.bootstrap import Estimate, FloatArray, IntArray, percentile_estimate, resamples
from pyrolora.diagnostics.calibration import check_predictive


@dataclass(frozen=True)
class Component:
    """One kind of uncertainty, with its two errors: few draws, and few examples.

    Attributes:
        values: Of each example, (n,), nats.
        errors: Their Monte Carlo standard errors, (n,); NaN where too few draws show none.
        mean: Over examples, with the 95 % bootstrap interval over examples, draws held fixed.
        mean_error: Monte Carlo standard error of the mean over examples, examples held fixed. It is not made from
            `errors`: a draw is wrong about all examples together, so the errors do not average out.
    """

    values: FloatArray
    errors: FloatArray
    mean: Estimate
    mean_error: float

    def to_dict(self) -> dict[str, float | None]:
        """The mean, its interval and its Monte Carlo error by name, ready for strict JSON: NaN becomes None."""
        error = None if math.isnan(self.mean_error) else self.mean_error
        return {**self.mean.to_dict(), "monte_carlo_error": error}


@dataclass(frozen=True)
class Uncertainty:
    """Total, aleatoric and epistemic uncertainty of a classifier, under the names that `Prediction` gives them."""

    entropy: Component
    expected_entropy: Component
    mutual_information: Component
    num_draws: int

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """The means by name, ready for strict JSON."""
        return {
            "entropy": self.entropy.to_dict(),
            "expected_entropy": self.expected_entropy.to_dict(),
            "mutual_information": self.mutual_information.to_dict(),
        }


@dataclass(frozen=True)
class DrawsCurve:
    """The NLL of the averaged predictive against the number of draws that are averaged.

    Attributes:
        sizes: Numbers of draws, (m,).
        nll: Mean over subsets of that size, (m,), nats per example.
        sd: Standard deviation over those subsets, (m,); NaN where there is one subset only, or an infinite NLL.
        num_subsets: How many subsets were averaged, (m,).
    """

    sizes: IntArray
    nll: FloatArray
    sd: FloatArray
    num_subsets: IntArray

    def to_dict(self) -> dict[str, list[float | None]]:
        """Lists ready for JSON: a NaN becomes None."""
        return {
            "sizes": self.sizes.tolist(),
            "nll": self.nll.tolist(),
            "sd": [None if math.isnan(sd) else float(sd) for sd in self.sd],
            "num_subsets": self.num_subsets.tolist(),
        }


def check_draws(draws: ArrayLike) -> FloatArray:
    """The draws as a float64 (S, n, K) array, after every check.

    Raises:
        ValueError: not three axes, one of them empty, or a draw that `check_predictive` refuses; the message names the
            draw and the row.
    """
    values = np.asarray(draws, dtype=np.float64)
    if values.ndim != 3 or 0 in values.shape:
        raise ValueError(
            f"draws must have shape (draws, examples, classes), no axis empty; got {values.shape}. "
            "For a single predictive (n, K) pass log_probabilities[None]."
        )
    labels = np.zeros(values.shape[1], dtype=np.int64)
    for number, draw in enumerate(values):
        try:
            check_predictive(draw, labels)
        except ValueError as error:
            raise ValueError(f"draw {number}: {error}") from None
    return values


# Entropies are formed in probabilities, not logarithms: they need absolute precision only (−p log p → 0 with p), and
# draws that are certain then average to a probability of exactly 1. The NLL below needs logarithms.
def _mean(values: FloatArray) -> FloatArray:
    total = np.zeros(values.shape[1:])
    for draw in values:
        total += np.exp(draw)
    return total / len(values)


def _entropies(values: FloatArray) -> FloatArray:
    """H of each draw, (S, n, K) → (S, n)."""
    return np.stack([entr(np.exp(draw)).sum(axis=-1) for draw in values])


def predictive_entropy(draws: ArrayLike) -> FloatArray:
    """Total uncertainty: the entropy of the mean predictive.

    H[p̄(· | x_n)], p̄ = (1/S) Σ_s p(· | x_n, θ_s).  Shapes: (S, n, K) → (n,), nats in [0, log K].

    Raises:
        ValueError: see `check_draws`.

    Source: Depeweg et al. 2018, sec. 3.
    """
    return entr(_mean(check_draws(draws))).sum(axis=-1)


def expected_entropy(draws: ArrayLike) -> FloatArray:
    """Aleatoric uncertainty: the entropy that is left when the parameters are known, averaged over them.

    (1/S) Σ_s H[p(· | x_n, θ_s)].  Shapes: (S, n, K) → (n,), nats in [0, log K].

    Raises:
        ValueError: see `check_draws`.

    Source: Depeweg et al. 2018, sec. 3.
    """
    return _entropies(check_draws(draws)).mean(axis=0)


def mutual_information(draws: ArrayLike) -> FloatArray:
    """Epistemic uncertainty: what the label would tell about the parameters; the disagreement of the draws.

    I[y; θ | x_n] = H[p̄] − (1/S) Σ_s H[p(· | θ_s)].  Shapes: (S, n, K) → (n,), nats, never below 0. A mean over
    few draws is too close to them, so the value is biased downwards, to first order by
    Σ_k Var_s[p_k] / (2 S p̄_k): compare models at the same S.

    Raises:
        ValueError: see `check_draws`.

    Source: Houlsby et al. 2011, eq. 2; Depeweg et al. 2018, sec. 3.
    """
    values = check_draws(draws)
    return np.maximum(entr(_mean(values)).sum(axis=-1) - _entropies(values).mean(axis=0), 0.0)


def decompose(draws: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0) -> Uncertainty:
    """Total, aleatoric and epistemic uncertainty of every example and on average, with their Monte Carlo errors.

    The expected entropy is a mean over draws: standard error √(Var_s[H_s] / S). The other two are not; they get the
    delete-one jackknife √((S − 1)/S · Σ_s (t_{−s} − t̄)²), where t_{−s} is the statistic without draw s. Errors
    of the means over examples come from the same formulas on the means. One draw shows no error: NaN. Of two draws each
    left alone has mutual information 0, so that its error is NaN below three.

    Shapes: (S, n, K) → see `Uncertainty`.  Units: nats.

    Args:
        draws: log p(k | x_n, θ_s), independent draws.
        num_bootstrap: resamples of the examples, for the intervals of the means.
        seed: of the resampling only; the resamples are those of `calibration.evaluate`.

    Raises:
        ValueError: see `check_draws`, or num_bootstrap < 1.

    Source: Depeweg et al. 2018, sec. 3; Houlsby et al. 2011, eq. 2; Efron & Tibshirani 1993, sec. 11.2 (jackknife).
    """
    values = check_draws(draws)
    size = len(values)
    mean, each = _mean(values), _entropies(values)
    total, aleatoric = entr(mean).sum(axis=-1), each.mean(axis=0)
    columns = np.stack([total, aleatoric, np.maximum(total - aleatoric, 0.0)])
    rows = resamples([len(total)], num_bootstrap=num_bootstrap, seed=seed)
    means = np.concatenate([columns[:, chosen].mean(axis=-1) for (chosen,) in rows], axis=1)
    without = _leave_one_out(values, mean)
    others = (aleatoric * size - each) / max(size - 1, 1)
    return Uncertainty(
        entropy=_component(columns[0], means[0], without, error=_jackknife, least=2),
        expected_entropy=_component(columns[1], means[1], each, error=_standard_error, least=2),
        mutual_information=_component(columns[2], means[2], without - others, error=_jackknife, least=3),
        num_draws=size,
    )


def _component(
    values: FloatArray,
    means: FloatArray,
    by_draw: FloatArray,
    *,
    error: Callable[[FloatArray], FloatArray],
    least: int,
) -> Component:
    """Values (n,), resampled means (B,), and the errors of both from (S, n) if there are at least so many draws."""
    known = len(by_draw) >= least
    return Component(
        values=values,
        errors=error(by_draw) if known else np.full_like(values, np.nan),
        mean=percentile_estimate(float(values.mean()), means),
        mean_error=float(error(by_draw.mean(axis=1))) if known else math.nan,
    )


def _leave_one_out(values: FloatArray, mean: FloatArray) -> FloatArray:
    """The predictive entropy without each draw in turn, (S, n); one draw left out of one gives 0."""
    size = len(values)
    total = mean * size
    # Round-off may leave −1e-17 where a draw held all of the probability.
    left = (np.maximum(total - np.exp(draw), 0.0) / max(size - 1, 1) for draw in values)
    return np.stack([entr(probabilities).sum(axis=-1) for probabilities in left])


def _jackknife(without: FloatArray) -> FloatArray:
    return np.sqrt(len(without) - 1) * without.std(axis=0)


def _standard_error(each: FloatArray) -> FloatArray:
    return each.std(axis=0, ddof=1) / np.sqrt(len(each))


def nll_by_draws(
    draws: ArrayLike, labels: ArrayLike, *, sizes: Sequence[int], num_subsets: int = 20, seed: int = 0
) -> DrawsCurve:
    """The negative log-likelihood of the averaged predictive, as a function of how many draws are averaged.

    For each size m the mean and the standard deviation over subsets M of the S draws of
    −(1/n) Σ_n log (1/m) Σ_{s ∈ M} p(y_n | x_n, θ_s).  Shapes: (S, n, K), (n,), m sizes → see `DrawsCurve`.
    Where there are no more than `num_subsets` subsets, all are taken, and the mean is exact. Subsets share draws: their
    spread is that of m draws while m is far below S, and vanishes as m reaches S. A curve that is flat from m = 1 on
    says that the draws do not differ in anything that matters.

    Args:
        draws: log p(k | x_n, θ_s).
        labels: class numbers.
        sizes: numbers of draws, each in 1 … S.
        num_subsets: random subsets of each size.
        seed: of the subsets only; a size has the same subsets whatever other sizes are asked for.

    Raises:
        ValueError: see `check_draws` and `check_predictive`; no sizes, a size outside 1 … S, num_subsets < 1.
    """
    values = check_draws(draws)
    total = len(values)
    _, targets = check_predictive(logsumexp(values, axis=0) - np.log(total), labels)
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1; got {num_subsets}.")
    wanted = np.asarray(sizes)
    if wanted.ndim != 1 or wanted.size == 0 or not np.issubdtype(wanted.dtype, np.integer):
        raise ValueError(f"sizes must be whole numbers of draws, for example [1, 4, 16]; got {sizes!r}.")
    outside = wanted[(wanted < 1) | (wanted > total)]
    if outside.size:
        raise ValueError(f"size {outside[0]} is outside 1 … {total}, the number of draws. Predict with more draws.")
    observed = values[:, np.arange(len(targets)), targets]
    scores = [_subset_scores(observed, _subsets(total, int(size), num_subsets, seed)) for size in wanted]
    return DrawsCurve(
        sizes=wanted.astype(np.int64),
        nll=np.array([score.mean() for score in scores]),
        sd=np.array([_spread(score) for score in scores]),
        num_subsets=np.array([len(score) for score in scores], dtype=np.int64),
    )


def _subsets(total: int, size: int, num_subsets: int, seed: int) -> IntArray:
    """Rows are subsets: all of them if they are few, else the beginnings of random permutations."""
    if math.comb(total, size) <= num_subsets:
        return np.array(list(itertools.combinations(range(total), size)), dtype=np.int64)
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(total)[:size] for _ in range(num_subsets)])


def _subset_scores(observed: FloatArray, subsets: IntArray) -> FloatArray:
    size = subsets.shape[1]
    return np.array([np.log(size) - logsumexp(observed[subset], axis=0).mean() for subset in subsets])


def _spread(scores: FloatArray) -> float:
    return float(scores.std(ddof=1)) if len(scores) > 1 and np.isfinite(scores).all() else math.nan
