"""Pictures of calibration: reliability diagrams and draws as inline SVG, and one PNG for places that show no SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyrolora.inference.archive import replacing
from pyrolora.report.svg import SERIES, Axes, bar, finite, line, picture, text, told, vertical

Curve = Mapping[str, Sequence[Any]]
"""edges (M + 1), and confidence, accuracy, count (M each): `ReliabilityCurve.to_dict()`; None or NaN in empty bins."""

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
        if not count or not finite(confidence) or not finite(accuracy):
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


def reliability_svg(curve: Curve, *, title: str) -> str:
    """A reliability diagram as inline SVG: accuracy by confidence above, the number of predictions below.

    Args:
        curve: what `ReliabilityCurve.to_dict()` gives; counts may be averages.
        title: what is shown, for the accessible name ("LoRA"); it is not drawn.
    """
    left, width, top, height, strip = 46.0, 226.0, 8.0, 200.0, 34.0
    bottom, base = top + height, top + height + 12 + strip
    axes = Axes((left, left + width, top, bottom), (0.0, 1.0), (0.0, 1.0))
    bins = bins_of(curve)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts += [
            line(left, axes.y(tick), left + width, axes.y(tick), 'stroke-opacity=".13"'),
            text(left - 6, axes.y(tick) + 4, f"{tick:g}", anchor="end"),
            text(axes.x(tick), base + 14, f"{tick:g}"),
        ]
    most = max((part.count for part in bins), default=1.0)
    for part in bins:
        parts.append(_bin_marks(part, axes, base=base, tall=max(1.0, strip * part.count / most)))
    parts.append(line(axes.x(0), axes.y(0), axes.x(1), axes.y(1), 'stroke-dasharray="4 3" stroke-opacity=".7"'))
    parts.append(line(left, bottom, left + width, bottom, 'stroke-opacity=".4"'))
    parts.append(line(left, base, left + width, base, 'stroke-opacity=".4"'))
    parts.append(text(left - 6, base - strip + 8, f"{most:.0f}" if bins else "0", anchor="end"))
    parts.append(text(left + width / 2, base + 29, "confidence"))
    parts.append(vertical(11, top + height / 2, "accuracy"))
    size = (left + width + 10, base + 34)
    return picture(*size, parts, label=f"Reliability diagram, {title}", name="reliability", words=describe(curve))


def _bin_marks(part: Bin, axes: Axes, *, base: float, tall: float) -> str:
    """The accuracy bar of a bin with its interval, and the bar of its count; hovering tells the numbers."""
    start, wide = axes.x(part.left) + 0.75, axes.x(part.right) - axes.x(part.left) - 1.5
    middle = axes.x((part.left + part.right) / 2)

    def filled(at: float, tall: float, opacity: str) -> str:
        return bar(start, at, wide, tall, f'fill="{SERIES}" fill-opacity="{opacity}"')

    words = (
        f"confidence {part.left:.2f} to {part.right:.2f}: {part.count:.0f} predictions, "
        f"mean confidence {part.confidence:.2f}, accuracy {part.accuracy:.2f}"
    )
    return told(
        words,
        filled(axes.y(part.accuracy), axes.y(0.0) - axes.y(part.accuracy), ".28")
        + filled(axes.y(part.accuracy) - 1, 2.0, "1")
        + line(middle, axes.y(part.low), middle, axes.y(part.high), 'stroke-opacity=".55"')
        + filled(base - tall, tall, ".75"),
    )


def draws_svg(values: Sequence[float], *, label: str) -> str:
    """One bar per draw, sorted, from 0 to 1; of more than 32 draws evenly spaced order statistics are shown.

    Args:
        values: the probability of one class under each draw.
        label: what is shown, for the accessible name; the number of draws and their range are added.
    """
    ordered = sorted(float(value) for value in values if finite(value))
    shown = ordered
    if len(ordered) > MAX_BARS:
        shown = [ordered[round(index * (len(ordered) - 1) / (MAX_BARS - 1))] for index in range(MAX_BARS)]
    width = max(6.0 * len(shown), 6.0)
    parts = [f'<rect width="{width:g}" height="24" fill-opacity=".08"/>']
    parts += [
        f'<rect x="{6 * index + 1}" y="{23 - 22 * value:.1f}" width="4" height="{22 * value + 1:.1f}" fill="{SERIES}"/>'
        for index, value in enumerate(shown)
    ]
    found = f"{len(ordered)} draws from {ordered[0]:.2f} to {ordered[-1]:.2f}" if ordered else "no draws"
    return picture(width, 24, parts, label=f"{label}: {found}", name="draws")


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
    with replacing(path) as new:
        figure.savefig(new, dpi=160, format="png")
    return path


def _ece(bins: Sequence[Bin]) -> float:
    total = sum(part.count for part in bins)
    return sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / total if total else math.nan
