"""Pictures of calibration: inline SVG that takes its colours from the page, and one PNG for places that show no SVG.

The SVG strings use `currentColor` for axes and `var(--series, …)` for data, so that a page's style sheet decides both;
alone they are readable too. Every text that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Curve = Mapping[str, Sequence[Any]]
"""edges (M + 1), and confidence, accuracy, count (M each): `ReliabilityCurve.to_dict()`; None or NaN in empty bins."""

SERIES = "var(--series, #2f6db3)"
MAX_BARS = 32


@dataclass(frozen=True)
class Bin:
    """A non-empty bin of a reliability curve, and the 95 % Wilson interval of its accuracy."""

    left: float
    right: float
    confidence: float
    accuracy: float
    count: float
    low: float
    high: float


def bins_of(curve: Curve) -> list[Bin]:
    """The non-empty bins of a curve, left to right; bins with missing numbers are left out.

    Wilson interval: (a + z²/2n ± z √(a(1 − a)/n + z²/4n²)) / (1 + z²/n), z = 1.96.  Source: Wilson 1927.
    """
    edges, bins = curve["edges"], []
    for index, (confidence, accuracy, count) in enumerate(
        zip(curve["confidence"], curve["accuracy"], curve["count"], strict=True)
    ):
        if not count or not _finite(confidence) or not _finite(accuracy):
            continue
        square = 1.96**2 / count
        centre = (accuracy + square / 2) / (1 + square)
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / count + square / (4 * count)) / (1 + square)
        bins.append(
            Bin(
                edges[index],
                edges[index + 1],
                confidence,
                accuracy,
                count,
                max(0.0, centre - half),
                min(1.0, centre + half),
            )
        )
    return bins


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def describe(curve: Curve) -> str:
    """One sentence about a reliability curve for those who do not see it."""
    bins = bins_of(curve)
    if not bins:
        return "No predictions."
    total = sum(part.count for part in bins)
    below = sum(part.count for part in bins if part.accuracy < part.confidence)
    return (
        f"{total:.0f} predictions in {len(bins)} bins; {100 * below / total:.0f} % of them are in bins "
        "where accuracy is lower than confidence."
    )


def _text(x: float, y: float, words: str, *, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" {extra}/>'


def _vertical(x: float, y: float, words: str) -> str:
    return _text(x, y, words, extra=f' transform="rotate(-90 {x:.1f} {y:.1f})"')


def _svg(width: float, height: float, label: str, parts: Sequence[str], *, name: str) -> str:
    return (
        f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="xMinYMid" '
        f'role="img" aria-label="{escape(label)}" font-size="11" fill="currentColor">{"".join(parts)}</svg>'
    )


def _bin_marks(part: Bin, *, x: Callable[[float], float], y: Callable[[float], float], base: float, tall: float) -> str:
    """The accuracy bar of a bin with its interval, and the bar of its count; hovering tells the numbers."""
    start, wide, middle = x(part.left) + 0.75, x(part.right) - x(part.left) - 1.5, x((part.left + part.right) / 2)
    told = (
        f"confidence {part.left:.2f} to {part.right:.2f}: {part.count:.0f} predictions, "
        f"mean confidence {part.confidence:.2f}, accuracy {part.accuracy:.2f}"
    )

    def bar(at: float, tall: float, opacity: str) -> str:
        place = f'x="{start:.1f}" y="{at:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
        return f'<rect {place} fill="{SERIES}" fill-opacity="{opacity}"/>'

    return (
        f"<g><title>{escape(told)}</title>"
        + bar(y(part.accuracy), y(0.0) - y(part.accuracy), ".28")
        + bar(y(part.accuracy) - 1, 2.0, "1")
        + _line(middle, y(part.low), middle, y(part.high), 'stroke-opacity=".55"')
        + bar(base - tall, tall, ".75")
        + "</g>"
    )


def reliability_svg(curve: Curve, *, title: str) -> str:
    """A reliability diagram as inline SVG: accuracy by confidence above, the number of predictions below.

    Args:
        curve: what `ReliabilityCurve.to_dict()` gives; counts may be averages.
        title: what is shown, for the accessible name ("LoRA"); it is not drawn.
    """
    left, width, top, height, strip = 46.0, 226.0, 8.0, 200.0, 34.0
    bottom, base = top + height, top + height + 12 + strip
    bins = bins_of(curve)

    def x(value: float) -> float:
        return left + width * value

    def y(value: float) -> float:
        return bottom - height * value

    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        words = f"{tick:g}"
        parts += [
            _line(left, y(tick), left + width, y(tick), 'stroke-opacity=".13"'),
            _text(left - 6, y(tick) + 4, words, anchor="end"),
        ]
        parts.append(_text(x(tick), base + 14, words))
    most = max((part.count for part in bins), default=1.0)
    for part in bins:
        parts.append(_bin_marks(part, x=x, y=y, base=base, tall=max(1.0, strip * part.count / most)))
    parts.append(_line(x(0), y(0), x(1), y(1), 'stroke-dasharray="4 3" stroke-opacity=".7"'))
    parts.append(_line(left, bottom, left + width, bottom, 'stroke-opacity=".4"'))
    parts.append(_line(left, base, left + width, base, 'stroke-opacity=".4"'))
    parts.append(_text(left - 6, base - strip + 8, f"{most:.0f}" if bins else "0", anchor="end"))
    parts.append(_text(left + width / 2, base + 29, "confidence"))
    parts.append(_vertical(11, top + height / 2, "accuracy"))
    return _svg(
        left + width + 10, base + 34, f"Reliability diagram, {title}. {describe(curve)}", parts, name="reliability"
    )


@dataclass(frozen=True)
class Point:
    """A method's place in the overview: NLL and ECE as fitted, their standard deviations, and both after scaling."""

    name: str
    colour: str
    nll: float
    ece: float
    nll_sd: float = 0.0
    ece_sd: float = 0.0
    scaled: tuple[float, float] | None = None


