from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from pyrolora.diagnostics.calibration import reliability_curve
from pyrolora.report import plots
from tests.report.drawings import numbers, parsed

NAN = math.nan
CURVE = {
    "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
    "confidence": [None, NAN, 0.6, 0.9],
    "accuracy": [None, NAN, 0.5, 1.0],
    "count": [0, 0, 40, 10],
}


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (3, 7), (40, 40), (450, 1000)])
def test_the_whiskers_are_wilson_intervals(hits, count):
    """The interval of a bin's accuracy is scipy's Wilson interval."""
    curve = {"edges": [0.0, 1.0], "confidence": [0.9], "accuracy": [hits / count], "count": [count]}
    (part,) = plots.bins_of(curve)
    truth = binomtest(hits, count).proportion_ci(method="wilson")
    assert (part.low, part.high) == pytest.approx((truth.low, truth.high), abs=1e-4)


def test_empty_bins_are_left_out():
    """Bins without predictions, with None or with NaN draw nothing; heights of the rest are the accuracies."""
    assert [part.count for part in plots.bins_of(CURVE)] == [40, 10]
    groups = parsed(plots.reliability_svg(CURVE, title="t")).findall("g")
    assert [float(group.findall("rect")[0].get("height")) for group in groups] == pytest.approx([100.0, 200.0])
    counts = [float(group.findall("rect")[2].get("height")) for group in groups]
    assert counts[0] == pytest.approx(4 * counts[1])


@pytest.mark.parametrize("count", [[0, 0, 0, 0], [0, 0, 40, 10], [0.0, 0.0, 2.5, 0.5]])
def test_a_diagram_is_well_formed_finite_and_inside_its_frame(count):
    """The SVG parses, has an accessible name, and no coordinate is NaN or outside the view box."""
    svg = plots.reliability_svg(CURVE | {"count": count}, title='<b>"LoRA" & co</b>')
    root = parsed(svg)
    width, height = (float(value) for value in root.get("viewBox").split()[2:])
    assert root.get("role") == "img" and '<b>"LoRA" & co</b>' in root.get("aria-label")
    assert root.find("desc").text == plots.describe(CURVE | {"count": count})
    assert all(math.isfinite(value) and -1e-9 <= value <= max(width, height) for value in numbers(svg))
    assert "nan" not in svg.lower().replace("mean", "")


def test_a_diagram_is_described_in_words():
    """The accessible name says how many predictions are in bins whose accuracy is below their confidence."""
    assert plots.describe(CURVE).startswith("50 predictions in 2 bins; 80 %")
    assert plots.describe(CURVE | {"count": [0] * 4}) == "No predictions."


def test_curves_from_the_diagnostics_are_drawn():
    """ReliabilityCurve.to_dict() goes through JSON and into the drawing."""
    values = np.log(np.random.default_rng(0).dirichlet(np.ones(3), 200))
    curve = json.loads(json.dumps(reliability_curve(values, values.argmax(1)).to_dict()))
    assert len(parsed(plots.reliability_svg(curve, title="t")).findall("g")) == sum(
        count > 0 for count in curve["count"]
    )


def test_draws_are_sorted_bars_of_their_probability():
    """One bar per draw, ascending, of height proportional to the probability; NaN and None are dropped."""
    root = parsed(plots.draws_svg([0.9, NAN, 0.1, None, 0.5], label="p"))
    bars = [float(rect.get("height")) for rect in root.findall("rect")[1:]]
    assert bars == pytest.approx([22 * p + 1 for p in (0.1, 0.5, 0.9)])
    assert root.get("aria-label") == "p: 3 draws from 0.10 to 0.90"
    assert "no draws" in plots.draws_svg([], label="p")


def test_many_draws_are_thinned_to_order_statistics():
    """Of 1000 draws 32 are shown, with both extremes."""
    values = np.random.default_rng(0).uniform(size=1000)
    root = parsed(plots.draws_svg(values.tolist(), label="p"))
    bars = [float(rect.get("height")) for rect in root.findall("rect")[1:]]
    assert len(bars) == 32 and bars == sorted(bars)
    assert (bars[0], bars[-1]) == pytest.approx((22 * values.min() + 1, 22 * values.max() + 1), abs=0.06)


def test_the_png_has_one_panel_per_curve(tmp_path):
    """The PNG is a readable image, as wide as its panels, and an empty mapping is refused."""
    one = plots.reliability_png({"LoRA": CURVE}, tmp_path / "one.png")
    two = plots.reliability_png({"before": CURVE, "after": CURVE | {"count": [0] * 4}}, tmp_path / "two.png")
    with Image.open(one) as small, Image.open(two) as large:
        assert small.format == large.format == "PNG"
        assert large.width > 1.7 * small.width and large.height == small.height
        assert np.asarray(small.convert("L")).std() > 10
    with pytest.raises(ValueError, match="no curves"):
        plots.reliability_png({}, tmp_path / "none.png")


def test_drawing_touches_no_global_state():
    """The module draws through Figure objects and never loads pyplot."""
    assert "pyplot" not in vars(plots) and not any(
        getattr(value, "__name__", "") == "matplotlib.pyplot" for value in vars(plots).values()
    )
    assert sys.modules[plots.__name__] is plots
