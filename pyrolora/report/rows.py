"""A row for each method: intervals around zero, and values that move from one split to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyrolora.report.summary import show
from pyrolora.report.svg import Axes, finite, limits, line, picture, shortened, text, ticks, told

ROW, TOP, LEFT, RIGHT = 26.0, 8.0, 118.0, 352.0


@dataclass(frozen=True)
class Interval:
    """A method's difference from the baseline; hollow where the interval holds 0."""

    name: str
    colour: str
    value: float
    low: float
    high: float
    real: bool


@dataclass(frozen=True)
class Move:
    """A method's value on one split (dot) and on others (diamonds)."""

    name: str
    colour: str
    value: float
    others: Sequence[tuple[str, float]]


def intervals_svg(rows: Sequence[Interval], *, axis: str, label: str) -> str:
    """Differences with their intervals, one row each, and a line at zero.

    Args:
        rows: At least one; those without finite numbers keep their row and say so.
        axis: What the axis shows, and which side is better.
        label: What is shown.
    """
    known = [row for row in rows if finite(row.value) and finite(row.low) and finite(row.high)]
    ends = [end for row in known for end in (row.low, row.high)]
    pad = 0.06 * (max([*ends, 0.0]) - min([*ends, 0.0])) or 0.01
    axes = _axes((min([*ends, 0.0]) - pad, max([*ends, 0.0]) + pad), len(rows))
    parts = _frame(axes, axis)
    parts.append(line(axes.x(0.0), TOP, axes.x(0.0), axes.box[3], 'stroke-opacity=".55"'))
    for index, row in enumerate(rows):
        y = TOP + ROW * (index + 0.5)
        parts.append(_name(row.name, y))
        if row not in known:
            parts.append(text(LEFT + 6, y + 4, "unknown: not finite", anchor="start", extra=' fill-opacity=".7"'))
            continue
        x = axes.x(row.value)
        fill = "currentColor" if row.real else "var(--paper, #fff)"
        marks = line(axes.x(row.low), y, axes.x(row.high), y, 'stroke-width="2.5" stroke-opacity=".8"')
        marks += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="currentColor" stroke-width="2"/>'
        words = f"{row.name}: {row.value:+.3f}, 95 % interval {row.low:+.3f} to {row.high:+.3f}"
        parts.append(told(words, marks, style=f"color:{row.colour}"))
    said = [f"{row.name} {row.value:+.3f} ({row.low:+.3f} to {row.high:+.3f})" for row in known]
    words = f"{axis}. {'; '.join(said)}."
    return picture(RIGHT + 10, axes.box[3] + 40, parts, label=label, name="rows", words=words)


def moves_svg(rows: Sequence[Move], *, axis: str, label: str) -> str:
    """How far each method's value moves from the dot, one split, to the diamonds, others.

    Args:
        rows: At least one with a finite value.
        axis: What the axis shows.
        label: What is shown.
    """
    values = [value for row in rows for value in (row.value, *(other for _, other in row.others)) if finite(value)]
    axes = _axes(limits(values or [0.0]), len(rows))
    parts = _frame(axes, axis)
    for index, row in enumerate(rows):
        y = TOP + ROW * (index + 0.5)
        parts.append(_name(row.name, y))
        others = [(split, value) for split, value in row.others if finite(value)]
        marks = ""
        for split, value in others:
            if finite(row.value):
                marks += line(axes.x(row.value), y, axes.x(value), y, 'stroke-width="1.5" stroke-opacity=".5"')
            place = f"translate({axes.x(value):.1f} {y:.1f}) rotate(45)"
            marks += told(
                f"{row.name}, {split}: {value:.3f}",
                f'<rect x="-4" y="-4" width="8" height="8" transform="{place}" fill="var(--paper, #fff)" '
                'stroke="currentColor" stroke-width="2"/>',
            )
        if finite(row.value):
            marks += f'<circle cx="{axes.x(row.value):.1f}" cy="{y:.1f}" r="4.5"/>'
        parts.append(f'<g style="color:{row.colour}">{marks}</g>')
    said = [f"{row.name} {show(row.value)}, {', '.join(f'{s} {show(v)}' for s, v in row.others)}" for row in rows]
    return picture(RIGHT + 10, axes.box[3] + 40, parts, label=label, name="rows", words=f"{axis}. {'; '.join(said)}.")


def _axes(across: tuple[float, float], count: int) -> Axes:
    return Axes((LEFT, RIGHT, TOP, TOP + ROW * count), across, (0.0, 1.0))


def _frame(axes: Axes, name: str) -> list[str]:
    across = [(tick, f"{tick:g}".replace("-", "−")) for tick in ticks(*axes.across, most=5)]
    left, right, _, bottom = axes.box
    return [*axes.grid(across=across, up=[]), text((left + right) / 2, bottom + 32, name)]


def _name(name: str, y: float) -> str:
    return text(LEFT - 8, y + 4, shortened(name, 17), anchor="end")
