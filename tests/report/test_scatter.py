from __future__ import annotations

import math

import pytest

from pyrolora.report.scatter import Point, scatter_svg
from tests.report.drawings import check, numbers

NAMES = ("NLL", "ECE")


def test_every_method_is_named_and_labels_stay_apart() -> None:
    """Law: each method has a mark and a label, and no two labels overlap although the marks nearly coincide."""
    points = [Point(f"method {i}", "red", 0.5 + 1e-3 * i, 0.05, 0.01, 0.01, (0.49, 0.02)) for i in range(3)]
    points.append(Point("<far>", "var(--baseline)", 2.0, 0.3))
    root = check(scatter_svg(points, names=NAMES, label="NLL against ECE"))
    groups = root.findall("g")
    assert [group.findall("text")[-1].text for group in groups] == [point.name for point in points]
    assert [len(group.findall("circle")) for group in groups] == [2, 2, 2, 1]
    places = [
        (float(group.findall("text")[-1].attrib["x"]), float(group.findall("text")[-1].attrib["y"])) for group in groups
    ]
    for i, (x, y) in enumerate(places):
        for other_x, other_y in places[:i]:
            assert abs(y - other_y) >= 13 or abs(x - other_x) >= 6 * len("method 0")
    assert "<far>: 2 and 0.3" in (root.findtext("desc") or "")


@pytest.mark.parametrize("x, y", [(0.0, 0.0), (0.7, 0.1)])
def test_a_single_point_is_finite(x: float, y: float) -> None:
    """Law: one method, even at the origin, gives a drawing without division by zero."""
    assert all(map(math.isfinite, numbers(scatter_svg([Point("one", "red", x, y)], names=NAMES, label="l"))))


def test_ticks_can_be_given() -> None:
    """Law: given ticks stand where they are with their words, and are inside the frame."""
    svg = scatter_svg([Point("one", "red", 1.0, 0.1)], names=NAMES, label="l", across=[(0.0, "1"), (4.0, "16")])
    places = {node.text: float(node.attrib["x"]) for node in check(svg).iter("text")}
    mark = next(check(svg).iter("circle"))
    assert 44 < places["1"] < float(mark.attrib["cx"]) < places["16"] < 352
    assert places["16"] - places["1"] == pytest.approx(4 * (float(mark.attrib["cx"]) - places["1"]), abs=0.5)
