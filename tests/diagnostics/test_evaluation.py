from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score
from transformers import TrainingArguments

from pyrolora.diagnostics import calibration, ood, selective, uncertainty
from pyrolora.diagnostics.evaluation import (
    averaging_of,
    evaluate_posterior,
    evaluate_prediction,
    interesting,
    separation_of,
    uncertainty_of,
)
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction, PredictionBuilder
from tests.programs import relabelled, sentence_task, tiny_program, untrained

TASK = sentence_task()


def predicted(num_draws: int, size: int, *, seed: int = 0, classes: int = 3, joint: bool = True) -> Prediction:
    """A prediction made of random numbers, labelled, whose draws differ."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (1, size, classes)) + rng.normal(0, 0.7, (num_draws, size, classes))
    builder = PredictionBuilder(size, num_draws, [str(k) for k in range(classes)], joint=joint)
    builder.add(torch.tensor(log_softmax(logits, axis=-1)))
    labels = rng.integers(0, classes, size).tolist()
    return builder.build(torch.arange(size), {"labels": labels, "text": [f"text {i}" for i in range(size)]})


def nll(log_mean: np.ndarray, labels: np.ndarray) -> float:
    return float(-log_mean[np.arange(len(labels)), labels].mean())


@pytest.fixture(scope="module")
def field() -> Posterior:
    return untrained(MeanField(random="*"))


@pytest.fixture(scope="module")
def laplace() -> Posterior:
    arguments: TrainingArguments = default_arguments()
    arguments.max_steps = 2
    return fit(tiny_program(), Laplace(num_points=32), args=arguments)


def test_a_calibrated_prediction_is_evaluated_at_its_temperature() -> None:
    """Law: uncertainties and the gain of averaging are those of the scaled predictives; what its unscaled draws alone
    could tell is left out, and at temperature 1 nothing is."""
    found, point = predicted(8, 40), predicted(1, 40, seed=1)
    scaled, scaled_point = found.scaled(2.0), point.scaled(2.0)
    assert (found.scaling, scaled.scaling, scaled.scaled(3.0).scaling) == (1.0, 2.0, 6.0)
    parts = uncertainty_of(scaled)
    p = np.exp(log_softmax(found.log_mean.numpy() / 2.0, axis=-1))
    assert parts["entropy"]["value"] == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)
    assert all(part["monte_carlo_error"] is None for part in parts.values())
    averaged = averaging_of(scaled, scaled_point)
    assert found.labels is not None and averaged["by_draws"] is None
    of_mean = nll(log_softmax(point.log_mean.numpy() / 2.0, axis=-1), found.labels.numpy())
    assert averaged["mean_weights"] == pytest.approx(nll(scaled_point.log_mean.numpy(), found.labels.numpy()))
    assert averaged["mean_weights"] == pytest.approx(of_mean, rel=1e-5)
    assert averaging_of(found.scaled(1.0), point)["by_draws"]["sizes"] == [1, 4, 8]


def test_every_metric_is_that_of_its_module() -> None:
    """Law: values and intervals are those of calibration.evaluate and evaluate_selective, as fitted and scaled."""
    prediction = predicted(5, 40)
    found = evaluate_prediction(prediction, scaling=1.7, seed=3)
    log_mean, labels = prediction.log_mean.double().numpy(), prediction.labels.numpy()
    powered = log_softmax(log_mean / 1.7, axis=1)
    for metrics, values in ((found.metrics, log_mean), (found.scaled_metrics, powered)):
        expected = calibration.evaluate(values, labels, seed=3) | selective.evaluate_selective(values, labels, seed=3)
        assert metrics.keys() == expected.keys() >= {"classwise_ece", "aurc", "error_auroc", "accuracy@0.9"}
        for name, estimate in expected.items():
            assert vars(metrics[name]) == pytest.approx(vars(estimate), abs=1e-6), name
    assert found.resampled.keys() == {False, True}
    assert found.class_names == ("0", "1", "2") and found.joint_draws


def test_risk_coverage_at_every_percent() -> None:
    """Law: the curve is kept at 1 to 100 % of the examples, each point a point of the whole curve."""
    prediction = predicted(2, 350)
    kept = evaluate_prediction(prediction).risk_coverage
    whole = selective.risk_coverage_curve(prediction.log_mean.numpy(), prediction.labels.numpy())
    assert len(kept["coverage"]) == 100 and kept["coverage"][-1] == 1.0
    for coverage, risk in zip(kept["coverage"], kept["risk"], strict=True):
        assert risk == whole.risk[round(coverage * 350) - 1]
    assert len(evaluate_prediction(predicted(2, 7)).risk_coverage["risk"]) == 7


def test_the_split_of_uncertainty() -> None:
    """Law: with joint draws it is the decomposition with Monte Carlo errors; total = aleatoric + epistemic."""
    prediction = predicted(6, 30)
    found = uncertainty_of(prediction, seed=2)
    assert found == uncertainty.decompose(prediction.draws.numpy(), seed=2).to_dict()
    value = {name: part["value"] for name, part in found.items()}
    assert value["entropy"] == pytest.approx(value["expected_entropy"] + value["mutual_information"])
    assert all(part["monte_carlo_error"] > 0 for part in found.values())


def test_points_that_are_no_joint_draws_have_no_monte_carlo_error() -> None:
    """Law: means and intervals stay, the error is unknown; a closed form, one point, has no split at all."""
    joint, points = (uncertainty_of(predicted(6, 30, joint=joint)) for joint in (True, False))
    assert joint.keys() == points.keys()
    for name, part in points.items():
        assert part["monte_carlo_error"] is None
        for end in ("value", "low", "high"):
            assert part[end] == pytest.approx(joint[name][end], abs=1e-6)
    assert uncertainty_of(predicted(1, 30, joint=False)).keys() == {"entropy"}
    assert uncertainty_of(predicted(1, 30))["mutual_information"]["value"] == 0


def test_averaging_against_the_mean_weights() -> None:
    """Law: NLL with mean weights, with 1, 4, … S draws of the same prediction, and the gain on the same examples."""
    prediction, mean = predicted(16, 50), predicted(1, 50)
    found = averaging_of(prediction, mean)
    labels = prediction.labels.numpy()
    assert found["mean_weights"] == pytest.approx(nll(mean.log_mean.numpy(), labels))
    assert found["by_draws"]["sizes"] == [1, 4, 16]
    assert found["by_draws"]["nll"][0] == pytest.approx(
        np.mean([nll(draw, labels) for draw in prediction.draws.numpy()]), rel=1e-6
    )
    assert found["by_draws"]["nll"][2] == pytest.approx(nll(prediction.log_mean.numpy(), labels), rel=1e-6)
    gain = nll(prediction.log_mean.numpy(), labels) - nll(mean.log_mean.numpy(), labels)
    assert found["gain"]["value"] == pytest.approx(gain, rel=1e-5)
    same = averaging_of(mean, mean)
    assert same["gain"]["value"] == 0 and same["gain"]["real"] is False and same["by_draws"]["sizes"] == [1]
    assert averaging_of(predicted(7, 9), predicted(1, 9))["by_draws"]["sizes"] == [1, 4, 7]


def test_points_that_are_no_joint_draws_have_no_curve() -> None:
    """Law: quasi-Monte Carlo points are not drawn as a number of draws; the gain over the mean weights stays."""
    found = averaging_of(predicted(8, 20, joint=False), predicted(1, 20))
    assert found["by_draws"] is None and found["gain"]["num_seeds"] == 1


def test_separation_agrees_with_the_draws_and_with_scikit_learn() -> None:
    """Law: scores are those of the draws in double precision, areas scikit-learn's; every input is in the histogram."""
    inside, outside = predicted(6, 60), predicted(6, 35, seed=5)
    found = separation_of(inside, outside, seed=1)
    expected = ood.evaluate_ood(inside.draws.numpy(), outside.draws.numpy(), seed=1)
    truth = [0] * 60 + [1] * 35
    scores = [ood.scores(each.draws.numpy()) for each in (inside, outside)]
    for name in ("max_probability", "entropy", "mutual_information"):
        area = roc_auc_score(truth, np.concatenate([each[name] for each in scores]))
        assert found["scores"][name]["auroc"].value == pytest.approx(area, abs=1e-3)
        for metric, estimate in expected[name].items():
            assert vars(found["scores"][name][metric]) == pytest.approx(vars(estimate), abs=2e-3)
    assert sum(found["histogram"]["inside"]) == 60 and sum(found["histogram"]["outside"]) == 35
    assert found["histogram"]["edges"][-1] == pytest.approx(math.log(3))
    assert found["uncertainty"] == uncertainty_of(outside, seed=1) and found["num_examples"] == 35


