"""How good and how honest a predictive is: accuracy, NLL, Brier score, calibration errors, and their intervals.

Every function takes `log_probabilities (n, K)`, the natural logarithm of the mean predictive
p̄(k | x_n) = (1/S) Σ_s p(k | x_n, θ_s), and integer `labels (n,)`. Logarithms, because a very small probability rounds
to 0 in single precision and then gives an infinite NLL; whoever computed it in log space keeps the true number.
Nothing is clipped: a label of probability 0 has NLL = inf, and so has the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from pyrolora.diagnostics.bootstrap import (
    Estimate,
    FloatArray,
    IntArray,
    Resampled,
    basic_estimate,
    percentile_estimate,
    resamples,
)

NUM_BINS = 15
TOLERANCE = 1e-4


@dataclass(frozen=True)
class ReliabilityCurve:
    """Confidence and accuracy by bin.

    Shapes: edges (M + 1,), the others (M,); an empty bin has count 0, and NaN as its confidence and accuracy.
    """

    edges: FloatArray
    confidence: FloatArray
    accuracy: FloatArray
    count: IntArray

    def to_dict(self) -> dict[str, list[float | None]]:
        """Lists ready for strict JSON: the NaN of an empty bin becomes None."""

        def plain(values: FloatArray) -> list[float | None]:
            return [None if np.isnan(value) else float(value) for value in values]

        return {
            "edges": plain(self.edges),
            "confidence": plain(self.confidence),
            "accuracy": plain(self.accuracy),
            "count": [int(count) for count in self.count],
        }


def check_predictive(log_probabilities: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """The two arguments as float64 (n, K) and int64 (n,) arrays, after every check.

    Raises:
        ValueError: empty input, wrong shapes, NaN, rows whose probabilities do not sum to 1 within 1e-4, labels that
            are not integers in 0 … K − 1. The message names the first offending row.
    """
    values = np.asarray(log_probabilities, dtype=np.float64)
    targets = np.asarray(labels)
    if values.ndim != 2 or values.shape[1] == 0:
        raise ValueError(f"log_probabilities must have shape (examples, classes); got {values.shape}.")
    if values.shape[0] == 0:
        raise ValueError("log_probabilities has no rows: there is nothing to evaluate.")
    if targets.shape != values.shape[:1]:
        raise ValueError(
            f"labels must have shape ({values.shape[0]},), one per row of log_probabilities; got {targets.shape}."
        )
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(
            f"labels must be integers; got dtype {targets.dtype}. Pass class numbers, e.g. labels.astype(int)."
        )
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values).any(axis=1))[0])
        raise ValueError(f"log_probabilities has NaN in row {row}: the prediction failed there; look at that input.")
    with np.errstate(over="ignore"):
        totals = np.exp(logsumexp(values, axis=1))
    wrong = np.flatnonzero(~(np.abs(totals - 1.0) <= TOLERANCE))
    if wrong.size:
        hint = _normalisation_hint(values)
        raise ValueError(
            f"row {wrong[0]} of log_probabilities has probabilities that sum to {totals[wrong[0]]:.6g}, not 1. {hint}"
        )
    outside = np.flatnonzero((targets < 0) | (targets >= values.shape[1]))
    if outside.size:
        raise ValueError(
            f"label {targets[outside[0]]} in row {outside[0]} is outside 0 … {values.shape[1] - 1}. "
            "Leave unlabelled rows out before evaluating."
        )
    return values, targets.astype(np.int64)


def _normalisation_hint(values: FloatArray) -> str:
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1.0, atol=TOLERANCE):
        return "These are probabilities: pass their natural logarithm."
    return "These may be logits: pass scipy.special.log_softmax(logits, axis=-1)."


@dataclass(frozen=True)
class _Examples:
    """What each metric needs of each example; all shapes (..., n), leading axes are bootstrap resamples."""

    surprise: FloatArray  # −log p̄(y_n)
    brier: FloatArray
    confidence: FloatArray
    correct: FloatArray
    by_class: FloatArray  # p̄(k), (K, ..., n)
    is_class: FloatArray  # 1{y_n = k}, (K, ..., n)

    @classmethod
    def of(cls, log_probabilities: ArrayLike, labels: ArrayLike) -> _Examples:
        values, targets = check_predictive(log_probabilities, labels)
        probabilities = np.exp(values)
        observed = values[np.arange(len(targets)), targets]
        # Σ_k (p_k − 1{k = y})² = Σ_k p_k² − 2 p_y + 1
        brier = np.square(probabilities).sum(axis=1) - 2.0 * np.exp(observed) + 1.0
        correct = (values.argmax(axis=1) == targets).astype(np.float64)
        is_class = (targets == np.arange(values.shape[1])[:, None]).astype(np.float64)
        return cls(0.0 - observed, brier, probabilities.max(axis=1), correct, probabilities.T, is_class)

    def take(self, rows: IntArray) -> _Examples:
        columns = (column[..., rows] for column in vars(self).values())
        return _Examples(*columns)


def _accuracy(examples: _Examples) -> FloatArray:
    return examples.correct.mean(axis=-1)


def _nll(examples: _Examples) -> FloatArray:
    return examples.surprise.mean(axis=-1)


def _brier(examples: _Examples) -> FloatArray:
    return examples.brier.mean(axis=-1)


def _equal_width(confidence: FloatArray, num_bins: int) -> IntArray:
    # Guo et al. 2017: bins (a, b], closed on the right, so that confidence 1 needs no special case.
    inner = np.linspace(0.0, 1.0, num_bins + 1)[1:-1]
    return np.searchsorted(inner, confidence, side="left")


def _equal_mass(confidence: FloatArray, num_bins: int) -> IntArray:
    """Bin numbers of equal mass along the last axis."""
    # Equal confidences all go to the bin of the first of them, so that the order of the rows cannot matter.
    n = confidence.shape[-1]
    order = np.argsort(confidence, axis=-1, kind="stable")
    ranked = np.take_along_axis(confidence, order, axis=-1)
    position = np.broadcast_to(np.arange(n), ranked.shape)
    fresh = np.concatenate([np.ones_like(ranked[..., :1], dtype=bool), ranked[..., 1:] != ranked[..., :-1]], axis=-1)
    first = np.maximum.accumulate(np.where(fresh, position, 0), axis=-1)
    bins = np.empty_like(order)
    np.put_along_axis(bins, order, first * num_bins // n, axis=-1)
    return bins


def bin_sums(bins: IntArray, weights: FloatArray, num_bins: int) -> FloatArray:
    """Σ of weights in each bin, bin numbers and weights (..., n) → (..., num_bins)."""
    lead = bins.shape[:-1]
    rows = int(np.prod(lead, dtype=int))
    offset = np.arange(rows).reshape(*lead, 1) * num_bins
    sums = np.bincount((bins + offset).ravel(), weights.ravel(), minlength=rows * num_bins)
    return sums.reshape(*lead, num_bins).astype(np.float64)


def _mean_gap(happened: FloatArray, claimed: FloatArray, bins: IntArray, num_bins: int) -> FloatArray:
    # Σ_m (n_m / n) |acc_m − conf_m| needs no division by n_m, so an empty bin contributes 0 by itself.
    return np.abs(bin_sums(bins, happened - claimed, num_bins)).sum(axis=-1) / bins.shape[-1]


def _ece(examples: _Examples, num_bins: int = NUM_BINS) -> FloatArray:
    bins = _equal_width(examples.confidence, num_bins)
    return _mean_gap(examples.correct, examples.confidence, bins, num_bins)


def _adaptive_ece(examples: _Examples, num_bins: int = NUM_BINS) -> FloatArray:
    bins = _equal_mass(examples.confidence, num_bins)
    return _mean_gap(examples.correct, examples.confidence, bins, num_bins)


def _classwise_ece(examples: _Examples, num_bins: int = NUM_BINS) -> FloatArray:
    bins = _equal_width(examples.by_class, num_bins)
    return _mean_gap(examples.is_class, examples.by_class, bins, num_bins).mean(axis=0)


def _mce(examples: _Examples, num_bins: int = NUM_BINS) -> FloatArray:
    bins = _equal_width(examples.confidence, num_bins)
    gaps = bin_sums(bins, examples.correct - examples.confidence, num_bins)
    counts = bin_sums(bins, np.ones_like(examples.confidence), num_bins)
    return (np.abs(gaps) / np.maximum(counts, 1.0)).max(axis=-1)


def _check_bins(num_bins: int) -> int:
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1; got {num_bins}.")
    return num_bins


def accuracy(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The share of examples whose most probable class is the label; of tied classes the first is taken.

    (1/n) Σ_n 1{argmax_k p̄(k | x_n) = y_n}.  Shapes: (n, K), (n,) → scalar in [0, 1].

    Raises:
        ValueError: see `check_predictive`.
    """
    return float(_accuracy(_Examples.of(log_probabilities, labels)))


