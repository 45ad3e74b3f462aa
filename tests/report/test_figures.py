from __future__ import annotations

import math

import pytest

from pyrolora.report import figures
from pyrolora.report.view import View
from tests.report.drawings import check, titles
from tests.report.samples import results


@pytest.fixture
def view() -> View:
    return View.of(results())


def test_diagrams_pool_the_seeds() -> None:
    """Law: counts are averaged over seeds, accuracy and confidence weighted by count; other bins are left out."""
    edges = [0.0, 0.5, 1.0]
    first = {"edges": edges, "confidence": [None, 0.9], "accuracy": [None, 0.7], "count": [0, 600]}
    second = {"edges": edges, "confidence": [None, 0.8], "accuracy": [None, 0.5], "count": [0, 200]}
    found = figures.pooled([first, second, {**first, "edges": [0.0, 1.0]}])
    assert found["count"] == [0, 400] and found["confidence"] == [None, pytest.approx(0.875)]
    assert found["accuracy"] == [None, pytest.approx(0.65)]
    assert figures.pooled([]) is None


def test_reliability_has_its_numbers_beside_it(view: View) -> None:
    """Law: a diagram for each method, with a table of its bins."""
    first, second = figures.reliability(view)
    assert (first.title, second.title) == ("LoRA", "MeanField") and "about LoRA" in first.note
    assert first.table.rows[0].cells[:3] == ["600", "0.900", "0.700"]
    check(first.svg)


def test_differences_have_a_panel_for_each_question(view: View) -> None:
    """Law: NLL, ECE and accuracy against the baseline as fitted, NLL against it scaled; scaled methods stay out."""
    found = figures.differences(view)
    assert [each.title for each in found] == [
        "NLL against LoRA", "NLL against LoRA, scaled", "ECE against LoRA", "Accuracy against LoRA"
    ]  # fmt: skip
    assert [len(titles(check(each.svg))) for each in found] == [1, 1, 1, 1]
    assert "left is better" in found[0].svg and "right is better" in found[3].svg
    assert figures.differences(View.of(results() | {"contrasts": None})) == []


def test_risk_coverage_is_a_mean_over_seeds() -> None:
    """Law: lines are means over seeds in per cent; a method without a curve has none; no curve at all, no figure."""
    made = results()
    made["cells"][0]["risk_coverage"]["risk"] = [0.3, 0.4]
    found = figures.risk_coverage(View.of(made))
    words = check(found["svg"]).findtext("desc")
    assert "MeanField: from 20 to 30" in words and "LoRA: from 10 to 20" in words
    assert [line["name"] for line in found["legend"]] == ["LoRA", "MeanField"]
    for one in made["cells"]:
        one["risk_coverage"] = None
    assert figures.risk_coverage(View.of(made)) is None


def test_averaging_leads_from_mean_weights_to_all_draws(view: View) -> None:
    """Law: a line through mean weights, 1, … S draws for methods that have draws; means over seeds in the table."""
    found = figures.averaging(view)
    assert [line["name"] for line in found["legend"]] == ["MeanField"]
    assert "from 0.66 to 0.46" in check(found["svg"]).findtext("desc")
    (row,) = found["table"].rows
    assert row.cells == ["0.660", "0.560", "0.460", "0.460", "−0.200; real in 2 of 2 fits"]


def test_points_are_not_drawn_as_draws() -> None:
    """Law: a method whose points are not draws of the weights has its numbers, and no line."""
    made = results()
    for one in made["cells"]:
        if one["averaging"]:
            one["averaging"]["by_draws"], one["joint_draws"] = None, False
    found = figures.averaging(View.of(made))
    assert found["svg"] == "" and found["legend"] == []
    assert found["table"].rows[0].cells == ["0.660", "0.460", "−0.200; real in 2 of 2 fits"]


