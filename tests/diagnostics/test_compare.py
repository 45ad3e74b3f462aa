from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from pyrolora.diagnostics.calibration import resampled
from pyrolora.diagnostics.compare import Comparison, compare
from pyrolora.diagnostics.differences import difference
from pyrolora.diagnostics.evaluation import MAIN, evaluate_posterior, fit_scaling
from pyrolora.diagnostics.temperature import scale
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from tests.programs import relabelled, sentence_task, untrained

TASK = sentence_task()


def nll(log_mean: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    weights = np.exp(log_mean / temperature)
    return float(-np.log((weights / weights.sum(-1, keepdims=True))[np.arange(len(labels)), labels]).mean())


@pytest.fixture(scope="module")
def field() -> Posterior:
    return untrained(MeanField(random="*"))


def test_one_evaluator(field: Posterior) -> None:
    """Law: every posterior is scored on the same rows, with the same metrics and the same draws at every call."""
    found = compare({"map": untrained(MAP()), "field": field}, TASK.test, num_draws=4).evaluations
    again = compare({"field": field}, TASK.test, num_draws=4).evaluations
    assert found["map"].metrics.keys() == found["field"].metrics.keys() >= set(MAIN)
    assert found["map"].num_examples == found["field"].num_examples == len(TASK.test)
    assert (found["map"].num_draws, found["field"].num_draws) == (1, 4)
    assert again["field"].metrics == found["field"].metrics
    other = compare({"field": field}, TASK.test, num_draws=4, seed=1).evaluations
    assert other["field"].metrics["nll"].value != found["field"].metrics["nll"].value


def test_scaling_is_fitted_on_validation(field: Posterior) -> None:
    """Law: τ minimises the NLL of the validation split, found again by a grid; the scaled metrics use it."""
    found = compare({"field": field}, TASK.test, validation=TASK.validation, num_draws=4).evaluations["field"]
    assert found.scaling is not None and found.scaled_metrics is not None
    held_out = field.predict(TASK.validation, 4).log_mean.numpy()
    grid = np.exp(np.linspace(-3, 5, 4001))
    losses = [nll(held_out, np.array(TASK.validation["labels"]), tau) for tau in grid]
    assert found.scaling == pytest.approx(grid[int(np.argmin(losses))], rel=0.01)
    reported, labels = field.predict(TASK.test, 4).log_mean.numpy(), np.array(TASK.test["labels"])
    assert found.scaled_metrics["nll"].value == pytest.approx(nll(reported, labels, found.scaling), rel=1e-5)
    assert found.scaled_metrics["accuracy"].value == found.metrics["accuracy"].value


def test_reported_labels_choose_nothing(field: Posterior) -> None:
    """Law: other labels of the reported split leave τ where it is; other labels of the validation split move it."""

    def scaling(test: Dataset, validation: Dataset) -> float | None:
        found = compare({"field": field}, test, validation=validation, num_draws=2)
        return found.evaluations["field"].scaling

    first = scaling(TASK.test, TASK.validation)
    assert scaling(relabelled(TASK.test, 0), TASK.validation) == first
    assert scaling(TASK.test, relabelled(TASK.validation, 0)) != first
    assert fit_scaling(field, TASK.validation, num_draws=2) == first


def test_shows_itself(field: Posterior) -> None:
    """Law: a comparison is a table: a row for each method and for each scaled predictive, in text and in HTML."""
    comparison = compare({"a <b>": field}, TASK.test, validation=TASK.validation, num_draws=2)
    assert isinstance(comparison, Comparison)
    table = comparison.to_pandas()
    assert list(table.columns) == list(MAIN)
    tau = comparison.evaluations["a <b>"].scaling
    assert list(table.index) == ["a <b>", f"a <b>, τ = {tau:.2f}"]
    assert table.loc["a <b>", "nll"] == comparison.evaluations["a <b>"].metrics["nll"].value
    assert f"{table.loc['a <b>', 'nll']:.3f}" in repr(comparison)
    assert "a &lt;b&gt;" in comparison._repr_html_() and "<b>" not in comparison._repr_html_()


def test_differences_are_of_the_same_resamples(field: Posterior) -> None:
    """Law: contrasts are the paired differences of metrics that are computed anew from the predictions."""
    point = untrained(MAP())
    found = compare({"point": point, "field": field}, TASK.test, validation=TASK.validation, num_draws=4)
    pairs = [(each.method, each.scaled, each.baseline, each.baseline_scaled) for each in found.contrasts]
    assert pairs == [
        ("point", True, "point", False),
        ("field", False, "point", False),
        ("field", False, "point", True),
        ("field", True, "point", True),
    ]
    labels = np.array(TASK.test["labels"])
    tau = found.evaluations["point"].scaling
    ours = resampled(field.predict(TASK.test, 4).log_mean.numpy(), labels)
    theirs = resampled(scale(point.predict(TASK.test).log_mean.numpy(), tau), labels)
    for metric in ("accuracy", "nll", "classwise_ece"):
        assert found.contrasts[2].metrics[metric] == difference({0: ours[metric]}, {0: theirs[metric]})
    table = found.differences()
    assert len(table) == sum(len(each.metrics) for each in found.contrasts)
    row = table[(table.method == "field") & (table.baseline == "point, scaled") & (table.metric == "nll")].iloc[0]
    assert row.difference == found.contrasts[2].metrics["nll"].value and row.low < row.difference < row.high


def test_the_baseline_is_named(field: Posterior) -> None:
    """Law: the first posterior is the baseline unless another is named; an unknown name is refused."""
    posteriors = {"one": untrained(MAP()), "two": field}
    assert {each.baseline for each in compare(posteriors, TASK.test, num_draws=2).contrasts} == {"one"}
    (only,) = compare(posteriors, TASK.test, num_draws=2, baseline="two").contrasts
    assert (only.method, only.baseline) == ("one", "two")
    with pytest.raises(ValueError, match="'three' is none of the posteriors one, two"):
        compare(posteriors, TASK.test, baseline="three")


def test_a_notebook_shows_intervals_and_verdicts(field: Posterior) -> None:
    """Law: the HTML table has values with intervals, the numbers of examples and draws, and says what is undecided."""
    comparison = compare({"point": untrained(MAP()), "field": field, "same": field}, TASK.test, num_draws=4)
    page = comparison._repr_html_()
    nll = comparison.evaluations["field"].metrics["nll"]
    assert f"{nll.value:.3f} [{nll.low:.3f}, {nll.high:.3f}]" in page
    assert "12 examples, 1 or 4 draws" in page and "field against point: accuracy" in page
    again = compare({"field": field, "same": field}, TASK.test, num_draws=4)._repr_html_()
    assert "nll +0.000 [+0.000, +0.000] (undecided)" in again


def test_nothing_to_score(field: Posterior) -> None:
    """Law: data without labels, or with unknown ones, and an empty comparison are refused with the reason."""
    with pytest.raises(ValueError, match="no labels"):
        evaluate_posterior(field, TASK.test.remove_columns("labels"), num_draws=2)
    with pytest.raises(ValueError, match="12 of 12 labels are unknown"):
        evaluate_posterior(field, relabelled(TASK.test, -1), num_draws=2)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, TASK.test)
