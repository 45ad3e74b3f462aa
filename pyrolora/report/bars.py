"""Bars: the two kinds of uncertainty, stacked, and two histograms back to back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrolora.report.svg import SERIES, Axes, bar, finite, line, picture, shortened, text, ticks, told

ROW, TOP, LEFT, RIGHT = 24.0, 8.0, 118.0, 352.0


@dataclass(frozen=True)
class Stack:
    """A method's uncertainty on one split, in nats; the epistemic part is None where nothing tells it apart."""

    name: str
    colour: str
    aleatoric: float
    epistemic: float | None


def stacks_svg(rows: Sequence[Stack], *, most: float, label: str) -> str:
    """Aleatoric (solid) and epistemic (hatched light) uncertainty, one bar each.

    Args:
        rows: The bars.
        most: The end of the axis: log K is the largest entropy there is.
        label: What is shown.
    """
    axes = Axes((LEFT, RIGHT, TOP, TOP + ROW * len(rows)), (0.0, most), (0.0, 1.0))
    across = [(tick, f"{tick:g}") for tick in ticks(0.0, most, most=5)]
    parts = axes.grid(across=across, up=[])
    parts.append(text((LEFT + RIGHT) / 2, axes.box[3] + 32, f"nats, up to log K = {most:.2f}"))
    said = []
    for index, row in enumerate(rows):
        y = TOP + ROW * index + 4
        parts.append(text(LEFT - 8, y + 12, shortened(row.name, 17), anchor="end"))
        if not finite(row.aleatoric):
            continue
        extra = row.epistemic if finite(row.epistemic) else 0.0
        assert extra is not None
        first, second = axes.x(row.aleatoric), axes.x(row.aleatoric + extra)
        marks = bar(LEFT, y, first - LEFT, ROW - 8, 'fill="currentColor" fill-opacity=".85"')
        if extra > 0:
            outline = 'fill="currentColor" fill-opacity=".22" stroke="currentColor" stroke-width="1.5"'
            marks += bar(first, y + 0.75, second - first, ROW - 9.5, outline)
        kinds = f"aleatoric {row.aleatoric:.3f} nats, epistemic {extra:.3f} nats"
        words = f"{row.name}: {kinds if row.epistemic is not None else f'total {row.aleatoric:.3f} nats, not split'}"
        said.append(words)
        parts.append(told(words, marks, style=f"color:{row.colour}"))
    return picture(RIGHT + 10, axes.box[3] + 40, parts, label=label, name="rows", words=f"{'; '.join(said)}.")


def histograms_svg(histogram: Mapping[str, Any], *, split: str, inside: str, label: str) -> str:
    """The entropy of one split upwards and of another downwards, each as shares of its examples.

    Args:
        histogram: edges (M + 1), inside and outside (M counts each).
        split, inside: What the two splits are called.
        label: What is shown.
    """
    edges, upper, lower = histogram["edges"], list(histogram["inside"]), list(histogram["outside"])
    shares = [[count / max(sum(counts), 1) for count in counts] for counts in (upper, lower)]
    tallest = max(max(shares[0], default=0.0), max(shares[1], default=0.0)) or 1.0
    left, right, middle, tall = 12.0, 262.0, 92.0, 72.0
    axes = Axes((left, right, middle - tall, middle), (edges[0], edges[-1] or 1.0), (0.0, tallest))
    parts = []
    for index, (above, below) in enumerate(zip(*shares, strict=True)):
        x, wide = axes.x(edges[index]) + 0.5, axes.x(edges[index + 1]) - axes.x(edges[index]) - 1.0
        words = (
            f"entropy {edges[index]:.2f} to {edges[index + 1]:.2f}: {100 * above:.0f} % of {inside}, "
            f"{100 * below:.0f} % of {split}"
        )
        marks = bar(x, axes.y(above), wide, middle - axes.y(above), f'fill="{SERIES}" fill-opacity=".85"')
        marks += bar(x, middle + 2, wide, middle - axes.y(below), f'fill="{SERIES}" fill-opacity=".4"')
        parts.append(told(words, marks))
    parts.append(line(left, middle + 1, right, middle + 1, 'stroke-opacity=".5"'))
    parts.append(text(left, middle - tall - 6, f"{inside} ↑", anchor="start"))
    parts.append(text(left, middle + tall + 16, f"{split} ↓", anchor="start"))
    for value in ticks(*axes.across, most=5):
        parts.append(text(axes.x(value), middle + tall + 32, f"{value:g}"))
    parts.append(text((left + right) / 2, middle + tall + 48, "entropy (nats)"))
    means = [
        sum(share * (edges[i] + edges[i + 1]) / 2 for i, share in enumerate(side)) for side in shares
    ]  # of the bins' middles
    words = f"Mean entropy about {means[0]:.2f} nats on {inside} and {means[1]:.2f} on {split}."
    return picture(right + 10, middle + tall + 54, parts, label=label, name="histogram", words=words)
