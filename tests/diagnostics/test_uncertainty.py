from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from scipy.stats import entropy as scipy_entropy

from pyrolora.diagnostics import calibration, uncertainty
from pyrolora.inference.prediction import PredictionBuilder


def sampled(size: int = 6, n: int = 40, classes: int = 3, *, spread: float = 1.0, seed: int = 0) -> np.ndarray:
    """Log probabilities (S, n, K) of draws that differ from each other by `spread`."""
    rng = np.random.default_rng(seed)
    return log_softmax(rng.normal(0, 1.2, (n, classes)) + spread * rng.normal(size=(size, n, classes)), axis=-1)


def labels_of(draws: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, draws.shape[2], draws.shape[1])


def certain(*classes: int) -> np.ndarray:
    """Draws (S, 1, 2) that each give one class probability 1."""
    with np.errstate(divide="ignore"):
        return np.log(np.eye(2)[list(classes)])[:, None]


@pytest.mark.parametrize(("size", "n", "classes"), [(6, 40, 3), (1, 5, 2), (9, 1, 4), (3, 4, 1)])
def test_the_split_is_the_entropy_of_the_mean_the_mean_entropy_and_the_mean_divergence(size, n, classes):
    """Total is H of the mean, aleatoric the mean of H, epistemic the mean KL divergence from that mean."""
    draws = sampled(size, n, classes)
    p = np.exp(draws)
    mean = p.mean(0)
    np.testing.assert_allclose(uncertainty.predictive_entropy(draws), scipy_entropy(mean, axis=-1), atol=1e-12)
    np.testing.assert_allclose(uncertainty.expected_entropy(draws), scipy_entropy(p, axis=-1).mean(0), atol=1e-12)
    divergence = scipy_entropy(p, np.broadcast_to(mean, p.shape), axis=-1).mean(0)
    np.testing.assert_allclose(uncertainty.mutual_information(draws), divergence, atol=1e-12)


def test_the_split_is_that_of_the_prediction():
    """In double precision the three values are those that Prediction holds in single precision."""
    draws = torch.tensor(sampled(7, 20), dtype=torch.float32)
    builder = PredictionBuilder(20, 7)
    builder.add(draws)
    prediction = builder.build(torch.arange(20), {})
    found = uncertainty.decompose(draws.numpy(), num_bootstrap=1)
    for name in ("entropy", "expected_entropy", "mutual_information"):
        component = getattr(found, name)
        np.testing.assert_allclose(component.values, getattr(prediction, name), atol=1e-6)
        assert component.mean.value == pytest.approx(float(getattr(prediction, name).mean()), abs=1e-6)
    assert found.num_draws == 7


@pytest.mark.parametrize("spread", [0.0, 1e-4, 30.0])
def test_the_parts_stay_in_their_bounds(spread):
    """0 ≤ I ≤ H ≤ log K; draws that agree have no epistemic uncertainty and no Monte Carlo error."""
    found = uncertainty.decompose(sampled(8, 100, spread=spread), num_bootstrap=1)
    total, epistemic = found.entropy.values, found.mutual_information.values
    assert (epistemic >= 0).all() and (epistemic <= total + 1e-12).all() and (total <= math.log(3) + 1e-12).all()
    if spread == 0.0:
        assert epistemic.max() < 1e-12
        for part in (found.entropy, found.expected_entropy, found.mutual_information):
            assert part.errors.max() < 1e-12 and part.mean_error < 1e-12


def test_certain_draws():
    """Probabilities 0 and 1 give no NaN: agreement has no uncertainty, disagreement is epistemic alone."""
    found = uncertainty.decompose(certain(0, 1, 0, 1), num_bootstrap=5)
    assert found.entropy.values == pytest.approx(math.log(2)) == found.mutual_information.values
    assert found.expected_entropy.values == found.expected_entropy.errors == 0
    same = uncertainty.decompose(certain(1, 1, 1), num_bootstrap=5)
    for part in (same.entropy, same.expected_entropy, same.mutual_information):
        assert part.values == part.errors == part.mean_error == 0
        assert part.mean == calibration.Estimate(0.0, 0.0, 0.0)


