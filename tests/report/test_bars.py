from __future__ import annotations

import math

import pytest

from pyrolora.report.bars import Stack, histograms_svg, stacks_svg
from tests.report.drawings import check, titles


def widths(group) -> list[float]:
    return [float(rect.attrib["width"]) for rect in group.findall("rect")]


def test_stacks_are_as_long_as_their_parts() -> None:
    """Law: bars are in proportion to the nats, the second part begins where the first ends."""
    rows = [Stack("one", "red", 0.2, 0.4), Stack("two", "blue", 0.4, 0.0), Stack("closed form", "green", 0.5, None)]
    root = check(stacks_svg(rows, most=math.log(2), label="l"))
    first, second, third = root.findall("g")
    assert widths(first)[1] == pytest.approx(2 * widths(first)[0], abs=0.2)
    assert widths(second) == pytest.approx([2 * widths(first)[0]], abs=0.2)
    assert float(first.findall("rect")[1].attrib["x"]) == pytest.approx(118 + widths(first)[0], abs=0.1)
    assert len(widths(third)) == 1
    assert titles(root)[0] == "one: aleatoric 0.200 nats, epistemic 0.400 nats"
    assert titles(root)[2] == "closed form: total 0.500 nats, not split"


def test_a_missing_stack_leaves_its_row_empty() -> None:
    """Law: NaN draws nothing; the name stays."""
    root = check(stacks_svg([Stack("none", "red", math.nan, None)], most=0.7, label="l"))
    assert not root.findall("g") and "none" in [node.text for node in root.iter("text")]


def test_histograms_are_shares_back_to_back() -> None:
    """Law: heights are shares of each split on a common scale, one upwards, the other downwards."""
    histogram = {"edges": [0.0, 0.2, 0.4], "inside": [30, 10], "outside": [10, 40]}
    root = check(histograms_svg(histogram, split="far", inside="test", label="l"))
    bars = [group.findall("rect") for group in root.findall("g")]
    heights = [[float(rect.attrib["height"]) for rect in pair] for pair in bars]
    assert heights[0] == pytest.approx([72 * 0.75 / 0.8, 72 * 0.2 / 0.8], abs=0.1)
    assert heights[1] == pytest.approx([72 * 0.25 / 0.8, 72.0], abs=0.1)
    for above, below in bars:
        assert float(above.attrib["y"]) + float(above.attrib["height"]) == pytest.approx(92, abs=0.1)
        assert float(below.attrib["y"]) == 94
    assert titles(root)[0] == "entropy 0.00 to 0.20: 75 % of test, 20 % of far"
    assert "about 0.15 nats on test and 0.26 on far" in root.findtext("desc")


def test_empty_histograms_are_drawn() -> None:
    """Law: no examples on a side, and a single class with entropy 0, divide by nothing."""
    check(histograms_svg({"edges": [0.0, 0.5], "inside": [0], "outside": [3]}, split="a", inside="b", label="l"))
    check(histograms_svg({"edges": [0.0, 0.0], "inside": [2], "outside": [3]}, split="a", inside="b", label="l"))
