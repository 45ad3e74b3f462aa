from __future__ import annotations

import math

import pytest

from pyrolora.report.curves import DASHES, Line, lines_svg, sample_svg
from tests.report.drawings import check, parsed, titles

NAMES = ("coverage", "risk")


def places(svg: str) -> list[list[tuple[float, float]]]:
    found = [node.attrib["points"].split() for node in parsed(svg).iter("polyline")]
    return [[(float(x), float(y)) for x, y in (pair.split(",") for pair in line)] for line in found]


def test_lines_go_through_their_points() -> None:
    """Law: points are drawn in their order and proportion, one line each, named where one points at it."""
    lines = [Line("one <b>", "red", [(0, 0.0), (5, 0.5), (10, 1.0)]), Line("two", "blue", [(0, 1.0), (10, 1.0)], "4 2")]
    svg = lines_svg(lines, names=NAMES, label="l")
    first, second = places(svg)
    assert first[1][0] == pytest.approx((first[0][0] + first[2][0]) / 2, abs=0.1)
    assert first[1][1] == pytest.approx((first[0][1] + first[2][1]) / 2, abs=0.1)
    assert first[0][1] > first[2][1] == second[0][1] == second[1][1]
    assert titles(check(svg)) == ["one <b>", "two"]
    assert [node.attrib.get("stroke-dasharray") for node in parsed(svg).iter("polyline")] == [None, "4 2"]
    assert "one <b>: from 0 to 1" in check(svg).findtext("desc")


def test_what_is_not_finite_is_left_out() -> None:
    """Law: NaN, infinity and None break nothing; dots mark the points; without any point it is refused."""
    line = Line("one", "red", [(0, math.nan), (1, 0.5), (2, math.inf), (3, 0.7)], dots=True)
    svg = lines_svg([line, Line("none", "blue", [])], names=NAMES, label="l")
    assert [len(found) for found in places(svg)] == [2, 0]
    assert len(list(check(svg).iter("circle"))) == 2
    with pytest.raises(ValueError, match="no finite point"):
        lines_svg([Line("none", "red", [(0, math.nan)])], names=NAMES, label="l")


def test_a_single_point_is_a_drawing() -> None:
    """Law: one point, and points that all have the same value, divide by nothing."""
    check(lines_svg([Line("one", "red", [(1, 0.0)], dots=True)], names=NAMES, label="l"))
    check(lines_svg([Line("one", "red", [(1, 0.5), (2, 0.5)])], names=NAMES, label="l", across=[(1, "a"), (2, "b")]))


def test_the_legend_shows_the_line() -> None:
    """Law: a sample has the colour and pattern of its line, and is not read aloud."""
    root = parsed(sample_svg(Line("one", "var(--series-0)", [], "7 3")))
    assert root.attrib["aria-hidden"] == "true"
    (line,) = root
    assert line.attrib["stroke-dasharray"] == "7 3" and "var(--series-0)" in line.attrib["style"]
    assert len(set(DASHES)) == len(DASHES)