@pytest.mark.parametrize("size", [3, 10])
def test_errors_are_the_jackknife_and_the_standard_error(size):
    """Errors are those of deleting each draw in turn and computing everything anew, of examples and of their mean."""
    draws = sampled(size, 12)
    found = uncertainty.decompose(draws, num_bootstrap=1)
    for part, statistic in (
        (found.entropy, uncertainty.predictive_entropy),
        (found.mutual_information, uncertainty.mutual_information),
    ):
        without = [statistic(np.delete(draws, s, axis=0)) for s in range(size)]
        for stated, values in ((part.errors, without), (part.mean_error, [value.mean() for value in without])):
            centre = sum(values) / size
            squares = sum((value - centre) ** 2 for value in values)
            np.testing.assert_allclose(stated, np.sqrt((size - 1) / size * squares), rtol=1e-9)
    each = scipy_entropy(np.exp(draws), axis=-1)
    np.testing.assert_allclose(found.expected_entropy.errors, each.std(0, ddof=1) / math.sqrt(size), rtol=1e-9)
    assert found.expected_entropy.mean_error == pytest.approx(each.mean(1).std(ddof=1) / math.sqrt(size))


def test_errors_are_the_spread_over_repetitions():
    """The stated Monte Carlo errors are the standard deviation over repeated sets of draws, of values and of means."""
    rng = np.random.default_rng(4)
    centre = np.array([0.5, 0.0, -1.0])
    # A shift common to all examples: their errors do not average out.
    repeats = [
        uncertainty.decompose(
            log_softmax(centre + rng.normal(size=(24, 1, 3)) + 0.3 * rng.normal(size=(24, 5, 3)), axis=-1),
            num_bootstrap=1,
        )
        for _ in range(300)
    ]
    for name in ("entropy", "expected_entropy", "mutual_information"):
        parts = [getattr(found, name) for found in repeats]
        stated = math.sqrt(np.mean([part.mean_error**2 for part in parts]))
        assert stated == pytest.approx(np.std([part.mean.value for part in parts]), rel=0.15), name
        stated = np.sqrt(np.mean([part.errors**2 for part in parts], axis=0))
        np.testing.assert_allclose(stated, np.std([part.values for part in parts], axis=0), rtol=0.15)


def test_copies_of_an_example_do_not_lower_the_error_of_the_mean():
    """A draw errs about all examples together: the mean over copies has the error of one."""
    found = uncertainty.decompose(np.repeat(sampled(6, 1), 50, axis=1), num_bootstrap=1)
    for part in (found.entropy, found.expected_entropy, found.mutual_information):
        assert part.mean_error == pytest.approx(part.errors[0])


def test_too_few_draws_have_no_error():
    """One draw shows no Monte Carlo error and two show none of the mutual information: NaN, and null in JSON."""
    for size, unknown in ((1, {"entropy", "expected_entropy", "mutual_information"}), (2, {"mutual_information"})):
        found = uncertainty.decompose(sampled(size, 4), num_bootstrap=3)
        written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        for name in ("entropy", "expected_entropy", "mutual_information"):
            part = getattr(found, name)
            assert np.isnan(part.errors).all() == math.isnan(part.mean_error) == (name in unknown)
            assert (written[name]["monte_carlo_error"] is None) == (name in unknown)
            assert written[name]["value"] == part.values.mean()
    assert uncertainty.decompose(sampled(1, 4), num_bootstrap=3).mutual_information.mean.value == 0


def test_intervals_come_from_the_resamples_of_the_evaluator():
    """Intervals are percentiles of the mean over the examples that calibration.evaluate would draw."""
    draws = sampled(5, 30)
    found = uncertainty.decompose(draws, num_bootstrap=80, seed=5)
    rows = np.random.default_rng(5).integers(0, 30, (80, 30))
    for part in (found.entropy, found.expected_entropy, found.mutual_information):
        ordered = sorted(part.values[row].mean() for row in rows)
        assert part.mean.low == pytest.approx(ordered[math.ceil(0.025 * 80) - 1])
        assert part.mean.high == pytest.approx(ordered[math.ceil(0.975 * 80) - 1])


def loop_nll(draws, labels, subset) -> float:
    """The NLL of the average over some draws, one example and draw at a time."""
    total = 0.0
    for row, label in enumerate(labels):
        total -= math.log(sum(math.exp(draws[s][row][label]) for s in subset) / len(subset))
    return total / len(labels)


def test_nll_over_all_subsets_by_brute_force():
    """Where the subsets are few, mean and spread are those over every one of them."""
    draws = sampled(5, 11)
    labels = labels_of(draws)
    curve = uncertainty.nll_by_draws(draws, labels, sizes=[1, 2, 4, 5], num_subsets=10)
    for size, nll, sd, count in zip(curve.sizes, curve.nll, curve.sd, curve.num_subsets, strict=True):
        every = [loop_nll(draws, labels, subset) for subset in itertools.combinations(range(5), size)]
        assert count == len(every)
        assert nll == pytest.approx(np.mean(every))
        assert (math.isnan(sd) and size == 5) or sd == pytest.approx(np.std(every, ddof=1))
    assert (np.diff(curve.nll) < 0).all()  # Jensen
    mean = logsumexp(draws, axis=0) - math.log(5)
    assert curve.nll[-1] == pytest.approx(calibration.negative_log_likelihood(mean, labels))
    assert json.loads(json.dumps(curve.to_dict(), allow_nan=False))["sd"][-1] is None