def test_a_single_draw_has_no_disagreement_to_score() -> None:
    """Law: without a second draw mutual information is no score, and a certain predictive counts in the histogram."""
    builder = PredictionBuilder(2, 1)
    builder.add(torch.tensor([[[0.5, 0.5], [1.0, 0.0]]]).log())
    sure = builder.build(torch.arange(2), {"labels": [0, 1]})
    found = separation_of(sure, sure)
    assert found["scores"].keys() == {"max_probability", "entropy"}
    assert found["scores"]["entropy"]["auroc"].value == 0.5
    assert found["histogram"]["inside"][0] == found["histogram"]["inside"][-1] == 1


def test_a_posterior_predicts_what_its_evaluation_needs(field: Posterior) -> None:
    """Law: draws, mean weights and other splits are predictions of the same posterior with the same seed."""
    far = sentence_task().validation
    found = evaluate_posterior(field, TASK.test, ood={"far": far}, num_draws=4, seed=2)
    inside, outside = (field.predict(data, 4, seed=2) for data in (TASK.test, far))
    mean = field.predict(TASK.test, 0)
    expected = evaluate_prediction(inside, ood={"far": outside}, mean_weights=mean, seed=2)
    assert found.to_dict() | {"predict_seconds": 0} == expected.to_dict() | {"predict_seconds": 0}
    assert found.predict_seconds > 0 and found.averaging is not None
    unlabelled = relabelled(far, -1)
    assert evaluate_posterior(field, TASK.test, ood={"far": unlabelled}, num_draws=4, seed=2).ood == found.ood


