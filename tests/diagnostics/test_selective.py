from __future__ import annotations

import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from pyrolora.diagnostics import bootstrap, calibration, selective


def predictive(n: int = 200, classes: int = 3, *, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Random log predictives and labels that follow them; with `ties` only a few different confidences."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    if ties:
        top = np.choose(np.exp(log_softmax(logits, axis=1)).max(1) > 0.6, [0.5, 0.8])
        values = np.repeat(((1 - top) / (classes - 1))[:, None], classes, axis=1)
        values[np.arange(n), logits.argmax(1)] = top
        return np.log(values), labels
    return log_softmax(logits, axis=1), labels


def ordered_errors(log_probabilities, labels, confidence=None) -> list[float]:
    """1 for each error, the surest example first; for confidences without ties."""
    sure = np.exp(log_probabilities).max(1) if confidence is None else confidence
    order = sorted(range(len(labels)), key=lambda row: -sure[row])
    return [float(log_probabilities[row].argmax() != labels[row]) for row in order]


def loop_risks(errors) -> list[float]:
    """Error rate among the first 1, 2, … of a list of errors."""
    return [sum(errors[: i + 1]) / (i + 1) for i in range(len(errors))]


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_is_the_error_rate_of_the_surest(seed):
    """Without ties risk i is the error rate of the i surest examples, and AURC its mean; for any confidence."""
    values, labels = predictive(seed=seed)
    own = np.random.default_rng(seed).normal(size=200)
    for confidence in (None, own):
        curve = selective.risk_coverage_curve(values, labels, confidence=confidence)
        risks = loop_risks(ordered_errors(values, labels, confidence))
        np.testing.assert_allclose(curve.risk, risks, atol=1e-12)
        np.testing.assert_allclose(curve.coverage, np.arange(1, 201) / 200)
        sure = np.exp(values).max(1) if confidence is None else own
        assert curve.threshold.tolist() == sorted(sure, reverse=True)
        assert selective.aurc(values, labels, confidence=confidence) == pytest.approx(np.mean(risks))
    assert curve.risk[-1] == pytest.approx(1 - calibration.accuracy(values, labels))
    assert json.loads(json.dumps(curve.to_dict(), allow_nan=False))["risk"] == curve.risk.tolist()


def test_ties_are_averaged_over_all_their_orders():
    """With ties the curve is the mean over every order in which equal confidences could stand."""
    sure = np.array([0.9, 0.7, 0.7, 0.7, 0.5, 0.5, 0.4])
    wrong = np.array([0, 1, 0, 0, 1, 0, 1])
    values, labels = np.log(np.full((7, 2), [0.6, 0.4])), wrong
    curves = []
    for order in itertools.permutations(range(7)):
        if all(sure[a] >= sure[b] for a, b in itertools.pairwise(order)):
            curves.append(loop_risks([wrong[row] for row in order]))
    assert len(curves) == math.factorial(3) * math.factorial(2)
    curve = selective.risk_coverage_curve(values, labels, confidence=sure)
    np.testing.assert_allclose(curve.risk, np.mean(curves, axis=0), atol=1e-12)
    assert selective.aurc(values, labels, confidence=sure) == pytest.approx(np.mean(curves))
    at = selective.accuracy_at_coverage(values, labels, confidence=sure, coverage=3 / 7)
    assert at == pytest.approx(1 - np.mean(curves, axis=0)[2])


def test_nothing_depends_on_row_order_or_on_the_scale_of_confidence():
    """A permutation of the rows, and any increasing map of the confidence, change no number."""
    values, labels = predictive(90, ties=True)
    shuffled = np.random.default_rng(3).permutation(90)
    sure = np.exp(values).max(1)
    first = selective.evaluate_selective(values, labels, num_bootstrap=1)
    second = selective.evaluate_selective(values[shuffled], labels[shuffled], num_bootstrap=1)
    third = selective.evaluate_selective(values, labels, confidence=np.log(sure) * 7 - 100, num_bootstrap=1)
    for name, estimate in first.items():
        assert second[name].value == pytest.approx(estimate.value, abs=1e-12)
        assert third[name] == estimate
    one = selective.risk_coverage_curve(values, labels)
    two = selective.risk_coverage_curve(values[shuffled], labels[shuffled])
    np.testing.assert_allclose(one.risk, two.risk, atol=1e-12)


@pytest.mark.parametrize("wrong", [[0, 0, 1, 0, 1, 0], [1] * 5, [0] * 4, [1], [0], [0, 0, 1, 1]])
def test_excess_is_measured_from_the_best_order(wrong):
    """Excess AURC is AURC minus the smallest AURC of any order of the same errors, and 0 for that order."""
    n = len(wrong)
    values = np.log(np.full((n, 2), [0.6, 0.4]))
    best = min(np.mean(loop_risks(order)) for order in set(itertools.permutations(wrong)))
    falling = np.arange(n, 0.0, -1)
    found = selective.excess_aurc(values, wrong, confidence=falling)
    assert found == pytest.approx(np.mean(loop_risks(wrong)) - best, abs=1e-12)
    assert selective.excess_aurc(values, wrong, confidence=-np.array(wrong)) == pytest.approx(0, abs=1e-12)


def test_the_best_order_is_near_its_formula():
    """For many examples the subtracted term is r + (1 − r) log(1 − r), as in Geifman et al."""
    values, labels = predictive(20_000)
    r = 1 - calibration.accuracy(values, labels)
    subtracted = selective.aurc(values, labels) - selective.excess_aurc(values, labels)
    assert subtracted == pytest.approx(r + (1 - r) * math.log(1 - r), abs=1e-4)


def test_a_confidence_that_says_nothing():
    """All confidences tied: the risk is the error rate at every coverage, and errors are detected by chance."""
    values, labels = np.log(np.full((10, 2), [0.7, 0.3])), np.array([0] * 7 + [1] * 3)
    assert selective.risk_coverage_curve(values, labels).risk == pytest.approx(np.full(10, 0.3))
    assert selective.aurc(values, labels) == pytest.approx(0.3)
    assert selective.accuracy_at_coverage(values, labels, coverage=0.5) == pytest.approx(0.7)
    found = selective.error_detection(values, labels, num_bootstrap=10)
    assert found == calibration.Estimate(0.5, 0.5, 0.5)


@pytest.mark.parametrize("ties", [False, True])
def test_error_detection_agrees_with_scikit_learn_and_torchmetrics(ties):
    """The AUROC of errors by low confidence is scikit-learn's and torchmetrics', for any confidence."""
    values, labels = predictive(ties=ties)
    wrong = (values.argmax(1) != labels).astype(int)
    own = np.random.default_rng(0).normal(size=200).round(1)
    for confidence in (None, own):
        sure = np.exp(values).max(1) if confidence is None else own
        found = selective.error_detection(values, labels, confidence=confidence, num_bootstrap=20).value
        assert found == pytest.approx(roc_auc_score(wrong, -sure), abs=1e-12)
        ranks = torch.tensor(np.unique(-sure, return_inverse=True)[1] / 200)
        assert found == pytest.approx(float(binary_auroc(ranks, torch.tensor(wrong))), abs=1e-6)


def test_error_detection_resamples_errors_and_correct_answers_apart():
    """Its interval is made of AUROCs of resampled errors against resampled correct answers, none undefined."""
    values, labels = predictive(40, seed=2)
    sure, wrong = np.exp(values).max(1), values.argmax(1) != labels
    ((right_rows, wrong_rows),) = bootstrap.resamples([int((~wrong).sum()), int(wrong.sum())], num_bootstrap=40, seed=6)
    ordered = sorted(
        roc_auc_score([0] * (~wrong).sum() + [1] * wrong.sum(), -np.concatenate([sure[~wrong][i], sure[wrong][j]]))
        for i, j in zip(right_rows, wrong_rows, strict=True)
    )
    found = selective.error_detection(values, labels, num_bootstrap=40, seed=6)
    assert (found.low, found.high) == pytest.approx((ordered[0], ordered[38]))


@pytest.mark.parametrize(("label", "kind"), [(0, "correct"), (1, "wrong")])
def test_without_errors_or_without_anything_else_detection_is_undefined(label, kind, caplog):
    """With one kind of answer the AUROC is NaN with a logged reason; the other numbers are defined."""
    values = np.log([[0.7, 0.3], [0.6, 0.4]])
    with caplog.at_level(logging.WARNING, logger="pyrolora"):
        found = selective.evaluate_selective(values, [label] * 2, num_bootstrap=5)
    assert f"all 2 answers are {kind}" in caplog.text
    error = found.pop("error_auroc")
    assert math.isnan(error.value) and math.isnan(error.low) and math.isnan(error.high)
    expected = {"aurc": label, "excess_aurc": 0, **dict.fromkeys(list(found)[2:], 1 - label)}
    for name, estimate in found.items():
        assert estimate == calibration.Estimate(*[float(expected[name])] * 3), name


def test_certain_predictions_and_one_example():
    """Probabilities 0 and 1 give no NaN; one example has risk 0 or 1."""
    with np.errstate(divide="ignore"):
        values = np.log(np.eye(3))
    curve = selective.risk_coverage_curve(values, [0, 1, 0])
    assert curve.risk == pytest.approx([1 / 3] * 3) and curve.threshold.tolist() == [1, 1, 1]
    for label, risk in ((0, 0), (1, 1)):
        assert selective.risk_coverage_curve(values[:1], [label]).risk.tolist() == [risk]
        assert selective.accuracy_at_coverage(values[:1], [label], coverage=0.01) == 1 - risk


def test_coverage_rounds_up_and_exact_shares_are_exact():
    """The answered examples are at least the share asked for, and no more where the share is a whole number."""
    values, labels = np.log(np.full((100, 2), [0.6, 0.4])), np.zeros(100, dtype=int)
    labels[7:] = 1
    falling = np.arange(100, 0.0, -1)

    def at(coverage: float) -> float:
        return selective.accuracy_at_coverage(values, labels, coverage=coverage, confidence=falling)

    assert 0.07 * 100 > 7  # what rounding makes of it
    assert at(0.07) == 1.0
    assert at(0.071) == pytest.approx(7 / 8)
    assert at(1.0) == pytest.approx(calibration.accuracy(values, labels))


@pytest.mark.parametrize("ties", [False, True])
def test_the_bootstrap_recomputes_everything_on_each_resample(ties):
    """Intervals are percentiles of the public functions on the rows that calibration.evaluate would draw."""
    values, labels = predictive(50, ties=ties)
    own = np.random.default_rng(9).normal(size=50).round(1)
    found = selective.evaluate_selective(
        values, labels, confidence=own, coverages=[0.35, 1.0], num_bootstrap=60, seed=5
    )
    rows = np.random.default_rng(5).integers(0, 50, (60, 50))

    def at(coverage: float):
        return lambda v, y, confidence: selective.accuracy_at_coverage(v, y, coverage=coverage, confidence=confidence)

    functions = {
        "aurc": selective.aurc,
        "excess_aurc": selective.excess_aurc,
        "accuracy@0.35": at(0.35),
        "accuracy@1": at(1.0),
    }
    assert set(found) == {*functions, "error_auroc"}
    for name, function in functions.items():
        ordered = sorted(function(values[row], labels[row], confidence=own[row]) for row in rows)
        low, high = ordered[math.ceil(0.025 * 60) - 1], ordered[math.ceil(0.975 * 60) - 1]
        assert found[name].value == pytest.approx(function(values, labels, confidence=own))
        assert (found[name].low, found[name].high) == pytest.approx((low, high)), name
    alone = selective.error_detection(values, labels, confidence=own, num_bootstrap=60, seed=5)
    assert found["error_auroc"] == alone


def test_chunks_and_seeds_of_the_bootstrap(monkeypatch):
    """The intervals are the same however many resamples are gathered at once, and others with another seed."""
    values, labels = predictive(40)
    whole = selective.evaluate_selective(values, labels, num_bootstrap=30)
    assert selective.evaluate_selective(values, labels, num_bootstrap=30, seed=1) != whole
    monkeypatch.setattr(bootstrap, "_CHUNK", 100)
    assert selective.evaluate_selective(values, labels, num_bootstrap=30) == whole


def test_bootstrap_intervals_cover_the_truth():
    """95 % intervals contain the population's value in most of 60 repetitions."""
    truth = selective.evaluate_selective(*predictive(100_000, seed=99), num_bootstrap=1)
    covered = dict.fromkeys(truth, 0)
    for seed in range(60):
        found = selective.evaluate_selective(*predictive(200, seed=seed), num_bootstrap=150)
        for name in covered:
            covered[name] += found[name].low <= truth[name].value <= found[name].high
    assert min(covered.values()) >= 50, covered


GOOD = np.log([[0.3, 0.7], [0.6, 0.4]])
FUNCTIONS = [
    selective.risk_coverage_curve,
    selective.aurc,
    selective.excess_aurc,
    selective.error_detection,
    selective.evaluate_selective,
    lambda values, labels, **given: selective.accuracy_at_coverage(values, labels, coverage=0.5, **given),
]


@pytest.mark.parametrize(
    ("values", "labels", "confidence", "message"),
    [
        (np.zeros((0, 2)), [], None, "no rows"),
        (GOOD, [0], None, "one per row"),
        (GOOD, [0, 2], None, "label 2 in row 1"),
        (np.array([[np.log(0.5), np.log(0.5)], [np.nan, 0.0]]), [0, 1], None, "NaN in row 1"),
        (np.exp(GOOD), [0, 1], None, "pass their natural logarithm"),
        (GOOD, [0, 1], [0.5], "confidence must have shape"),
        (GOOD, [0, 1], [[0.5, 0.4]], "confidence must have shape"),
        (GOOD, [0, 1], [0.5, math.nan], "confidence has NaN in row 1"),
    ],
)
def test_bad_input_is_refused(values, labels, confidence, message):
    """Every function refuses what is not a log predictive with labels and confidences, and names the row."""
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=message):
            function(values, labels, confidence=confidence)


def test_bad_settings_are_refused():
    """Coverages outside (0, 1] and a bootstrap without resamples are refused."""
    for coverage in (0.0, 1.01, math.nan):
        with pytest.raises(ValueError, match="coverage"):
            selective.accuracy_at_coverage(GOOD, [0, 1], coverage=coverage)
        with pytest.raises(ValueError, match="coverage"):
            selective.evaluate_selective(GOOD, [0, 1], coverages=[coverage])
    with pytest.raises(ValueError, match="num_bootstrap"):
        selective.evaluate_selective(GOOD, [0, 1], num_bootstrap=0)
