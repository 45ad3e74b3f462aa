"""Lines, one for each method: risk against coverage, NLL against the number of draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pyrolora.report.svg import Axes, finite, limits, picture, room, told

DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 4", "1 4")
"""Patterns that tell lines apart without colour; the first is solid."""


@dataclass(frozen=True)
class Line:
    """The line of one method, through (x, y) in the units of the axes; points that are not finite are left out."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    pattern: str = ""
    dots: bool = False


def lines_svg(
    lines: Sequence[Line],
    *,
    names: tuple[str, str],
    label: str,
    across: Sequence[tuple[float, str]] | None = None,
    span: float = 0.0,
) -> str:
    """Lines in one frame; pointing at one says which it is. Names stand in a legend outside the picture.

    Args:
        lines: At least one with a finite point.
        names: Of the axes.
        label: What is shown.
        across: Ticks of the x axis with their words; round numbers by default.
        span: The least range of the y axis.

    Raises:
        ValueError: There is nothing to draw.
    """
    shown = [(each, [(x, y) for x, y in each.points if finite(x) and finite(y)]) for each in lines]
    xs = [x for _, points in shown for x, _ in points] + [value for value, _ in across or []]
    ys = [y for _, points in shown for _, y in points]
    if not ys:
        raise ValueError("lines_svg got no finite point: leave the picture out")
    low, high = min(xs), max(xs)
    up = limits(ys, span=span)
    axes = Axes((room(*up), 352.0, 10.0, 218.0), (low, high if high > low else low + 1), up)
    parts = axes.grid(across=across, names=names)
    for each, points in shown:
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{each.pattern}"' if each.pattern else ""
        marks = f'<polyline points="{places}" fill="none" stroke="currentColor" stroke-width="2"{dashes}/>'
        if each.dots:
            marks += "".join(f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.5"/>' for x, y in points)
        parts.append(told(each.name, marks, style=f"color:{each.colour}"))
    return picture(362, 256, parts, label=label, name="lines", words=_described(shown, names))


def sample_svg(line: Line) -> str:
    """A piece of a line, for the legend."""
    dashes = f' stroke-dasharray="{line.pattern}"' if line.pattern else ""
    return (
        '<svg class="sample" viewBox="0 0 28 8" aria-hidden="true">'
        f'<line x1="0" y1="4" x2="28" y2="4" style="stroke:{escape(line.colour)}" stroke-width="2.5"{dashes}/></svg>'
    )


def _described(shown: Sequence[tuple[Line, Sequence[tuple[float, float]]]], names: tuple[str, str]) -> str:
    ends = [f"{each.name}: from {points[0][1]:.3g} to {points[-1][1]:.3g}" for each, points in shown if len(points) > 0]
    return f"{names[1]} along {names[0]}. {'; '.join(ends)}."
