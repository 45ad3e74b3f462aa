from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from pyrolora.diagnostics.compare import MAIN, Comparison, compare, evaluate_posterior, fit_scaling, interesting
from pyrolora.guides.base import Guide
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction, PredictionBuilder
from tests.programs import sentence_task, tiny_program

TASK = sentence_task()


def posterior(guide: Guide) -> Posterior:
    """An untrained posterior: as bound, with some weights moved off zero so that draws differ."""
    program = tiny_program()
    guide.bind(program)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Posterior(program, guide)


def relabelled(data: Dataset, label: int) -> Dataset:
    return data.remove_columns("labels").add_column("labels", [label] * len(data))


def nll(log_mean: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    weights = np.exp(log_mean / temperature)
    return float(-np.log((weights / weights.sum(-1, keepdims=True))[np.arange(len(labels)), labels]).mean())


@pytest.fixture(scope="module")
def field() -> Posterior:
    return posterior(MeanField(random="*"))


def test_one_evaluator(field: Posterior) -> None:
    """Law: every posterior is scored on the same rows, with the same metrics and the same draws at every call."""
    found = compare({"map": posterior(MAP()), "field": field}, TASK.test, num_draws=4).evaluations
    again = compare({"field": field}, TASK.test, num_draws=4).evaluations
    assert found["map"].metrics.keys() == found["field"].metrics.keys() >= set(MAIN)
    assert found["map"].num_examples == found["field"].num_examples == len(TASK.test)
    assert (found["map"].num_draws, found["field"].num_draws) == (1, 4)
    assert again["field"].metrics == found["field"].metrics
    other = compare({"field": field}, TASK.test, num_draws=4, seed=1).evaluations
    assert other["field"].metrics["nll"].value != found["field"].metrics["nll"].value


def test_metrics_are_of_the_mean_predictive(field: Posterior) -> None:
    """Law: NLL and accuracy are those of probabilities averaged over draws, computed by hand."""
    found = evaluate_posterior(field, TASK.test, num_draws=4)
    draws = field.predict(TASK.test, 4).draws
    assert draws is not None
    mean, labels = draws.exp().mean(0).numpy(), np.array(TASK.test["labels"])
    assert found.metrics["nll"].value == pytest.approx(nll(np.log(mean), labels), rel=1e-5)
    assert found.metrics["accuracy"].value == pytest.approx((mean.argmax(-1) == labels).mean())
    assert found.scaling is None and found.scaled_metrics is None


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


def test_an_evaluation_is_json(field: Posterior) -> None:
    """Law: to_dict survives JSON unchanged."""
    found = evaluate_posterior(field, TASK.test, scaling=2.0, num_draws=2).to_dict()
    assert json.loads(json.dumps(found)) == found


def test_an_evaluation_reads_as_a_table(field: Posterior) -> None:
    """Law: each metric is a line with its value, interval and scaled value; τ is named where there is one."""
    found = evaluate_posterior(field, TASK.test, scaling=2.0, num_draws=2)
    head, *rows = str(found).splitlines()
    assert "τ = 2.00" in head and "12 examples" in head
    assert [row.split()[0] for row in rows] == list(found.metrics)
    assert found.scaled_metrics is not None
    nll = found.metrics["nll"]
    line = next(row for row in rows if row.startswith("  nll"))
    for number in (nll.value, nll.low, nll.high, found.scaled_metrics["nll"].value):
        assert f"{number:.4f}" in line
    assert "τ" not in str(evaluate_posterior(field, TASK.test, num_draws=2))


def test_nothing_to_score(field: Posterior) -> None:
    """Law: data without labels, or with unknown ones, and an empty comparison are refused with the reason."""
    with pytest.raises(ValueError, match="no labels"):
        evaluate_posterior(field, TASK.test.remove_columns("labels"), num_draws=2)
    with pytest.raises(ValueError, match="12 of 12 labels are unknown"):
        evaluate_posterior(field, relabelled(TASK.test, -1), num_draws=2)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({}, TASK.test)


def test_without_texts_no_examples() -> None:
    """Law: a prediction without texts or labels has no examples to show."""
    builder = PredictionBuilder(1, 1)
    builder.add(torch.tensor([[[0.5, 0.5]]]).log())
    made: Prediction = builder.build(torch.arange(1), {"labels": [0]})
    assert interesting(made) == []
