from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from pyrolora.diagnostics import bootstrap, ood
from pyrolora.diagnostics.bootstrap import Estimate


def two_groups(kind: str, n: int = 70, m: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the two kinds of input: continuous, with many ties, all tied, or apart."""
    rng = np.random.default_rng(seed)
    inside, outside = rng.normal(size=n), rng.normal(0.8, 1.3, size=m)
    if kind == "ties":
        return inside.round(), outside.round()
    if kind == "tied":
        return np.full(n, 0.3), np.full(m, 0.3)
    if kind == "apart":
        return inside, outside + 100
    if kind == "reversed":
        return inside + 100, outside
    return inside, outside


KINDS = ["continuous", "ties", "tied", "apart", "reversed"]
SIZES = [(70, 40), (1, 1), (1, 9), (20, 1), (100, 60)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_metrics_agree_with_scikit_learn_and_torchmetrics(kind, n, m):
    """AUROC, both AUPRs and the FPR at 95 % TPR are scikit-learn's, with ties and without; areas also torchmetrics'."""
    inside, outside = two_groups(kind, n, m)
    scores = np.concatenate([inside, outside])
    foreign = np.array([0] * n + [1] * m)
    expected = {
        "auroc": roc_auc_score(foreign, scores),
        "aupr_out": average_precision_score(foreign, scores),
        "aupr_in": average_precision_score(1 - foreign, -scores),
    }
    false, true, _ = roc_curve(1 - foreign, -scores, drop_intermediate=False)
    expected["fpr95"] = false[np.flatnonzero(true >= 0.95)[0]]
    for name, value in expected.items():
        assert ood.METRICS[name](inside, outside) == pytest.approx(value, abs=1e-12), name
    # torchmetrics squashes what lies outside [0, 1]; ranks are safe.
    ranks = torch.tensor(np.unique(scores, return_inverse=True)[1] / len(scores))
    kinds = torch.tensor(foreign)
    assert ood.auroc(inside, outside) == pytest.approx(float(binary_auroc(ranks, kinds)), abs=1e-6)
    assert ood.aupr_out(inside, outside) == pytest.approx(float(binary_average_precision(ranks, kinds)), abs=1e-6)
    found = float(binary_average_precision(1 - ranks, 1 - kinds))
    assert ood.aupr_in(inside, outside) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_auroc_and_fpr_by_brute_force(kind):
    """AUROC counts pairs, ties half; FPR is what the smallest sufficient threshold accepts, at any TPR."""
    inside, outside = two_groups(kind, 40, 23)
    wins = sum((o > i) + 0.5 * (o == i) for i in inside for o in outside)
    assert ood.auroc(inside, outside) == pytest.approx(wins / (40 * 23))
    for tpr in (0.05, 0.5, 0.95, 1.0):
        threshold = min(t for t in inside if sum(i <= t for i in inside) / 40 >= tpr)
        expected = sum(o <= threshold for o in outside) / 23
        assert ood.fpr_at_tpr(inside, outside, tpr=tpr) == pytest.approx(expected), tpr


def test_degenerate_groups():
    """Perfect separation is 1 and 0, its reverse 0 and 1; equal scores are chance, and accept everything."""
    best = {name: metric(*two_groups("apart")) for name, metric in ood.METRICS.items()}
    assert best == {"auroc": 1, "aupr_out": 1, "aupr_in": 1, "fpr95": 0}
    worst = {name: metric(*two_groups("reversed")) for name, metric in ood.METRICS.items()}
    assert worst["auroc"] == 0 and worst["fpr95"] == 1
    assert worst["aupr_out"] < 40 / 110 and worst["aupr_in"] < 70 / 110
    tied = {name: metric(*two_groups("tied")) for name, metric in ood.METRICS.items()}
    assert tied == pytest.approx({"auroc": 0.5, "aupr_out": 40 / 110, "aupr_in": 70 / 110, "fpr95": 1})
    assert ood.auroc([-math.inf, 0.0], [math.inf, 0.0]) == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
    ("tpr", "n", "enough"), [(0.95, 20, 19), (0.95, 140, 133), (0.95, 1000, 950), (0.07, 100, 7), (0.55, 100, 55)]
)
def test_exactly_the_share_is_enough(tpr, n, enough):
    """A threshold that accepts exactly 95 of 100 reaches 95 %, whatever rounding makes of the share times n."""
    # The foreign input lies just above, then just below, the last in-distribution input that is needed.
    assert ood.fpr_at_tpr(np.arange(n), [enough - 0.5], tpr=tpr) == 0
    assert ood.fpr_at_tpr(np.arange(n), [enough - 1.5], tpr=tpr) == 1


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_symmetries(kind):
    """Row order and any increasing map of the scores change nothing; exchanging the kinds mirrors the metrics."""
    inside, outside = two_groups(kind)
    rng = np.random.default_rng(5)
    for metric in ood.METRICS.values():
        value = metric(inside, outside)
        assert metric(rng.permutation(inside), rng.permutation(outside)) == value
        assert metric(np.exp(inside), np.exp(outside)) == value
    assert ood.auroc(-outside, -inside) == pytest.approx(ood.auroc(inside, outside))
    assert ood.auroc(outside, inside) == pytest.approx(1 - ood.auroc(inside, outside))
    assert ood.aupr_in(inside, outside) == ood.aupr_out(-outside, -inside)


@pytest.mark.parametrize("kind", ["continuous", "ties"])
def test_the_bootstrap_recomputes_each_metric_on_each_resample(kind):
    """Intervals are percentiles of the public metrics on the two kinds resampled apart."""
    inside, outside = two_groups(kind, 30, 12)
    found = ood.separation(inside, outside, num_bootstrap=60, seed=2)
    ((first, second),) = bootstrap.resamples([30, 12], num_bootstrap=60, seed=2)
    for name, metric in ood.METRICS.items():
        ordered = sorted(metric(inside[i], outside[j]) for i, j in zip(first, second, strict=True))
        low, high = ordered[math.ceil(0.025 * 60) - 1], ordered[math.ceil(0.975 * 60) - 1]
        assert found[name].value == metric(inside, outside)
        assert (found[name].low, found[name].high) == pytest.approx((low, high)), name


def test_chunks_and_seeds_of_the_bootstrap(monkeypatch):
    """The intervals are the same however many resamples are gathered at once, and others with another seed."""
    groups = two_groups("continuous", 25, 15)
    whole = ood.separation(*groups, num_bootstrap=30)
    assert ood.separation(*groups, num_bootstrap=30, seed=1) != whole
    monkeypatch.setattr(bootstrap, "_CHUNK", 90)
    assert ood.separation(*groups, num_bootstrap=30) == whole


def test_bootstrap_intervals_cover_the_truth():
    """95 % intervals contain the population's value in most of 60 repetitions."""
    truth = {name: metric(*two_groups("continuous", 60_000, 40_000, 99)) for name, metric in ood.METRICS.items()}
    covered = dict.fromkeys(truth, 0)
    for seed in range(60):
        found = ood.separation(*two_groups("continuous", 150, 100, seed), num_bootstrap=150)
        for name in covered:
            covered[name] += found[name].low <= truth[name] <= found[name].high
    assert min(covered.values()) >= 50, covered


def sampled(size: int, n: int, *, spread: float, scale: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, 3)) + spread * rng.normal(size=(size, n, 3))
    return log_softmax(logits, axis=-1)


