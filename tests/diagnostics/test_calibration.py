from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from pyrolora.diagnostics import bootstrap, calibration


def predictive(
    n: int = 400, classes: int = 4, *, seed: int = 0, sharpness: float = 2.0
) -> tuple[np.ndarray, np.ndarray]:
    """Random log predictives and labels drawn from a flatter version of them: an over-confident predictor."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (n, classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return log_softmax(sharpness * logits, axis=1), labels


def loop_gaps(log_probabilities, labels, members) -> list[tuple[int, float]]:
    """(count, |accuracy − confidence|) of each group of rows, one example at a time."""
    gaps = []
    for group in members:
        hits = confidence = 0.0
        for row in group:
            probabilities = [math.exp(value) for value in log_probabilities[row]]
            top = probabilities.index(max(probabilities))
            hits += top == labels[row]
            confidence += probabilities[top]
        gaps.append((len(group), abs(hits - confidence) / len(group) if group else 0.0))
    return gaps


def width_members(log_probabilities, num_bins):
    members = [[] for _ in range(num_bins)]
    for row, values in enumerate(log_probabilities):
        confidence = math.exp(max(values))
        index = next(m for m in range(num_bins) if confidence <= (m + 1) / num_bins + 1e-12)
        members[index].append(row)
    return members


@pytest.mark.parametrize("classes", [2, 5])
def test_accuracy_nll_and_brier_agree_with_scikit_learn(classes):
    """Accuracy, log loss and the summed Brier score are scikit-learn's."""
    values, labels = predictive(classes=classes)
    probabilities = np.exp(values)
    everything = list(range(classes))
    assert calibration.accuracy(values, labels) == pytest.approx(accuracy_score(labels, values.argmax(1)))
    assert calibration.negative_log_likelihood(values, labels) == pytest.approx(
        log_loss(labels, probabilities, labels=everything), rel=1e-10
    )
    assert calibration.brier_score(values, labels) == pytest.approx(
        brier_score_loss(labels, probabilities, labels=everything, scale_by_half=False), rel=1e-10
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_ece_and_mce_agree_with_torchmetrics_and_a_loop(seed, num_bins):
    """ECE and MCE over equal-width bins agree with torchmetrics and with a loop over examples."""
    values, labels = predictive(seed=seed)
    probabilities, targets = torch.tensor(np.exp(values)), torch.tensor(labels)
    gaps = loop_gaps(values, labels, width_members(values, num_bins))
    loop = {"l1": sum(count * gap for count, gap in gaps) / len(labels), "max": max(gap for _, gap in gaps)}
    ours = {
        "l1": calibration.expected_calibration_error(values, labels, num_bins=num_bins),
        "max": calibration.maximum_calibration_error(values, labels, num_bins=num_bins),
    }
    for norm, value in ours.items():
        theirs = multiclass_calibration_error(probabilities, targets, num_classes=4, n_bins=num_bins, norm=norm)
        assert value == pytest.approx(float(theirs), abs=1e-6)
        assert value == pytest.approx(loop[norm], abs=1e-12)


@pytest.mark.parametrize("n", [7, 100, 401])
def test_adaptive_ece_agrees_with_slices_of_the_sorted_examples(n):
    """Without ties, adaptive ECE cuts the examples sorted by confidence into slices of equal length."""
    values, labels = predictive(n=n)
    order = sorted(range(n), key=lambda row: max(values[row]))
    members = [[] for _ in range(15)]
    for rank, row in enumerate(order):
        members[rank * 15 // n].append(row)
    expected = sum(count * gap for count, gap in loop_gaps(values, labels, members)) / n
    assert calibration.adaptive_calibration_error(values, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_classwise_ece_agrees_with_torchmetrics_and_a_loop(classes, num_bins):
    """Class-wise ECE is the mean of torchmetrics' binary errors, each class against the rest, and of a loop's."""
    values, labels = predictive(classes=classes)
    theirs, loops = [], []
    for k in range(classes):
        probabilities, hits = torch.tensor(np.exp(values[:, k])), torch.tensor(labels == k)
        theirs.append(float(binary_calibration_error(probabilities, hits.long(), n_bins=num_bins)))
        gaps = [0.0] * num_bins
        for p, hit in zip(probabilities.tolist(), hits.tolist(), strict=True):
            gaps[next(m for m in range(num_bins) if p <= (m + 1) / num_bins + 1e-12)] += hit - p
        loops.append(sum(map(abs, gaps)) / len(labels))
    ours = calibration.classwise_calibration_error(values, labels, num_bins=num_bins)
    assert ours == pytest.approx(np.mean(theirs), abs=1e-6)
    assert ours == pytest.approx(np.mean(loops), abs=1e-12)


def test_classwise_ece_sees_what_the_top_class_hides():
    """Swapping the two small probabilities leaves every top-class error at 0, and not the class-wise one."""
    labels = [0] * 8 + [1] * 2
    values = np.log(np.full((10, 3), [0.8, 0.0 + 1e-12, 0.2 - 1e-12]))
    assert calibration.expected_calibration_error(values, labels) == pytest.approx(0, abs=1e-9)
    assert calibration.classwise_calibration_error(values, labels) == pytest.approx((0.2 + 0.2) / 3, abs=1e-9)


def test_metrics_do_not_depend_on_row_order_with_ties():
    """A permutation of the examples changes no metric, even when most confidences are tied."""
    rng = np.random.default_rng(3)
    top = rng.choice([0.6, 0.8, 0.9], 90)
    values, labels = np.log(np.stack([top, 1 - top], 1)), rng.integers(0, 2, 90)
    shuffled = rng.permutation(90)
    for metric in calibration.METRICS.values():
        assert metric(values, labels) == pytest.approx(metric(values[shuffled], labels[shuffled]), abs=1e-12)


def test_tied_confidences_share_one_bin():
    """With all confidences equal both calibration errors are |accuracy − confidence|."""
    values, labels = np.log(np.full((50, 2), [0.7, 0.3])), np.array([0] * 30 + [1] * 20)
    for name in ("ece", "adaptive_ece", "mce", "classwise_ece"):
        assert calibration.METRICS[name](values, labels) == pytest.approx(0.1)


def test_bins_are_closed_on_the_right():
    """A confidence exactly on an edge belongs to the bin below it, as in Guo et al."""
    curve = calibration.reliability_curve(
        np.log([[0.5, 0.5], [0.1, 0.9], [0.0 + 1e-9, 1 - 1e-9]]), [0, 1, 1], num_bins=2
    )
    assert curve.count.tolist() == [1, 2]


def test_tied_classes_count_the_first_as_the_prediction():
    """Of equally probable classes the first is the prediction, and its confidence is 1/K."""
    values = np.log(np.full((2, 4), 0.25))
    assert calibration.accuracy(values, [0, 1]) == 0.5
    assert calibration.expected_calibration_error(values, [0, 1]) == pytest.approx(0.25)


def test_certain_predictions():
    """Probability 1 on the label is perfect; probability 0 on it gives NLL inf and Brier 2, without clipping."""
    with np.errstate(divide="ignore"):
        values = np.log(np.eye(3))
    assert {name: metric(values, [0, 1, 2]) for name, metric in calibration.METRICS.items()} == {
        "accuracy": 1, "nll": 0, "brier": 0, "ece": 0, "adaptive_ece": 0, "mce": 0, "classwise_ece": 0
    }  # fmt: skip
    assert calibration.negative_log_likelihood(values, [0, 1, 0]) == math.inf
    assert calibration.brier_score(values, [1, 2, 0]) == 2
    assert calibration.maximum_calibration_error(values, [0, 1, 0]) == pytest.approx(1 / 3)


def test_extreme_confidence_keeps_its_precision():
    """A label of log-probability −500 costs 500 nats, though its probability is 0 in single precision."""
    values = log_softmax(np.array([[500.0, 0.0]]), axis=1)
    assert calibration.negative_log_likelihood(values, [1]) == pytest.approx(500.0)


def test_one_class_and_one_example():
    """One class is always right; a single example has accuracy 0 or 1 and a point interval."""
    assert calibration.METRICS["brier"](np.zeros((3, 1)), [0, 0, 0]) == 0
    single = calibration.evaluate(np.log([[0.2, 0.8]]), [1], num_bootstrap=50)
    assert single["accuracy"] == bootstrap.Estimate(1.0, 1.0, 1.0)
    assert single["nll"].low == single["nll"].high == pytest.approx(-math.log(0.8))
    assert single["ece"].value == single["ece"].low == pytest.approx(0.2)


GOOD = np.log([[0.3, 0.7], [0.6, 0.4]])


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        (np.zeros((0, 2)), [], "no rows"),
        (np.zeros(3), [0, 1, 0], "shape"),
        (GOOD, [0], "one per row"),
        (GOOD, [[0, 1]], "one per row"),
        (GOOD, [0.0, 1.0], "integers"),
        (GOOD, [0, 2], "label 2 in row 1"),
        (GOOD, [-100, 1], "label -100 in row 0"),
        (np.array([[np.log(0.5), np.log(0.5)], [np.nan, 0.0]]), [0, 1], "NaN in row 1"),
        (np.array([[0.3, 0.7], [0.6, 0.4]]), [0, 1], "pass their natural logarithm"),
        (np.array([[0.0, np.inf], [0.0, 0.0]]), [0, 1], "row 0"),
        (np.array([[2.0, -1.0], [0.4, -3.0]]), [0, 1], "log_softmax"),
        (np.full((2, 2), -np.inf), [0, 1], "row 0"),
        (GOOD + 3e-4, [0, 1], "sum to 1.0003"),
    ],
)
def test_bad_input_is_refused(values, labels, message):
    """Every metric refuses what is not a log predictive with its labels, and names the row."""
    for metric in [*calibration.METRICS.values(), calibration.evaluate, calibration.reliability_curve]:
        with pytest.raises(ValueError, match=message):
            metric(values, labels)
    for metric in (calibration.expected_calibration_error, calibration.reliability_curve):
        with pytest.raises(ValueError, match="num_bins"):
            metric(GOOD, [0, 1], num_bins=0)


def test_rounding_of_single_precision_is_accepted():
    """float32 log-softmax passes the check of normalisation."""
    values, labels = predictive()
    assert calibration.accuracy(values.astype(np.float32), labels) == calibration.accuracy(values, labels)


def test_the_bootstrap_recomputes_each_metric_on_each_resample():
    """The intervals are percentiles of the public metrics, resample by resample (reflected for calibration errors)."""
    values, labels = predictive(n=60)
    found = calibration.evaluate(values, labels, num_bootstrap=80, seed=5)
    rows = np.random.default_rng(5).integers(0, 60, (80, 60))
    for name, metric in calibration.METRICS.items():
        ordered = sorted(metric(values[row], labels[row]) for row in rows)
        low, high = ordered[math.ceil(0.025 * 80) - 1], ordered[math.ceil(0.975 * 80) - 1]
        value = metric(values, labels)
        if name in ("ece", "adaptive_ece", "mce", "classwise_ece"):
            low, high = max(0, 2 * value - high), max(0, 2 * value - low)
        assert found[name].value == pytest.approx(value)
        assert (found[name].low, found[name].high) == pytest.approx((low, high))


def test_chunks_do_not_change_the_bootstrap(monkeypatch):
    """The intervals are the same however many resamples are gathered at once."""
    values, labels = predictive(n=50)
    whole = calibration.evaluate(values, labels, num_bootstrap=30)
    monkeypatch.setattr(bootstrap, "_CHUNK", 120)
    assert calibration.evaluate(values, labels, num_bootstrap=30) == whole
    assert calibration.evaluate(values, labels, num_bootstrap=30, seed=1) != whole


def test_bootstrap_intervals_cover_the_truth():
    """95 % intervals contain the population's accuracy, NLL and ECE in most of 60 repetitions."""
    big = predictive(n=100_000, classes=2, seed=99)
    covered = dict.fromkeys(("accuracy", "nll", "ece"), 0)
    for seed in range(60):
        found = calibration.evaluate(*predictive(n=300, classes=2, seed=seed), num_bootstrap=100)
        for name in covered:
            covered[name] += found[name].low <= calibration.METRICS[name](*big) <= found[name].high
    assert min(covered.values()) >= 50, covered


def test_infinite_nll_survives_the_bootstrap():
    """An infinite NLL gives an infinite upper end and never NaN; the other metrics stay finite."""
    with np.errstate(divide="ignore"):
        values = np.log(np.array([[1.0, 0.0]] + [[0.5, 0.5]] * 9))
    found = calibration.evaluate(values, [1] + [0] * 9, num_bootstrap=100)
    assert found["nll"].value == found["nll"].high == math.inf
    assert found["nll"].low == pytest.approx(math.log(2))
    assert all(math.isfinite(found[name].high) for name in found if name != "nll")
    with pytest.raises(ValueError, match="num_bootstrap"):
        calibration.evaluate(values, [0] * 10, num_bootstrap=0)


def test_the_curve_gives_back_the_ece():
    """Count-weighted gaps of the curve are the ECE, counts add up to n, each bin holds its mean confidence."""
    values, labels = predictive()
    curve = calibration.reliability_curve(values, labels)
    filled = curve.count > 0
    gaps = np.abs(curve.accuracy - curve.confidence)[filled] * curve.count[filled]
    assert gaps.sum() / len(labels) == pytest.approx(calibration.expected_calibration_error(values, labels))
    assert curve.count.sum() == len(labels)
    assert (curve.edges[:-1][filled] < curve.confidence[filled]).all()
    assert (curve.confidence[filled] <= curve.edges[1:][filled]).all()
    assert [len(group) for group in width_members(values, 15)] == curve.count.tolist()


def test_the_curve_and_estimates_are_json():
    """to_dict gives strict JSON: empty bins are null, not NaN."""
    curve = calibration.reliability_curve(GOOD, [1, 0]).to_dict()
    again = json.loads(json.dumps(curve, allow_nan=False))
    assert [len(again[key]) for key in ("edges", "confidence", "accuracy", "count")] == [16, 15, 15, 15]
    assert again["accuracy"][0] is None and sum(again["count"]) == 2
    assert bootstrap.Estimate(1.0, 0.5, 2.0).to_dict() == {"value": 1.0, "low": 0.5, "high": 2.0}
