"""What tests of drawings share: the SVG as a tree, and its numbers."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree


def parsed(svg: str) -> ElementTree.Element:
    """The SVG as a tree: refuses markup that is not well formed."""
    return ElementTree.fromstring(svg)


def numbers(svg: str) -> list[float]:
    """Every coordinate in the drawing; a rotated mark's own coordinates are left out."""
    keys = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"}
    nodes = [node for node in parsed(svg).iter() if "translate" not in node.attrib.get("transform", "")]
    found = [float(value) for node in nodes for key, value in node.attrib.items() if key in keys]
    for node in parsed(svg).iter("polyline"):
        found += [float(number) for pair in node.attrib["points"].split() for number in pair.split(",")]
    return found


def check(svg: str) -> ElementTree.Element:
    """The tree of a drawing that has a name and a description, is finite, and stays inside its frame."""
    root = parsed(svg)
    width, height = (float(value) for value in root.attrib["viewBox"].split()[2:])
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] and root.findtext("desc")
    assert all(math.isfinite(value) and -1 <= value <= max(width, height) + 1 for value in numbers(svg))
    return root


def titles(root: ElementTree.Element) -> list[str]:
    """What pointing at the marks tells, in order."""
    return [node.text or "" for node in root.iter("title")]