INSIDE = sampled(5, 30, spread=0.3, scale=3.0, seed=0)
OUTSIDE = sampled(5, 20, spread=2.0, scale=1.0, seed=1)


def test_scores_are_larger_where_the_predictive_is_less_sure():
    """The scores are 1 − max p̄, H[p̄] and the mean divergence of the draws from p̄."""
    found = ood.scores(OUTSIDE)
    p = np.exp(OUTSIDE)
    mean = p.mean(0)
    np.testing.assert_allclose(found["max_probability"], 1 - mean.max(1), atol=1e-12)
    np.testing.assert_allclose(found["entropy"], scipy_entropy(mean, axis=-1), atol=1e-12)
    divergence = scipy_entropy(p, np.broadcast_to(mean, p.shape), axis=-1).mean(0)
    np.testing.assert_allclose(found["mutual_information"], divergence, atol=1e-12)


def test_predictions_are_told_apart_by_each_score():
    """evaluate_ood judges each score of the draws as separation does; draws that disagree outside are found."""
    found = ood.evaluate_ood(INSIDE, OUTSIDE, num_bootstrap=20, seed=4)
    first, second = ood.scores(INSIDE), ood.scores(OUTSIDE)
    assert list(found) == ["max_probability", "entropy", "mutual_information"]
    for name, metrics in found.items():
        assert metrics == ood.separation(first[name], second[name], num_bootstrap=20, seed=4)
        assert metrics["auroc"].value > 0.8


def test_certain_and_single_draws():
    """Probabilities 0 and 1 give no NaN; one draw has no mutual information, so that score is at chance."""
    with np.errstate(divide="ignore"):
        sure, unsure = np.log([[[1.0, 0.0]] * 4]), np.log([[[1.0, 0.0], [0.5, 0.5]]])
    found = ood.evaluate_ood(sure, unsure, num_bootstrap=10)
    assert found["mutual_information"]["auroc"] == Estimate(0.5, 0.5, 0.5)
    assert found["max_probability"]["auroc"].value == found["entropy"]["auroc"].value == 0.75
    assert found["entropy"]["fpr95"].value == 0.5


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        ([], [0.1], "inside has no scores.*one kind"),
        ([0.1], [], "outside has no scores"),
        ([[0.1]], [0.1], "inside must have one score"),
        ([0.1], 0.5, "outside must have one score"),
        ([0.1, math.nan], [0.1], "inside has NaN in row 1"),
        ([0.1], [math.nan], "outside has NaN in row 0"),
    ],
)
def test_bad_scores_are_refused(inside, outside, message):
    """Every metric refuses one kind only, wrong shapes and NaN, and says which group and row."""
    for metric in [*ood.METRICS.values(), ood.separation]:
        with pytest.raises(ValueError, match=message):
            metric(inside, outside)


def test_bad_settings_are_refused():
    """A TPR outside (0, 1] and a bootstrap without resamples are refused."""
    for tpr in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="tpr"):
            ood.fpr_at_tpr([0.1], [0.2], tpr=tpr)
    with pytest.raises(ValueError, match="num_bootstrap"):
        ood.separation([0.1], [0.2], num_bootstrap=0)


@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (INSIDE, OUTSIDE[:4], "agree in draws"),
        (INSIDE, np.log(np.full((5, 3, 2), 0.5)), "agree in draws and classes"),
        (INSIDE, OUTSIDE[0], "outside: draws must have shape"),
        (INSIDE[:, :0], OUTSIDE, "inside: draws must have shape"),
        (INSIDE, np.where(np.arange(20)[:, None] == 7, math.nan, OUTSIDE), "outside: draw 0: .*NaN in row 7"),
    ],
)
def test_bad_draws_are_refused(inside, outside, message):
    """evaluate_ood refuses draws that cannot be compared, and names group, draw and row."""
    with pytest.raises(ValueError, match=message):
        ood.evaluate_ood(inside, outside)