def test_a_point_estimate_has_nothing_to_average(field: Posterior) -> None:
    """Law: without random sites, or with mean weights asked for, there is no comparison with mean weights."""
    assert evaluate_posterior(untrained(MAP()), TASK.test).averaging is None
    assert evaluate_posterior(field, TASK.test, num_draws=0).averaging is None


def test_laplace_is_not_taken_for_draws(laplace: Posterior) -> None:
    """Law: its points are named as such, have no Monte Carlo error and no curve over draws, and its mean weights are
    its MAP estimate."""
    found = evaluate_posterior(laplace, TASK.test)
    assert (found.num_draws, found.joint_draws) == (32, False)
    assert "32 quasi-Monte Carlo point(s)" in str(found)
    assert found.uncertainty["mutual_information"]["monte_carlo_error"] is None
    assert found.averaging is not None and found.averaging["by_draws"] is None
    labels = np.array(TASK.test["labels"])
    assert found.averaging["mean_weights"] == pytest.approx(nll(laplace.predict(TASK.test, 0).log_mean.numpy(), labels))
    assert untrained(MeanField()).predict(TASK.test, 2).joint and not laplace.predict(TASK.test).joint


def test_joint_draws_of_laplace_are_draws(laplace: Posterior) -> None:
    """Law: with its linearised draws of the weights, and with mean weights, Laplace is evaluated like any other."""
    assert laplace.predict(TASK.test, 0).joint
    posterior = copy.copy(laplace)
    posterior.guide = copy.deepcopy(laplace.guide)
    posterior.guide.predictive = "joint"
    found = evaluate_posterior(posterior, TASK.test, num_draws=4)
    assert (found.num_draws, found.joint_draws) == (4, True)
    assert found.averaging["by_draws"]["sizes"] == [1, 4]
    assert found.uncertainty["mutual_information"]["monte_carlo_error"] is not None


def test_it_says_what_it_found(field: Posterior) -> None:
    """Law: uncertainty, the NLL by draws and every other split are a line each, with the numbers."""
    found = evaluate_posterior(field, TASK.test, ood={"far": TASK.validation}, num_draws=4)
    said = str(found)
    assert f"epistemic {found.uncertainty['mutual_information']['value']:.4f} nats (Monte Carlo error" in said
    assert f"{found.averaging['mean_weights']:.4f} with mean weights" in said and " with 4" in said
    area = found.ood["far"]["scores"]["entropy"]["auroc"]
    assert "far, 16 examples told apart (AUROC): max probability" in said and f"entropy {area.value:.3f}" in said
    nothing = evaluate_prediction(predicted(1, 9), mean_weights=predicted(1, 9))
    assert "averaging changes nothing that these examples show" in str(nothing)


