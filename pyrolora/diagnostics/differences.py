"""Differences between two methods on the same examples: which are real, and which may be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from pyrolora.diagnostics.bootstrap import TAILS, FloatArray, Resampled


@dataclass(frozen=True)
class Difference:
    """A metric of one method minus that of another, and a 95 % interval; NaN where a value is infinite or missing.

    Attributes:
        value: Mean over seeds, in the units of the metric.
        low, high: The interval, over examples and, where there are several seeds, over these too.
        sd: Standard deviation of the difference over seeds; NaN for one seed.
        num_seeds: How many differences were averaged.
    """

    value: float
    low: float
    high: float
    sd: float
    num_seeds: int

    @property
    def real(self) -> bool:
        """Whether the interval leaves out 0. One in twenty does so by chance where nothing differs."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | int | bool | None]:
        """By name, ready for strict JSON: what is not finite becomes None."""
        numbers = {"value": self.value, "low": self.low, "high": self.high, "sd": self.sd}
        plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {**plain, "num_seeds": self.num_seeds, "real": self.real}


def difference(ours: Mapping[int, Resampled], theirs: Mapping[int, Resampled]) -> Difference:
    """The difference of one metric between two methods, each fitted with one seed or several.

    d = mean over seeds of (ours − theirs), on the same examples and, resample by resample, on the same resamples:
    what makes an example hard for both cancels. Of two sources of chance each has its variance: V, of d over resamples
    of the examples, seeds held fixed; s²/K, of the K seeds' own differences, examples held fixed. The interval is

        (d − b) ± t_ν √(V + s²/K),   ν = (V + s²/K)² / ((s²/K)² / (K − 1)),

    with b the mean over resamples minus d: the part of the bias of a calibration error that does not cancel. Both
    variances contain what a seed does to single examples, so that the interval is a little too wide rather than too
    narrow. With one seed it is about these two fits, and silent about a repetition.

    Simulated with 300 examples, it held the true difference of accuracy, NLL or Brier score in 91 to 95 % of cases, and
    that of the ECE in 96 to 99 % where both methods are equally or clearly miscalibrated. Where one of them is almost
    calibrated, more of the ECE's bias stays than is taken off: the interval lies too close to 0 (81 % held) and errs
    towards "undecided".

    Args:
        ours: Seed → metric on the examples and their resamples, see `calibration.resampled`.
        theirs: The same of the other method. Common seeds are compared seed by seed; methods without a common seed by
            their means, with a variance for each.

    Raises:
        ValueError: A method without seeds, or other resamples.

    Source: Davison & Hinkley 1997, sec. 5.2 (normal interval with bias correction); Satterthwaite 1946 for ν.
    """
    if not ours or not theirs:
        raise ValueError("a difference needs at least one seed of each method")
    if len({len(each.samples) for method in (ours, theirs) for each in method.values()}) > 1:
        raise ValueError("the methods have different numbers of resamples: use the same num_bootstrap for all")
    common = sorted(ours.keys() & theirs.keys())
    groups = [[_minus(ours[seed], theirs[seed]) for seed in common]]
    if not common:
        nothing = Resampled(0.0, np.zeros(1))
        groups = [list(ours.values()), [_minus(nothing, each) for each in theirs.values()]]
    values = [np.array([each.value for each in group]) for group in groups]
    samples = sum(np.mean([each.samples for each in group], axis=0) for group in groups)
    value, count = float(sum(group.mean() for group in values)), max(map(len, values))
    if not (math.isfinite(value) and np.isfinite(samples).all()):
        return Difference(value, math.nan, math.nan, math.nan, count)
    sd = float(values[0].std(ddof=1)) if common and count > 1 else math.nan
    low, high = _interval(value, np.asarray(samples), values)
    return Difference(value, low, high, sd, count)


def _minus(first: Resampled, second: Resampled) -> Resampled:
    with np.errstate(invalid="ignore"):  # inf − inf
        return Resampled(first.value - second.value, first.samples - second.samples)


def _interval(value: float, samples: FloatArray, groups: Sequence[FloatArray]) -> tuple[float, float]:
    by_seed = [(group.var(ddof=1) / len(group), len(group) - 1) for group in groups if len(group) > 1]
    seeds = sum(variance for variance, _ in by_seed)
    total = float(samples.var()) + seeds
    # Without a variance between seeds ν is infinite, and t the Normal.
    doubt = sum(variance**2 / freedom for variance, freedom in by_seed)
    half = float(student.ppf(TAILS[1], total**2 / doubt if doubt > 0 else np.inf)) * math.sqrt(total)
    centre = 2 * value - float(samples.mean())
    return centre - half, centre + half


Resamples = Mapping[bool, Mapping[str, Resampled]]
"""Of one fit: whether its predictive is temperature-scaled → metric → values on the common resamples."""


@dataclass(frozen=True)
class Contrast:
    """One predictive against one of the baseline, metric by metric: method minus baseline.

    Attributes:
        method, baseline: Names.
        scaled, baseline_scaled: Whether each is temperature-scaled.
        metrics: Metric → difference.
    """

    method: str
    scaled: bool
    baseline: str
    baseline_scaled: bool
    metrics: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """By name, ready for strict JSON."""
        return {**vars(self), "metrics": {name: found.to_dict() for name, found in self.metrics.items()}}


def contrasts(fits: Mapping[str, Mapping[int, Resamples]], *, baseline: str) -> list[Contrast]:
    """Every method against the baseline: both as fitted, then against the scaled baseline as fitted and scaled.

    A baseline that is scaled costs a validation split and one number, so a posterior is worth its price where it beats
    that. The baseline itself appears once, scaled against as fitted.

    Args:
        fits: Method → seed → resampled metrics; predictives that some seed of a method lacks are left out.
        baseline: One of the methods; without it there are no contrasts.
    """
    found = []
    for method in fits:
        pairs = [(True, False)] if method == baseline else [(False, False), (False, True), (True, True)]
        for scaled, other in pairs if baseline in fits else []:
            ours, theirs = fits[method], fits[baseline]
            if all(scaled in fit for fit in ours.values()) and all(other in fit for fit in theirs.values()):
                metrics = _by_metric(ours, theirs, scaled=scaled, other=other)
                found.append(Contrast(method, scaled, baseline, other, metrics))
    return found


def _by_metric(
    ours: Mapping[int, Resamples], theirs: Mapping[int, Resamples], *, scaled: bool, other: bool
) -> dict[str, Difference]:
    names = next(iter(ours.values()))[scaled]
    return {
        name: difference(
            {seed: fit[scaled][name] for seed, fit in ours.items()},
            {seed: fit[other][name] for seed, fit in theirs.items()},
        )
        for name in names
    }
