"""Whether uncertainty tells inputs of another distribution from those of the task.

A score is a number for each input that is larger the more the input looks foreign. `inside (n,)` are the scores of
in-distribution inputs, `outside (m,)` those of out-of-distribution inputs. Metrics depend on the order of the scores
only; equal scores count as one threshold, so that no metric depends on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pyrolora.diagnostics.bootstrap import Estimate, FloatArray, IntArray, percentile_estimate, resamples
from pyrolora.diagnostics.calibration import bin_sums
from pyrolora.diagnostics.uncertainty import check_draws, mutual_information, predictive_entropy

TPR = 0.95


@dataclass(frozen=True)
class _Counts:
    """How many of each kind have each distinct score, ascending; shapes (..., G), leading axes are resamples."""

    inside: FloatArray
    outside: FloatArray


@dataclass(frozen=True)
class _Scored:
    """Two groups of inputs as numbers of their distinct scores, ascending from 0 to G − 1."""

    inside: IntArray
    outside: IntArray
    num_groups: int

    @classmethod
    def of(cls, inside: ArrayLike, outside: ArrayLike) -> _Scored:
        first, second = _check_scores(inside, "inside"), _check_scores(outside, "outside")
        distinct, numbers = np.unique(np.concatenate([first, second]), return_inverse=True)
        return cls(numbers[: len(first)], numbers[len(first) :], len(distinct))

    def counts(self) -> _Counts:
        return self._count(self.inside, self.outside)

    def resampled(self, inside: IntArray, outside: IntArray) -> _Counts:
        return self._count(self.inside[inside], self.outside[outside])

    def _count(self, inside: IntArray, outside: IntArray) -> _Counts:
        first, second = (bin_sums(rows, np.ones(rows.shape), self.num_groups) for rows in (inside, outside))
        return _Counts(first, second)


def _check_scores(scores: ArrayLike, name: str) -> FloatArray:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"{name} must have one score for each input, shape (inputs,); got {values.shape}.")
    if values.size == 0:
        raise ValueError(f"{name} has no scores: with one kind of input only there is nothing to tell apart.")
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise ValueError(f"{name} has NaN in row {row}: the prediction failed there; look at that input.")
    return values


def _auroc(counts: _Counts) -> FloatArray:
    below = counts.inside.cumsum(axis=-1) - counts.inside
    pairs = counts.inside.sum(axis=-1) * counts.outside.sum(axis=-1)
    return (counts.outside * (below + counts.inside / 2)).sum(axis=-1) / pairs


def _average_precision(positive: FloatArray, negative: FloatArray) -> FloatArray:
    """Both (..., G), the scores that look most positive first."""
    found = positive.cumsum(axis=-1)
    # A resample may hold nothing up to some score; it has found no positive there either.
    precision = found / np.maximum(found + negative.cumsum(axis=-1), 1.0)
    return (precision * positive).sum(axis=-1) / found[..., -1]


def _aupr_out(counts: _Counts) -> FloatArray:
    return _average_precision(counts.outside[..., ::-1], counts.inside[..., ::-1])


def _aupr_in(counts: _Counts) -> FloatArray:
    return _average_precision(counts.inside, counts.outside)


def _fpr(counts: _Counts, tpr: float = TPR) -> FloatArray:
    accepted = counts.inside.cumsum(axis=-1)
    enough = (accepted / accepted[..., -1:] >= tpr).argmax(axis=-1)[..., None]
    mistaken = counts.outside.cumsum(axis=-1)
    return np.take_along_axis(mistaken, enough, axis=-1)[..., 0] / mistaken[..., -1]


def auroc(inside: ArrayLike, outside: ArrayLike) -> float:
    """The area under the ROC curve: how often a foreign input scores higher than one of the task's, ties counting half.

    P(s_out > s_in) + ½ P(s_out = s_in) over all pairs.  Shapes: (n,), (m,) → scalar in [0, 1]; ½ is chance, below
    it the foreign inputs look more familiar than the task's own.

    Raises:
        ValueError: either group is empty (the area is undefined), is not one-dimensional, or has NaN; the row is named.

    Source: Hanley & McNeil 1982.
    """
    return float(_auroc(_Scored.of(inside, outside).counts()))


def aupr_out(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision in finding the foreign inputs, highest scores first.

    Σ_t (R_t − R_{t−1}) P_t over the distinct scores t, descending; R recall and P precision of "out".
    Shapes: (n,), (m,) → scalar in (0, 1]; chance is the share of foreign inputs m/(n + m), so numbers compare only at
    equal shares. No interpolation between thresholds.

    Raises:
        ValueError: as `auroc`.

    Source: Hendrycks & Gimpel 2017, sec. 2; Davis & Goadrich 2006 on interpolation.
    """
    return float(_aupr_out(_Scored.of(inside, outside).counts()))


def aupr_in(inside: ArrayLike, outside: ArrayLike) -> float:
    """Average precision in finding the task's own inputs, lowest scores first.

    As `aupr_out` with "in" as the positive kind and the order reversed.  Shapes: (n,), (m,) → scalar in (0, 1];
    chance is n/(n + m).

    Raises:
        ValueError: as `auroc`.

    Source: Hendrycks & Gimpel 2017, sec. 2.
    """
    return float(_aupr_in(_Scored.of(inside, outside).counts()))