def ticks(low: float, high: float, *, most: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart), at most `most` of them, inside [low, high]."""
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(
        step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power, 20 * power) if span / step <= most - 1
    )
    return [
        round(index * step, 12) for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or max(0.1 * abs(high), 0.01)
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


Box = tuple[float, float, float, float]
Axis = Callable[[float], float]


def _occupied(point: Point, x: Axis, y: Axis) -> list[Box]:
    """Where a method's marks are, as (left, top, width, height): no label should cover them."""
    px, py = x(point.nll), y(point.ece)
    wide, tall = x(point.nll_sd) - x(0.0), y(0.0) - y(point.ece_sd)
    boxes = [(px - 6, py - 6, 12.0, 12.0), (px - wide, py - 1, 2 * wide, 2.0), (px - 1, py - tall, 2.0, 2 * tall)]
    if point.scaled:
        boxes.append((x(point.scaled[0]) - 5, y(point.scaled[1]) - 5, 10.0, 10.0))
    return boxes


def _point_marks(point: Point, x: Axis, y: Axis) -> str:
    px, py = x(point.nll), y(point.ece)
    marks = []
    if point.scaled:
        qx, qy = x(point.scaled[0]), y(point.scaled[1])
        marks.append(_line(px, py, qx, qy, 'stroke-opacity=".45"'))
        ring = 'r="3.5" fill="var(--paper, #fff)" stroke="currentColor" stroke-width="1.5"'
        marks.append(f'<circle cx="{qx:.1f}" cy="{qy:.1f}" {ring}/>')
    marks.append(_line(x(point.nll - point.nll_sd), py, x(point.nll + point.nll_sd), py, 'stroke-width="1.5"'))
    marks.append(_line(px, y(point.ece - point.ece_sd), px, y(point.ece + point.ece_sd), 'stroke-width="1.5"'))
    marks.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
    return "".join(marks)


