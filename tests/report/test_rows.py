from __future__ import annotations

import math

import pytest

from pyrolora.report.rows import Interval, Move, intervals_svg, moves_svg
from tests.report.drawings import check, titles

ROWS = [
    Interval("MAP", "red", -0.1, -0.2, 0.05, False),
    Interval("MeanField", "blue", -0.5, -0.6, -0.4, True),
    Interval("broken", "green", math.nan, math.nan, math.nan, False),
]


def test_intervals_stand_where_their_numbers_are() -> None:
    """Law: dot and ends are in proportion to the zero line; filled where real, hollow elsewhere."""
    root = check(intervals_svg(ROWS, axis="difference", label="l"))
    groups = root.findall("g")
    assert len(groups) == 2
    zero = next(float(node.attrib["x1"]) for node in root.findall("line") if node.attrib["stroke-opacity"] == ".55")
    places = [float(group.find("circle").attrib["cx"]) - zero for group in groups]
    assert places[1] == pytest.approx(5 * places[0], abs=0.5)
    ends = [(float(g.find("line").attrib["x1"]) - zero, float(g.find("line").attrib["x2"]) - zero) for g in groups]
    assert ends[0][0] / ends[0][1] == pytest.approx(-4, abs=0.1) and ends[1][1] < 0
    assert [group.find("circle").attrib["fill"] == "currentColor" for group in groups] == [False, True]
    assert titles(root)[1] == "MeanField: -0.500, 95 % interval -0.600 to -0.400"
    assert any("not finite" in (node.text or "") for node in root.iter("text"))


def test_rows_without_any_number_are_drawn() -> None:
    """Law: if nothing is known, and if all differences are exactly 0, there is a frame and no division by zero."""
    check(intervals_svg([ROWS[2]], axis="a", label="l"))
    check(intervals_svg([Interval("same", "red", 0.0, 0.0, 0.0, False)], axis="a", label="l"))


def test_moves_lead_from_dot_to_diamonds() -> None:
    """Law: one dot and one diamond for each other split, in proportion; what is not finite is left out."""
    rows = [Move("one", "red", 0.2, [("far", 0.6), ("near", 0.4)]), Move("two", "blue", 0.3, [("far", math.inf)])]
    root = check(moves_svg(rows, axis="ECE", label="l"))
    groups = root.findall("g")
    dot = float(groups[0].find("circle").attrib["cx"])
    far, near = (
        float(node.attrib["transform"].removeprefix("translate(").split()[0]) for node in groups[0].iter("rect")
    )
    assert far - dot == pytest.approx(2 * (near - dot), abs=0.3) and near > dot
    assert titles(root) == ["one, far: 0.600", "one, near: 0.400"]
    check(moves_svg([Move("none", "red", math.nan, [("far", math.nan)])], axis="ECE", label="l"))