def test_metrics_are_of_the_mean_predictive(field: Posterior) -> None:
    """Law: NLL and accuracy are those of probabilities averaged over draws, computed by hand."""
    found = evaluate_posterior(field, TASK.test, num_draws=4)
    draws = field.predict(TASK.test, 4).draws
    assert draws is not None
    mean, labels = draws.exp().mean(0).numpy(), np.array(TASK.test["labels"])
    assert found.metrics["nll"].value == pytest.approx(nll(np.log(mean), labels), rel=1e-5)
    assert found.metrics["accuracy"].value == pytest.approx((mean.argmax(-1) == labels).mean())
    assert found.scaling is None and found.scaled_metrics is None


def test_examples_of_interest(field: Posterior) -> None:
    """Law: examples carry text, label, mean and draws; wrong ones come first, the most confident before the others."""
    prediction = field.predict(TASK.test, 4)
    rows = interesting(prediction, count=3)
    assert prediction.texts is not None and prediction.labels is not None
    for row in rows:
        assert row["text"] in prediction.texts
        assert np.shape(row["draws"]) == (4, 2)
        assert np.allclose(np.mean(row["draws"], 0), row["probabilities"], atol=1e-5)
    wrong = [bool(np.argmax(row["probabilities"]) != row["label"]) for row in rows]
    errors = int((prediction.mean.argmax(-1) != prediction.labels).sum())
    assert sum(wrong[: min(3, errors)]) == min(3, errors) > 0
    confidence = [max(row["probabilities"]) for row in rows[: min(3, errors)]]
    assert confidence == sorted(confidence, reverse=True)
    most = prediction.mutual_information.max().item()
    assert max(row["mutual_information"] for row in rows) == pytest.approx(most)
    json.dumps(rows)


def test_no_wrong_example_where_all_are_right() -> None:
    """Law: without errors only doubt makes an example interesting, and one with both is listed once."""
    builder = PredictionBuilder(3, 2)
    builder.add(torch.tensor([[[0.9, 0.1], [0.6, 0.4], [0.8, 0.2]], [[0.9, 0.1], [0.95, 0.05], [0.7, 0.3]]]).log())
    for labels in ([0, 0, 0], [0, 1, 0]):
        made = builder.build(torch.arange(3), {"labels": labels, "text": ["a", "b", "c"]})
        assert [row["text"] for row in interesting(made, count=2)] == ["b", "c"]


def test_an_evaluation_is_json(field: Posterior) -> None:
    """Law: to_dict survives JSON unchanged."""
    found = evaluate_posterior(field, TASK.test, scaling=2.0, num_draws=2).to_dict()
    assert json.loads(json.dumps(found)) == found


def test_an_evaluation_reads_as_a_table(field: Posterior) -> None:
    """Law: each metric is a line with its value, interval and scaled value; τ is named where there is one."""
    found = evaluate_posterior(field, TASK.test, scaling=2.0, num_draws=2)
    head, *rows = str(found).splitlines()
    assert "τ = 2.00" in head and "12 examples, 2 draw(s)" in head
    assert [row.split()[0] for row in rows[: len(found.metrics)]] == list(found.metrics)
    assert found.scaled_metrics is not None
    nll = found.metrics["nll"]
    line = next(row for row in rows if row.startswith("  nll"))
    for number in (nll.value, nll.low, nll.high, found.scaled_metrics["nll"].value):
        assert f"{number:.4f}" in line
    assert "τ" not in str(evaluate_posterior(field, TASK.test, num_draws=2))


def test_without_texts_no_examples() -> None:
    """Law: a prediction without texts or labels has no examples to show."""
    builder = PredictionBuilder(1, 1)
    builder.add(torch.tensor([[[0.5, 0.5]]]).log())
    made = builder.build(torch.arange(1), {"labels": [0]})
    assert interesting(made) == []