def negative_log_likelihood(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The negative log-likelihood of the mixture, in nats per example; inf if a label had probability 0.

    −(1/n) Σ_n log p̄(y_n | x_n).  Shapes: (n, K), (n,) → scalar ≥ 0.

    Raises:
        ValueError: see `check_predictive`.
    """
    return float(_nll(_Examples.of(log_probabilities, labels)))


def brier_score(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The multi-class Brier score: squared distance to the one-hot label, summed over classes, averaged over examples.

    (1/n) Σ_n Σ_k (p̄(k | x_n) − 1{k = y_n})².  Shapes: (n, K), (n,) → scalar in [0, 2]; for K = 2 this is
    twice the score that looks at one class only. Source: Brier 1950, eq. 2.

    Raises:
        ValueError: see `check_predictive`.
    """
    return float(_brier(_Examples.of(log_probabilities, labels)))


def expected_calibration_error(log_probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """The expected calibration error of the top class over equal-width bins of confidence.

    Σ_m (n_m / n) |acc_m − conf_m|, bins ((m − 1)/M, m/M].  Shapes: (n, K), (n,) → scalar in [0, 1]. The estimate is
    biased upwards, because sampling noise in a bin counts as miscalibration: simulated, a calibrated predictor
    of two classes scores 0.05 on 300 examples and 0.03 on 1000. Source: Guo et al. 2017, eq. 3.

    Raises:
        ValueError: see `check_predictive`, or num_bins < 1.
    """
    return float(_ece(_Examples.of(log_probabilities, labels), _check_bins(num_bins)))


def adaptive_calibration_error(log_probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """The expected calibration error of the top class over bins that hold equally many examples.

    Σ_m (n_m / n) |acc_m − conf_m|, example of rank i (from 0) in bin ⌊i M / n⌋; equal confidences stay together.
    Shapes: (n, K), (n,) → scalar in [0, 1].  Source: Nguyen & O'Connor 2015, sec. 3.

    Raises:
        ValueError: see `check_predictive`, or num_bins < 1.
    """
    return float(_adaptive_ece(_Examples.of(log_probabilities, labels), _check_bins(num_bins)))


def classwise_calibration_error(log_probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """The expected calibration error of each class's own probability, averaged over classes.

    (1/K) Σ_k Σ_m (n_mk / n) |share of label k in bin − mean p̄(k) in bin|, equal-width bins of p̄(k) closed on the
    right.  Shapes: (n, K), (n,) → scalar in [0, 1]. It sees errors in probabilities that are not the largest, and is
    biased upwards as the ECE is.  Source: Kull et al. 2019, sec. 2.

    Raises:
        ValueError: see `check_predictive`, or num_bins < 1.
    """
    return float(_classwise_ece(_Examples.of(log_probabilities, labels), _check_bins(num_bins)))


def maximum_calibration_error(log_probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """The largest gap between accuracy and confidence of any non-empty equal-width bin.

    max_m |acc_m − conf_m|.  Shapes: (n, K), (n,) → scalar in [0, 1]. One lonely example can decide it: read it beside
    the counts. Source: Guo et al. 2017, eq. 5.

    Raises:
        ValueError: see `check_predictive`, or num_bins < 1.
    """
    return float(_mce(_Examples.of(log_probabilities, labels), _check_bins(num_bins)))


METRICS: dict[str, Callable[[ArrayLike, ArrayLike], float]] = {
    "accuracy": accuracy,
    "nll": negative_log_likelihood,
    "brier": brier_score,
    "ece": expected_calibration_error,
    "adaptive_ece": adaptive_calibration_error,
    "mce": maximum_calibration_error,
    "classwise_ece": classwise_calibration_error,
}
"""The metrics by the short names that tables and result files use."""

_REDUCTIONS: dict[str, Callable[[_Examples], FloatArray]] = {
    "accuracy": _accuracy,
    "nll": _nll,
    "brier": _brier,
    "ece": _ece,
    "adaptive_ece": _adaptive_ece,
    "mce": _mce,
    "classwise_ece": _classwise_ece,
}
_CALIBRATION_ERRORS = frozenset({"ece", "adaptive_ece", "mce", "classwise_ece"})


def evaluate(
    log_probabilities: ArrayLike, labels: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Estimate]:
    """Every metric of `METRICS` with a 95 % bootstrap interval over examples, all from the same resamples.

    Accuracy, NLL and Brier score are means: percentile interval [q.025, q.975] of the resampled values. Calibration
    errors add up absolute gaps, so resampling noise pushes every resampled value up, on top of the upward bias that
    the estimate has already, and a percentile interval sits above the truth: simulated with 300 and 1000 examples it
    covered the true ECE in 70 to 93 % of cases for miscalibrated predictors and never for a perfect one. They get the
    basic interval [2v − q.975, 2v − q.025], cut at 0, which covered it in 88 to 94 % and in about 70 %. It corrects
    for the bias that binning brings and may therefore lie partly or wholly below `value`. The class-wise error averages
    the noise of its classes away and keeps their bias: covered in 87 to 94 % of cases for miscalibrated predictors, in
    about half of them or fewer for a perfect one, whose interval lies above the truth.

    Shapes: (n, K), (n,) → one `Estimate` per metric. The same seed gives the same resamples for the same n.

    Args:
        log_probabilities: natural logarithms of the mean predictive.
        labels: class numbers.
        num_bootstrap: resamples; below about 200 the interval's ends are rough.
        seed: of the resampling only.

    Raises:
        ValueError: see `check_predictive`, or num_bootstrap < 1.

    Source: Davison & Hinkley 1997, sec. 5.2 (basic) and 5.3 (percentile).
    """
    found = resampled(log_probabilities, labels, num_bootstrap=num_bootstrap, seed=seed)
    return {name: interval(name)(each.value, each.samples) for name, each in found.items()}


def interval(metric: str) -> Callable[[float, ArrayLike], Estimate]:
    """The kind of interval that a metric gets: basic for calibration errors, else percentile; see `evaluate`."""
    return basic_estimate if metric in _CALIBRATION_ERRORS else percentile_estimate


def resampled(
    log_probabilities: ArrayLike, labels: ArrayLike, *, num_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Resampled]:
    """Every metric of `METRICS` on the examples and on each resample of them, for intervals and paired differences.

    Shapes: (n, K), (n,) → one `Resampled` per metric.

    Raises:
        ValueError: see `check_predictive`, or num_bootstrap < 1.
    """
    examples = _Examples.of(log_probabilities, labels)
    num_classes, n = examples.by_class.shape
    rows = resamples([n], num_bootstrap=num_bootstrap, seed=seed, columns=num_classes)
    samples: dict[str, list[FloatArray]] = {name: [] for name in _REDUCTIONS}
    for (chosen,) in rows:
        sample = examples.take(chosen)
        for name, reduction in _REDUCTIONS.items():
            samples[name].append(reduction(sample))
    return {
        name: Resampled(float(reduction(examples)), np.concatenate(samples[name]))
        for name, reduction in _REDUCTIONS.items()
    }


def reliability_curve(log_probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = NUM_BINS) -> ReliabilityCurve:
    """Mean confidence, accuracy and number of examples in each equal-width bin of top-class confidence.

    conf_m = mean of max_k p̄, acc_m = share correct, bins ((m − 1)/M, m/M]; Σ (n_m / n) |acc_m − conf_m|
    is the ECE.  Shapes: (n, K), (n,) → see `ReliabilityCurve`.  Source: Guo et al. 2017, sec. 2.

    Raises:
        ValueError: see `check_predictive`, or num_bins < 1.
    """
    examples = _Examples.of(log_probabilities, labels)
    bins = _equal_width(examples.confidence, _check_bins(num_bins))
    count = bin_sums(bins, np.ones_like(examples.confidence), num_bins)
    with np.errstate(invalid="ignore"):
        confidence = bin_sums(bins, examples.confidence, num_bins) / count
        correct = bin_sums(bins, examples.correct, num_bins) / count
    return ReliabilityCurve(np.linspace(0.0, 1.0, num_bins + 1), confidence, correct, count.astype(np.int64))