def overview_svg(points: Sequence[Point]) -> str:
    """NLL against ECE, one labelled mark per method; a line leads to a ring, the method after temperature scaling."""
    left, right, top, bottom = 44.0, 352.0, 10.0, 238.0
    xs = [p.nll + s * p.nll_sd for p in points for s in (-1, 1)] + [p.scaled[0] for p in points if p.scaled]
    ys = [p.ece + s * p.ece_sd for p in points for s in (-1, 1)] + [p.scaled[1] for p in points if p.scaled]
    (x0, x1), (y0, y1) = _limits(xs), _limits(ys)

    def x(value: float) -> float:
        return left + (right - left) * (value - x0) / (x1 - x0)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - y0) / (y1 - y0)

    parts = []
    for tick in ticks(x0, x1):
        parts += [_line(x(tick), top, x(tick), bottom, 'stroke-opacity=".1"'), _text(x(tick), bottom + 15, f"{tick:g}")]
    for tick in ticks(y0, y1):
        parts += [
            _line(left, y(tick), right, y(tick), 'stroke-opacity=".1"'),
            _text(left - 6, y(tick) + 4, f"{tick:g}", anchor="end"),
        ]
    taken = [box for point in points for box in _occupied(point, x, y)]
    for point in points:
        box = _free_place(
            x(point.nll), y(point.ece), 6.9 * len(point.name) + 4, taken, bounds=(left, top, right, bottom)
        )
        taken.append(box)
        name = _text(box[0] + 2, box[1] + 10, point.name, anchor="start", extra=' font-weight="600"')
        parts.append(f'<g style="color:{escape(point.colour)}">{_point_marks(point, x, y)}{name}</g>')
    parts.append(_text((left + right) / 2, bottom + 32, "NLL (nats per example) → worse"))
    parts.append(_vertical(11, (top + bottom) / 2, "ECE → worse"))
    told = "; ".join(f"{p.name}: NLL {p.nll:.3f}, ECE {p.ece:.3f}" for p in points)
    return _svg(362, 276, f"NLL against ECE. {told}.", parts, name="overview")


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


def draws_svg(values: Sequence[float], *, label: str) -> str:
    """One bar per draw, sorted, from 0 to 1; of more than 32 draws evenly spaced order statistics are shown.

    Args:
        values: the probability of one class under each draw.
        label: what is shown, for the accessible name; the number of draws and their range are added.
    """
    ordered = sorted(float(value) for value in values if _finite(value))
    shown = ordered
    if len(ordered) > MAX_BARS:
        shown = [ordered[round(index * (len(ordered) - 1) / (MAX_BARS - 1))] for index in range(MAX_BARS)]
    width = max(6.0 * len(shown), 6.0)
    parts = [f'<rect width="{width:g}" height="24" fill-opacity=".08"/>']
    parts += [
        f'<rect x="{6 * index + 1}" y="{23 - 22 * value:.1f}" width="4" height="{22 * value + 1:.1f}" fill="{SERIES}"/>'
        for index, value in enumerate(shown)
    ]
    told = f"{len(ordered)} draws from {ordered[0]:.2f} to {ordered[-1]:.2f}" if ordered else "no draws"
    return _svg(width, 24, f"{label}: {told}", parts, name="draws")


def reliability_png(curves: Mapping[str, Curve], path: Path) -> Path:
    """Writes reliability diagrams side by side as a PNG, one panel per curve, and returns the path.

    Args:
        curves: title of the panel → `ReliabilityCurve.to_dict()`.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: there is no curve to draw.
    """
    if not curves:
        raise ValueError("reliability_png got no curves: pass at least one, as {title: ReliabilityCurve.to_dict()}.")
    figure = Figure(figsize=(3.4 * len(curves) + 0.4, 4.3), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    quarters = [0.0, 0.25, 0.5, 0.75, 1.0]
    grid = figure.subplots(2, len(curves), sharex=True, sharey="row", squeeze=False, height_ratios=[5, 1])
    for column, (title, curve) in enumerate(curves.items()):
        upper, lower = grid[0, column], grid[1, column]
        bins = bins_of(curve)
        middles = np.array([(part.left + part.right) / 2 for part in bins])
        widths = np.array([part.right - part.left for part in bins]) * 0.92
        heights = np.array([part.accuracy for part in bins])
        ends = np.array([[part.accuracy - part.low, part.high - part.accuracy] for part in bins]).reshape(-1, 2).T
        upper.bar(middles, heights, widths, color="#2f6db3", alpha=0.35)
        upper.errorbar(middles, heights, np.maximum(ends, 0), fmt="_", color="#1d4a7d", markersize=9, linewidth=1)
        upper.plot([0, 1], [0, 1], "--", color="#555555", linewidth=1)
        upper.set(
            xlim=(-0.02, 1.02), ylim=(0, 1), xticks=quarters, yticks=quarters, title=f"{title}\nECE {_ece(bins):.3f}"
        )
        lower.bar(middles, [part.count for part in bins], widths, color="#2f6db3", alpha=0.8)
        lower.set_xlabel("confidence")
        lower.xaxis.set_major_formatter("{x:g}")
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("accuracy")
    grid[1, 0].set_ylabel("count")
    figure.savefig(path, dpi=160)
    return path


def _ece(bins: Sequence[Bin]) -> float:
    total = sum(part.count for part in bins)
    return sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / total if total else math.nan