def test_nll_over_random_subsets():
    """Random subsets hold distinct draws, are unbiased for all subsets, and do not depend on the other sizes."""
    draws = sampled(12, 30, spread=1.5)
    labels = labels_of(draws)
    chosen = uncertainty._subsets(12, 4, 300, 0)
    assert chosen.shape == (300, 4) and all(len(set(row)) == 4 for row in chosen.tolist())
    curve = uncertainty.nll_by_draws(draws, labels, sizes=[3, 6], num_subsets=60)
    every = [loop_nll(draws, labels, subset) for subset in itertools.combinations(range(12), 3)]
    assert curve.num_subsets.tolist() == [60, 60]
    assert curve.nll[0] == pytest.approx(np.mean(every), abs=4 * np.std(every) / math.sqrt(60))
    assert curve.sd[0] == pytest.approx(np.std(every), rel=0.4)
    alone = uncertainty.nll_by_draws(draws, labels, sizes=[6], num_subsets=60)
    assert alone.nll[0] == curve.nll[1] and alone.sd[0] == curve.sd[1]
    assert uncertainty.nll_by_draws(draws, labels, sizes=[6], num_subsets=60, seed=1).nll[0] != alone.nll[0]


def test_nll_keeps_tiny_and_zero_probabilities():
    """A label of log-probability −800 costs what it must; one of probability 0 in every draw of a subset costs inf."""
    draws = log_softmax(np.array([[[800.0, 0.0]], [[802.0, 0.0]]]), axis=-1)
    curve = uncertainty.nll_by_draws(draws, [1], sizes=[1, 2])
    assert curve.nll == pytest.approx([801.0, 800 + math.log(2) - math.log1p(math.exp(-2))])
    with np.errstate(invalid="raise"):
        mixed = uncertainty.nll_by_draws(certain(0, 1), [1], sizes=[1, 2])
    assert mixed.nll.tolist() == [math.inf, pytest.approx(math.log(2))] and np.isnan(mixed.sd).all()


GOOD = np.log([[[0.3, 0.7], [0.6, 0.4]]] * 3)


def broken(draw: int, row: int, value: list[float]) -> np.ndarray:
    draws = GOOD.copy()
    draws[draw, row] = value
    return draws


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        (GOOD[0], r"log_probabilities\[None\]"),
        (GOOD[:0], "no axis empty"),
        (GOOD[:, :0], "no axis empty"),
        (GOOD[:, :, :0], "no axis empty"),
        (broken(1, 1, [math.nan, 0.0]), "draw 1: .*NaN in row 1"),
        (broken(2, 0, [math.log(0.3), math.log(0.3)]), "draw 2: row 0 .*sum to 0.6"),
        (broken(0, 1, [-math.inf, -math.inf]), "draw 0: row 1"),
        (np.exp(GOOD), "draw 0: .*pass their natural logarithm"),
    ],
)
def test_bad_draws_are_refused(draws, message):
    """Every function refuses what are not log predictives of draws, and names the draw and the row."""
    for function in (
        uncertainty.predictive_entropy,
        uncertainty.expected_entropy,
        uncertainty.mutual_information,
        uncertainty.decompose,
        lambda values: uncertainty.nll_by_draws(values, [0, 1], sizes=[1]),
    ):
        with pytest.raises(ValueError, match=message):
            function(draws)


@pytest.mark.parametrize(
    ("labels", "sizes", "num_subsets", "message"),
    [
        ([0], [1], 20, "one per row"),
        ([0, 2], [1], 20, "label 2 in row 1"),
        ([0, 1], [], 20, "sizes"),
        ([0, 1], [1.5], 20, "whole numbers"),
        ([0, 1], [1, 4], 20, "size 4 is outside 1 … 3"),
        ([0, 1], [0], 20, "size 0"),
        ([0, 1], [1], 0, "num_subsets"),
    ],
)
def test_bad_subsets_are_refused(labels, sizes, num_subsets, message):
    """nll_by_draws refuses labels of other rows or classes, sizes that cannot be, and no subsets."""
    with pytest.raises(ValueError, match=message):
        uncertainty.nll_by_draws(GOOD, labels, sizes=sizes, num_subsets=num_subsets)


def test_no_resamples_are_refused():
    """An interval needs at least one resample."""
    with pytest.raises(ValueError, match="num_bootstrap"):
        uncertainty.decompose(GOOD, num_bootstrap=0)