def test_uncertainty_by_split(view: View) -> None:
    """Law: a panel for the split and for each other that has numbers; epistemic with its Monte Carlo error, which falls
    with the number of seeds; without the split of uncertainty only the total is drawn."""
    found = figures.uncertainty(view)
    assert [each.title for each in found["figures"]] == ["test", "arc_easy"]
    cells = {(row.name, row.cells[0]): row.cells[1:] for row in found["table"].rows}
    assert cells["MeanField", "test"] == ["0.450", "0.400", f"0.0500 ± {0.003 / math.sqrt(2):.4f}"]
    assert cells["LoRA", "test"][2] == "0.0000" and cells["MeanField", "arc_easy"][2] == "0.2000"
    closed = results()
    for one in closed["cells"]:
        one["uncertainty"], one["ood"] = {"entropy": {"value": 0.3}}, {}
    (only,) = figures.uncertainty(View.of(closed))["figures"]
    assert "total 0.300 nats, not split" in check(only.svg).findtext("desc")


def test_shift_moves_from_split_to_split(view: View) -> None:
    """Law: NLL and ECE of each method on both splits; without another labelled split there is no figure."""
    nll, ece = figures.shift(view)
    assert titles(check(nll.svg)) == ["LoRA, arc_easy: 1.300", "MeanField, arc_easy: 0.912"]
    assert ece.title == "ECE"
    alone = results()
    alone["cells"] = [one for one in alone["cells"] if one["split"] == "test"]
    assert figures.shift(View.of(alone)) == []


def test_detection_has_histograms_and_scores(view: View) -> None:
    """Law: a histogram for each method, all seeds together; a row for each score a method has; chance is stated."""
    (found,) = figures.detection(view)
    assert (found["split"], found["size"]) == ("arc_easy", 77)
    assert [each.title for each in found["figures"]] == ["LoRA", "MeanField"]
    assert "67 % of test, 22 % of arc_easy" in titles(check(found["figures"][0].svg))[0]
    assert [(row.name, row.cells[0]) for row in found["table"].rows] == [
        ("LoRA", "max probability"), ("LoRA", "entropy"),
        ("MeanField", "max probability"), ("MeanField", "entropy"), ("MeanField", "mutual information"),
    ]  # fmt: skip
    assert "0.750" in found["table"].rows[4].cells[1] and f"{77 / 677:.2f}" in found["table"].caption


def test_costs_double_along_the_axis(view: View) -> None:
    """Law: passes stand on a scale of powers of two, times on a linear one; a cost that is unknown is left out."""
    passes, seconds = figures.costs(view)
    words = [node.text for node in check(passes.svg).iter("text")]
    assert {"1", "2", "4", "8", "16", "LoRA", "MeanField"} <= set(words)
    check(seconds.svg)
    saved = results()
    for one in saved["cells"]:
        one["cost"]["fit_seconds"] = None
    assert [each.title for each in figures.costs(View.of(saved))] == [passes.title]


def test_heat_maps_are_drawn_where_results_have_them(view: View) -> None:
    """Law: each entry with a finite number is a picture and a table; an empty one is left out."""
    (found,) = figures.heatmaps(view)
    assert titles(check(found.svg)) == ["query, layer 0: 0.1 ratio", "query, layer 1: 0.4 ratio"]
    assert found.table.columns == ["sites", "0", "1"] and found.table.rows[0].cells == ["0.100", "0.400"]
    assert found.colour == view.colour("MeanField")
    assert figures.heatmaps(View.of({"heatmaps": [{"values": {"q": {"0": None}}}, {}]})) == []


def test_the_overview_says_who_is_missing() -> None:
    """Law: a method without a finite NLL or ECE is named, not drawn."""
    made = results()
    for one in made["cells"]:
        if one["method"] == "LoRA":
            one["metrics"]["nll"]["value"] = math.inf
    found = figures.overview(View.of(made))
    assert found["missing"] == ["LoRA"] and "MeanField" in found["svg"]
