from __future__ import annotations

import math

import numpy as np
import pytest

from pyrolora.report.svg import Axes, bar, finite, limits, line, picture, room, shortened, text, ticks, told, vertical
from tests.report.drawings import check, parsed

EVIL = '<script>"x" & y</script>'


@pytest.mark.parametrize("low, high", [(0.4, 0.8), (0.0, 0.013), (1.0, 900.0), (-0.2, 0.3), (0.1, 0.1000001)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    """Law: two to six ticks, equally spaced, inside the range."""
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert np.ptp(np.diff(found)) < 1e-9 * max(1, high)


@pytest.mark.parametrize("values", [[0.0], [0.3, 0.3], [1.0, 5.0], [-2.0, 3.0], [0.001, 0.9]])
def test_limits_hold_the_values(values: list[float]) -> None:
    """Law: every value is inside, the range is not empty, and does not go below 0 where no value does."""
    low, high = limits(values)
    assert low <= min(values) <= max(values) < high
    assert (low >= 0) == (min(values) >= 0)


def test_a_least_span_keeps_little_differences_little() -> None:
    """Law: the range is no less than asked for, around the values; more where they need more."""
    low, high = limits([0.6784, 0.6788], span=0.05)
    assert high - low == pytest.approx(0.05) and (low + high) / 2 == pytest.approx(0.6786)
    assert limits([0.1, 0.9], span=0.05) == limits([0.1, 0.9])


def test_long_numbers_have_room() -> None:
    """Law: an axis moves to the right as its numbers grow longer."""
    assert 44.0 <= room(0.0, 1.0) < 50.0 < room(0.67841, 0.67879)


def test_axes_map_ends_to_ends() -> None:
    """Law: the lowest value stands at the left and at the bottom, the highest opposite, the middle one halfway."""
    axes = Axes((10.0, 110.0, 5.0, 85.0), (2.0, 4.0), (-1.0, 1.0))
    assert [axes.x(value) for value in (2.0, 3.0, 4.0)] == [10.0, 60.0, 110.0]
    assert [axes.y(value) for value in (-1.0, 0.0, 1.0)] == [85.0, 45.0, 5.0]


def test_the_grid_has_its_numbers_and_names() -> None:
    """Law: a line and a number for each tick, those given or round ones; names where there are some."""
    axes = Axes((40.0, 140.0, 5.0, 85.0), (0.0, 1.0), (0.0, 2.0))
    svg = picture(160, 120, axes.grid(across=[(0.5, "half")], names=("a", "b")), label="l", name="n", words="w")
    words = [node.text for node in check(svg).iter("text")]
    assert words[0] == "half" and words[-2:] == ["a", "b"]
    assert words[1:-2] == [f"{tick:g}" for tick in ticks(0.0, 2.0)]
    bare = picture(160, 120, axes.grid(across=[], up=[]), label="l", name="n")
    assert not list(parsed(bare).iter("text")) and parsed(bare).find("desc") is None


def test_everything_is_escaped() -> None:
    """Law: words from outside are text and attributes, never markup."""
    parts = [
        text(1, 2, EVIL),
        vertical(1, 2, EVIL),
        told(EVIL, line(0, 0, 1, 1) + bar(0, 0, 1, 1), style=f"color:{EVIL}"),
    ]
    root = parsed(picture(10, 10, parts, label=EVIL, name="n", words=EVIL))
    assert root.attrib["aria-label"] == EVIL == root.findtext("desc")
    assert [node.tag for node in root] == ["desc", "text", "text", "g"]
    assert root.find("g/title").text == EVIL and EVIL in root.find("g").attrib["style"]


def test_numbers_and_names() -> None:
    """Law: NaN, infinity, booleans and words are no numbers to draw; long names end in an ellipsis."""
    assert [finite(value) for value in (1, 0.5, math.nan, math.inf, None, "1", True)] == [True, True] + [False] * 5
    assert shortened("MeanField", 9) == "MeanField"
    assert shortened("MeanField", 5) == "Mean…" and len(shortened("x" * 99, 17)) == 17
