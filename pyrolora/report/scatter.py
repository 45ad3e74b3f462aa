"""Methods as labelled marks: one number against another, with standard deviations and a second place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pyrolora.report.svg import Axes, limits, line, picture, room, shortened, text

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Point:
    """A method's place, in the units of the axes.

    Attributes:
        name, colour: Of the method.
        x, y: Where it stands.
        x_sd, y_sd: Standard deviations over seeds.
        scaled: Where it stands after temperature scaling, drawn as a ring.
    """

    name: str
    colour: str
    x: float
    y: float
    x_sd: float = 0.0
    y_sd: float = 0.0
    scaled: tuple[float, float] | None = None


def scatter_svg(
    points: Sequence[Point],
    *,
    names: tuple[str, str],
    label: str,
    across: Sequence[tuple[float, str]] | None = None,
) -> str:
    """One labelled mark per method; a line leads to a ring, the method after temperature scaling.

    Args:
        points: The methods.
        names: Of the axes.
        label: What is shown.
        across: Ticks of the x axis with their words, for a scale that is not linear; round numbers by default.
    """
    xs = [p.x + s * p.x_sd for p in points for s in (-1, 1)] + [p.scaled[0] for p in points if p.scaled]
    ys = [p.y + s * p.y_sd for p in points for s in (-1, 1)] + [p.scaled[1] for p in points if p.scaled]
    if across:
        # A scale of its own may begin at 0 and still have something to its left.
        xs += [value for value, _ in across]
        pad = 0.08 * (max(xs) - min(xs)) or 1.0
        xs += [min(xs) - pad, max(xs) + pad]
    ends = (min(xs), max(xs)) if across else limits(xs)
    up = limits(ys)
    axes = Axes((room(*up), 352.0, 10.0, 238.0), ends, up)
    parts = axes.grid(across=across, names=names)
    left, right, top, bottom = axes.box
    taken = [box for point in points for box in _occupied(point, axes)]
    for point in points:
        shown = shortened(point.name, 24)
        width = 6.9 * len(shown) + 4
        box = _free_place(axes.x(point.x), axes.y(point.y), width, taken, bounds=(left, top, right, bottom))
        taken.append(box)
        name = text(box[0] + 2, box[1] + 10, shown, anchor="start", extra=' font-weight="600"')
        parts.append(f'<g style="color:{escape(point.colour)}">{_marks(point, axes)}{name}</g>')
    words = "; ".join(f"{p.name}: {p.x:.3g} and {p.y:.3g}" for p in points)
    described = f"{names[0]} across, {names[1]} upwards. {words}."
    return picture(362, 276, parts, label=label, name="overview", words=described)


def _occupied(point: Point, axes: Axes) -> list[Box]:
    """Where a method's marks are, as (left, top, width, height): no label should cover them."""
    px, py = axes.x(point.x), axes.y(point.y)
    wide, tall = axes.x(point.x + point.x_sd) - px, py - axes.y(point.y + point.y_sd)
    boxes = [(px - 6, py - 6, 12.0, 12.0), (px - wide, py - 1, 2 * wide, 2.0), (px - 1, py - tall, 2.0, 2 * tall)]
    if point.scaled:
        boxes.append((axes.x(point.scaled[0]) - 5, axes.y(point.scaled[1]) - 5, 10.0, 10.0))
    return boxes


def _marks(point: Point, axes: Axes) -> str:
    px, py = axes.x(point.x), axes.y(point.y)
    marks = []
    if point.scaled:
        qx, qy = axes.x(point.scaled[0]), axes.y(point.scaled[1])
        marks.append(line(px, py, qx, qy, 'stroke-opacity=".45"'))
        ring = 'r="3.5" fill="var(--paper, #fff)" stroke="currentColor" stroke-width="1.5"'
        marks.append(f'<circle cx="{qx:.1f}" cy="{qy:.1f}" {ring}/>')
    marks.append(line(axes.x(point.x - point.x_sd), py, axes.x(point.x + point.x_sd), py, 'stroke-width="1.5"'))
    marks.append(line(px, axes.y(point.y - point.y_sd), px, axes.y(point.y + point.y_sd), 'stroke-width="1.5"'))
    marks.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
    return "".join(marks)


def _free_place(px: float, py: float, width: float, taken: Sequence[Box], *, bounds: Box) -> Box:
    """The first place around a mark where a label covers nothing; failing that, the one that covers least."""
    left, top, right, bottom = bounds
    offsets = [(8, -7), (-8 - width, -7), (-width / 2, -22), (-width / 2, 9)]
    offsets += [(8, shift) for shift in (-22, 10, -36, 24)] + [(-8 - width, shift) for shift in (-22, 10, -36, 24)]

    def covered(box: Box) -> float:
        outside = (
            max(0, left - box[0]) + max(0, box[0] + width - right) + max(0, top - box[1]) + max(0, box[1] + 14 - bottom)
        )
        overlaps = (
            max(0.0, min(box[0] + width, ox + ow) - max(box[0], ox))
            * max(0.0, min(box[1] + 14, oy + oh) - max(box[1], oy))
            for ox, oy, ow, oh in taken
        )
        return 100 * outside + sum(overlaps)

    return min(((px + dx, py + dy, width, 14.0) for dx, dy in offsets), key=covered)