def fpr_at_tpr(inside: ArrayLike, outside: ArrayLike, *, tpr: float = TPR) -> float:
    """The share of foreign inputs taken for the task's own when 95 % of the task's own are accepted.

    An input is accepted if s ≤ t, with t the smallest score for which at least `tpr` of `inside` are; returns
    P(s_out ≤ t).  Shapes: (n,), (m,) → scalar in [0, 1], lower is better. "In" is the positive kind; for the
    other convention (foreign inputs are to be found) call `fpr_at_tpr(-outside, -inside)`.

    Raises:
        ValueError: as `auroc`, or tpr not in (0, 1].

    Source: Liang et al. 2018, sec. 4.
    """
    if not 0.0 < tpr <= 1.0:
        raise ValueError(f"tpr must be above 0 and at most 1; got {tpr}.")
    return float(_fpr(_Scored.of(inside, outside).counts(), tpr))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "auroc": auroc,
    "aupr_out": aupr_out,
    "aupr_in": aupr_in,
    "fpr95": fpr_at_tpr,
}
"""The metrics by the short names that tables and result files use."""

_REDUCTIONS: dict[str, Callable[[_Counts], FloatArray]] = {
    "auroc": _auroc,
    "aupr_out": _aupr_out,
    "aupr_in": _aupr_in,
    "fpr95": _fpr,
}


def separation(
    inside: ArrayLike, outside: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric of `METRICS` for one score, with 95 % percentile intervals, all from the same resamples.

    The two groups are resampled apart, because how many inputs of each kind there are was chosen, not observed.
    Shapes: (n,), (m,) → one `Estimate` per metric. The same seed gives the same resamples for the same n and m.

    Args:
        inside: scores of in-distribution inputs; a larger score looks more foreign.
        outside: scores of out-of-distribution inputs.
        num_bootstrap: resamples; below about 200 the interval's ends are rough.
        seed: of the resampling only.

    Raises:
        ValueError: as `auroc`, or num_bootstrap < 1.

    Source: Davison & Hinkley 1997, sec. 3.2 (several samples) and 5.3 (percentile).
    """
    scored = _Scored.of(inside, outside)
    sizes = [len(scored.inside), len(scored.outside)]
    samples: dict[str, list[FloatArray]] = {name: [] for name in _REDUCTIONS}
    for first, second in resamples(sizes, num_bootstrap=num_bootstrap, seed=seed):
        counts = scored.resampled(first, second)
        for name, reduction in _REDUCTIONS.items():
            samples[name].append(reduction(counts))
    counts = scored.counts()
    return {
        name: percentile_estimate(float(reduction(counts)), np.concatenate(samples[name]))
        for name, reduction in _REDUCTIONS.items()
    }


def scores(draws: ArrayLike) -> dict[str, FloatArray]:
    """Three scores of each input, larger for what looks more foreign.

    max_probability: 1 − max_k p̄(k);  entropy: H[p̄], nats;  mutual_information: I[y; θ | x], nats.
    Shapes: log p(k | x_n, θ_s), (S, n, K) → (n,) each. With two classes the first two have the same order.

    Raises:
        ValueError: see `check_draws`.

    Source: Hendrycks & Gimpel 2017; Houlsby et al. 2011.
    """
    values = check_draws(draws)
    return {
        "max_probability": 1.0 - np.exp(values).mean(axis=0).max(axis=-1),
        "entropy": predictive_entropy(values),
        "mutual_information": mutual_information(values),
    }


def evaluate_ood(
    inside: ArrayLike, outside: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, dict[str, Estimate]]:
    """How well each of `scores` separates foreign inputs from the task's own: score → metric → estimate.

    Shapes: draws (S, n, K) of in-distribution and (S, m, K) of out-of-distribution inputs, from the same posterior.
    All scores are judged on the same resamples. A single draw has mutual information 0 everywhere: chance. For any
    other score, or where the draws were not kept, use `separation`.

    Args:
        inside: log p(k | x_n, θ_s) of in-distribution inputs.
        outside: the same of out-of-distribution inputs.
        num_bootstrap: resamples.
        seed: of the resampling only.

    Raises:
        ValueError: see `check_draws` and `separation`; numbers of draws or of classes differ, which shifts entropies
            and the bias of the mutual information.
    """
    groups = {"inside": inside, "outside": outside}
    values = {}
    for name, draws in groups.items():
        try:
            values[name] = check_draws(draws)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    shapes = {name: value.shape for name, value in values.items()}
    if shapes["inside"][::2] != shapes["outside"][::2]:
        raise ValueError(
            f"inside {shapes['inside']} and outside {shapes['outside']} must agree in draws and classes: "
            "predict both with the same posterior and the same num_draws."
        )
    first, second = scores(values["inside"]), scores(values["outside"])
    return {name: separation(first[name], second[name], num_bootstrap=num_bootstrap, seed=seed) for name in first}
