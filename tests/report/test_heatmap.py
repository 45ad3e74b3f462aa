from __future__ import annotations

import math
from itertools import pairwise

import pytest

from pyrolora.report.heatmap import heatmap_svg, layers_of
from tests.report.drawings import check, titles

VALUES = {"query": {0: 1.0, 1: 3.0, 10: 2.0}, "head": {"classifier": 2.0}, "value": {0: math.nan, "1": 1.0}}


def opacity(root) -> dict[str, float]:
    cells = [group for group in root.findall("g")]
    return {group.find("title").text: float(group.find("rect").attrib["fill-opacity"]) for group in cells}


def test_layers_in_their_order() -> None:
    """Law: numbered layers count up, 10 after 2, whether keys are numbers or text, as JSON makes them; then names."""
    assert layers_of(VALUES) == ["0", "1", "10", "classifier"]
    assert layers_of({"q": {"11": 1, "2": 1}}) == ["2", "11"]


def test_colour_grows_with_the_value() -> None:
    """Law: the lowest value is pale, the highest full, a value halfway between is halfway; no number, no colour."""
    root = check(heatmap_svg(VALUES, unit="noise", label="l"))
    found = opacity(root)
    assert found["query, layer 0: 1 noise"] == found["value, layer 1: 1 noise"] == 0.08
    assert found["query, layer 1: 3 noise"] == 1.0
    assert found["query, layer 10: 2 noise"] == pytest.approx(0.54)
    assert len(found) == 5 and len(root.findall("rect")) == 3 * 4 - 5
    assert "noise from 1 (pale) to 3" in root.findtext("desc")


def test_many_layers_fit() -> None:
    """Law: eighty layers stay inside the frame, and their numbers do not run into one another."""
    root = check(heatmap_svg({"q": {i: float(i) for i in range(80)}}, unit="u", label="l"))
    places = [float(node.attrib["x"]) for node in root.findall("text") if (node.text or "").isdigit()]
    assert min(b - a for a, b in pairwise(places)) >= 20
    assert len(titles(root)) == 80


def test_equal_values_and_none() -> None:
    """Law: values that are all the same are drawn; without a finite one it is refused."""
    assert set(opacity(check(heatmap_svg({"q": {0: 2.0, 1: 2.0}}, unit="u", label="l"))).values()) == {1.0}
    with pytest.raises(ValueError, match="no finite value"):
        heatmap_svg({"q": {0: None}}, unit="u", label="l")
