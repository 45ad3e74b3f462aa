from __future__ import annotations

import math

import pytest

from pyrolora.report import tables
from pyrolora.report.summary import Spread
from pyrolora.report.view import View
from tests.report.samples import contrast, results


@pytest.fixture
def view() -> View:
    return View.of(results())


def test_a_mean_has_its_spread() -> None:
    """Law: ± the deviation over seeds; for one seed its interval; alone where neither is known; bold where asked."""
    assert tables.stat(Spread(0.5, 0.1, 0.3, 0.7, 2)) == "0.500 <small>± 0.100</small>"
    assert tables.stat(Spread(0.5, None, 0.3, 0.7, 1)) == "0.500 <small>0.300–0.700</small>"
    assert tables.stat(Spread(None, None, None, None, 0), bold=True) == "<strong>–</strong>"


def test_the_best_is_bold(view: View) -> None:
    """Law: of each predictive and metric the best mean is bold: highest accuracy, lowest of the rest."""
    results_ = {block["lines"][0]["label"]: block["lines"] for block in tables.results_rows(view)}
    assert [line["scaled"] for line in results_["MeanField"]] == [False, True]
    assert results_["MeanField"][1]["label"] == "τ = 1.42"
    bold = [["<strong>" in cell for cell in results_[name][0]["cells"]] for name in ("LoRA", "MeanField")]
    assert bold == [[True, False, False, True], [False, True, True, False]]


def test_details_have_every_seed(view: View) -> None:
    """Law: a row for each seed and predictive, every metric that occurs, the usual ones first."""
    found = tables.details(view)
    assert len(found["rows"]) == 8
    assert found["columns"][:3] == ["accuracy ↑", "NLL ↓", "ECE ↓"] and "class-wise ECE ↓" in found["columns"]
    assert tables.column("something_new") == "something new"


def test_selective_prediction(view: View) -> None:
    """Law: columns are the metrics that occur; without any there is no table."""
    table = tables.selective(view)
    assert table is not None
    assert table.columns == ["method", "AURC ↓", "excess AURC ↓", "error AUROC ↑", "accuracy at 80 % ↑"]
    assert [row.name for row in table.rows] == ["LoRA", "MeanField"] and "0.710" in table.rows[0].cells[2]
    bare = results()
    for one in bare["cells"]:
        one["metrics"] = None
    assert tables.selective(View.of(bare)) is None


def test_differences_have_verdicts(view: View) -> None:
    """Law: one table against the baseline as fitted, one against it scaled; better and worse by the metric's own
    direction, and only where the interval decides."""
    fitted, scaled = tables.differences(view)
    assert [row.name for row in fitted.rows] == ["LoRA, scaled", "MeanField"]
    assert [row.name for row in scaled.rows] == ["MeanField", "MeanField, scaled"]
    accuracy, nll = fitted.rows[1].cells[:2]
    assert "<strong>−0.250</strong>" in nll and "−0.300 to −0.200" in nll and 'class="better"' in nll
    assert 'class="worse"' in accuracy
    assert "<strong>" not in scaled.rows[0].cells[1] and "undecided" in scaled.rows[0].cells[1]
    assert tables.verdict({"value": 0.1, "real": True}, "error_auroc") == "better"
    assert tables.verdict({"value": math.nan, "real": True}, "nll") == "undecided"
    broken = results() | {"contrasts": [contrast("MeanField", math.nan, real=False), contrast("gone", 0.1)]}
    (only,) = tables.differences(View.of(broken))
    assert [row.cells[0] for row in only.rows] == ["–"]


def test_costs_are_means_and_ratios(view: View) -> None:
    """Law: means over seeds, memory in megabytes, the fit's time relative to the baseline's."""
    table = tables.costs(view)
    assert table is not None
    row = dict(zip(table.columns, ["MeanField", *table.rows[1].cells], strict=True))
    assert (
        row["fit (s)"] == "9.2"
        and row["peak memory of the fit (MB)"] == "1,200"
        and row["passes per prediction"] == "16"
    )
    assert row["trained parameters"] == "74,496" and row["fit, relative"] == "0.65 ×"
    nothing = results()
    for one in nothing["cells"]:
        one["cost"] = {"fit_seconds": None, "parameters": 1}
    again = tables.costs(View.of(nothing))
    assert again is not None and again.rows[0].cells == ["–", "1", "–"]
    for one in nothing["cells"]:
        one["cost"] = None
    assert tables.costs(View.of(nothing)) is None
