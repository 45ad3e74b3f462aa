from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import norm, t, ttest_rel

from pyrolora.diagnostics.bootstrap import Resampled, resamples
from pyrolora.diagnostics.calibration import METRICS, resampled
from pyrolora.diagnostics.differences import difference


def world(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a world (n, 3), and labels that they give."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (n, 3))
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(1)


def say(logits: np.ndarray, sharpness: float, *, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A predictor that knows the logits, sharpens them, and is off by noise that belongs to its seed."""
    shift = np.random.default_rng(seed).normal(0, noise, logits.shape[1])
    return log_softmax(sharpness * logits + shift, axis=1)


def nll(values: np.ndarray, labels: np.ndarray) -> Resampled:
    """The NLL and its resampled values alone; `resampled` makes those of every metric."""
    surprise = -values[np.arange(len(labels)), labels]
    ((rows,),) = resamples([len(labels)], num_bootstrap=100, seed=0)
    return Resampled(float(surprise.mean()), surprise[rows].mean(axis=1))


def test_one_seed_against_the_paired_t_test() -> None:
    """Law: for a mean over examples the interval is that of the paired t-test, up to the bootstrap's noise."""
    logits, labels = world(400, 1)
    rows = np.arange(400)
    first, second = say(logits, 2.0), say(logits, 1.0)
    found = difference(
        {0: resampled(first, labels, num_bootstrap=4000)["nll"]},
        {0: resampled(second, labels, num_bootstrap=4000)["nll"]},
    )
    theirs = ttest_rel(-first[rows, labels], -second[rows, labels]).confidence_interval(0.95)
    assert found.value == pytest.approx(METRICS["nll"](first, labels) - METRICS["nll"](second, labels))
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.05 * (theirs.high - theirs.low))
    assert math.isnan(found.sd) and found.num_seeds == 1


def test_pairing_is_what_makes_it_sharp() -> None:
    """Law: the paired interval is much shorter than two intervals side by side, which would overlap here."""
    logits, labels = world(300, 2)
    both = [resampled(say(logits, s), labels, num_bootstrap=400)["nll"] for s in (1.7, 1.0)]
    found = difference({0: both[0]}, {0: both[1]})
    alone = sum(1.96 * each.samples.std() for each in both)
    assert found.real and abs(found.value) < alone
    assert found.high - found.low < alone


def test_without_examples_noise_it_is_the_t_interval_over_seeds() -> None:
    """Law: where every example counts the same, the interval is Student's over the seeds' differences."""
    ours = {seed: Resampled(value, np.full(50, value)) for seed, value in enumerate((0.5, 0.8, 0.6))}
    theirs = {seed: Resampled(value, np.full(50, value)) for seed, value in enumerate((0.4, 0.6, 0.5))}
    found = difference(ours, theirs)
    gaps = np.array([0.1, 0.2, 0.1])
    low, high = t.interval(0.95, 2, gaps.mean(), gaps.std(ddof=1) / math.sqrt(3))
    assert (found.value, found.low, found.high) == pytest.approx((gaps.mean(), low, high))
    assert found.sd == pytest.approx(gaps.std(ddof=1)) and found.num_seeds == 3


def test_other_seeds_are_compared_by_their_means() -> None:
    """Law: without a common seed the interval is Welch's; with some in common only those count."""
    first, second = np.array([0.5, 0.8, 0.6]), np.array([0.2, 0.3])
    ours = {seed: Resampled(value, np.full(9, value)) for seed, value in zip((0, 1, 2), first, strict=True)}
    theirs = {seed: Resampled(value, np.full(9, value)) for seed, value in zip((7, 8), second, strict=True)}
    found = difference(ours, theirs)
    parts = [first.var(ddof=1) / 3, second.var(ddof=1) / 2]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    low, high = t.interval(0.95, freedom, first.mean() - second.mean(), math.sqrt(sum(parts)))
    assert (found.value, found.low, found.high) == pytest.approx((first.mean() - second.mean(), low, high))
    assert math.isnan(found.sd)
    assert difference(ours, {**theirs, 1: ours[0]}) == difference({1: ours[1]}, {1: ours[0]})


@pytest.mark.parametrize(("metric", "sharp"), [("nll", 1.0), ("accuracy", 1.0), ("ece", 2.0)])
def test_intervals_hold_the_truth(metric: str, sharp: float) -> None:
    """Law: over 60 worlds the interval of one pair of predictors holds the population's difference in 50 or more."""

    def both(logits: np.ndarray) -> list[np.ndarray]:
        return [say(logits, 3.0), say(logits, sharp, noise=0.3)]

    logits, labels = world(100_000, 99)
    first, second = (METRICS[metric](values, labels) for values in both(logits))
    held = 0
    for seed in range(60):
        logits, labels = world(300, seed)
        ours, theirs = ({0: resampled(values, labels, num_bootstrap=60)[metric]} for values in both(logits))
        found = difference(ours, theirs)
        held += found.low <= first - second <= found.high
    assert held >= 50


def test_equals_are_seldom_called_different() -> None:
    """Law: two predictors that are equally wrong in different ways differ "really" in at most 6 of 60 worlds."""
    real = dict.fromkeys(("nll", "ece"), 0)
    for seed in range(60):
        logits, labels = world(300, seed)
        tilts = (np.array([1.0, 1.0, 0.5]), np.array([0.5, 1.0, 1.0]))
        ours, theirs = (resampled(say(logits * tilt, 2.0), labels, num_bootstrap=60) for tilt in tilts)
        for metric in real:
            real[metric] += difference({0: ours[metric]}, {0: theirs[metric]}).real
    assert max(real.values()) <= 6, real


def test_intervals_over_seeds_hold_the_truth() -> None:
    """Law: with noise of the seeds, three seeds cover the difference of the means over all seeds; examples' noise
    alone, which is what one seed can know, does not."""
    logits, labels = world(20_000, 99)
    spread = [METRICS["nll"](say(logits, 1.0, noise=0.8, seed=s), labels) for s in range(300)]
    truth = np.mean(spread) - METRICS["nll"](say(logits, 1.0), labels)
    three = one = 0
    for trial in range(60):
        x, y = world(150, trial)
        base = nll(say(x, 1.0), y)
        seeds = range(3 * trial, 3 * trial + 3)
        ours = {s: nll(say(x, 1.0, noise=0.8, seed=s), y) for s in seeds}
        whole = difference(ours, dict.fromkeys(seeds, base))
        single = difference({seeds[0]: ours[seeds[0]]}, {seeds[0]: base})
        three += whole.low <= truth <= whole.high
        one += single.low <= truth <= single.high
    assert three >= 50
    assert one <= 45


def test_a_method_does_not_differ_from_itself() -> None:
    """Law: the same predictions give exactly 0 and nothing real; swapping the methods swaps the signs."""
    logits, labels = world(100, 3)
    one, two = (resampled(say(logits, s), labels, num_bootstrap=50)["ece"] for s in (1.0, 3.0))
    same = difference({0: one}, {0: one})
    assert (same.value, same.low, same.high, same.real) == (0.0, 0.0, 0.0, False)
    there, back = difference({0: two}, {0: one}), difference({0: one}, {0: two})
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.real == back.real


def test_the_bias_that_does_not_cancel_is_taken_off() -> None:
    """Law: the interval is centred at d − b, half as wide as 1.96 standard deviations of the resampled difference."""
    samples = np.random.default_rng(0).normal(0.3, 0.1, 5000)
    found = difference({4: Resampled(0.2, samples)}, {4: Resampled(0.0, np.zeros(5000))})
    assert (found.low + found.high) / 2 == pytest.approx(0.2 - (samples.mean() - 0.2))
    assert (found.high - found.low) / 2 == pytest.approx(norm.ppf(0.975) * samples.std())


def test_infinite_values_have_no_interval() -> None:
    """Law: infinity on one side or both gives no interval, nothing real, and strict JSON."""
    inf = Resampled(math.inf, np.array([0.5, math.inf]))
    finite = Resampled(0.4, np.array([0.4, 0.5]))
    for ours, theirs in ((inf, finite), (finite, inf), (inf, inf)):
        found = difference({0: ours}, {0: theirs})
        assert math.isnan(found.low) and not found.real
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert written["low"] is None and written["value"] is None and written["real"] is False
    assert difference({0: finite}, {0: finite}).to_dict()["num_seeds"] == 1


def test_nothing_to_compare_is_refused() -> None:
    """Law: a method without seeds, or with other resamples, is refused."""
    one = Resampled(0.4, np.zeros(3))
    with pytest.raises(ValueError, match="at least one seed"):
        difference({}, {0: one})
    with pytest.raises(ValueError, match="same num_bootstrap"):
        difference({0: one}, {0: Resampled(0.4, np.zeros(4))})
