"""Drawing inline SVG: text, lines, axes, and pictures that say in words what they show.

Strings take `currentColor` for axes and CSS colours for data, so that a page's style sheet decides both; alone they are
readable too. Every text that comes from outside is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeGuard

SERIES = "var(--series, #2f6db3)"
"""The colour of data that are all of one method."""


def text(x: float, y: float, words: str, *, anchor: str = "middle", extra: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def vertical(x: float, y: float, words: str) -> str:
    """Words that read upwards."""
    return text(x, y, words, extra=f' transform="rotate(-90 {x:.1f} {y:.1f})"')


def line(x1: float, y1: float, x2: float, y2: float, extra: str = "") -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" {extra}/>'


def bar(x: float, y: float, width: float, height: float, extra: str = "") -> str:
    """A filled rectangle."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {extra}/>'


def told(words: str, marks: str, *, style: str = "") -> str:
    """Marks that say something when pointed at."""
    given = f' style="{escape(style)}"' if style else ""
    return f"<g{given}><title>{escape(words)}</title>{marks}</g>"


def picture(width: float, height: float, parts: Sequence[str], *, label: str, name: str, words: str = "") -> str:
    """The parts as one SVG.

    Args:
        width, height: Of the drawing, in its own units.
        parts: What to draw.
        label: The accessible name: what is shown.
        name: The CSS class.
        words: The accessible description: what can be seen in it.
    """
    described = f"<desc>{escape(words)}</desc>" if words else ""
    return (
        f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="xMinYMid" '
        f'role="img" aria-label="{escape(label)}" font-size="11" fill="currentColor">{described}{"".join(parts)}</svg>'
    )


def shortened(name: str, most: int) -> str:
    """A name that takes no more than so many characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def limits(values: Sequence[float], *, span: float = 0.0) -> tuple[float, float]:
    """The range of an axis for these values, a little wider than they are; not below 0 where none of them is.

    Args:
        values: At least one.
        span: The least range, so that differences which mean nothing look like nothing.
    """
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or max(0.1 * abs(high), 0.01)
    pad = max(pad, (span - (high - low)) / 2)
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def room(low: float, high: float) -> float:
    """How far from the left an upward axis stands, for its numbers and its name."""
    return max(44.0, 26.0 + 6.6 * max(len(f"{tick:g}") for tick in ticks(low, high)))


@dataclass(frozen=True)
class Axes:
    """A rectangle of the drawing with a range of values in each direction.

    Attributes:
        box: Left, right, top, bottom, in units of the drawing.
        across, up: The values at its ends.
    """

    box: tuple[float, float, float, float]
    across: tuple[float, float]
    up: tuple[float, float]

    def x(self, value: float) -> float:
        """Where a value stands across."""
        left, right, _, _ = self.box
        low, high = self.across
        return left + (right - left) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        """Where a value stands upwards."""
        _, _, top, bottom = self.box
        low, high = self.up
        return bottom - (bottom - top) * (value - low) / (high - low)

    def grid(
        self,
        *,
        across: Sequence[tuple[float, str]] | None = None,
        up: Sequence[tuple[float, str]] | None = None,
        names: tuple[str, str] = ("", ""),
    ) -> list[str]:
        """Grid lines with their numbers, and what each axis shows.

        Args:
            across, up: Where lines stand and what is written there; round numbers by default.
            names: Of the axes.
        """
        left, right, top, bottom = self.box
        across = [(tick, f"{tick:g}") for tick in ticks(*self.across)] if across is None else across
        up = [(tick, f"{tick:g}") for tick in ticks(*self.up)] if up is None else up
        parts = []
        for value, words in across:
            parts += [
                line(self.x(value), top, self.x(value), bottom, 'stroke-opacity=".1"'),
                text(self.x(value), bottom + 15, words),
            ]
        for value, words in up:
            parts += [
                line(left, self.y(value), right, self.y(value), 'stroke-opacity=".1"'),
                text(left - 6, self.y(value) + 4, words, anchor="end"),
            ]
        if names[0]:
            parts.append(text((left + right) / 2, bottom + 32, names[0]))
        if names[1]:
            parts.append(vertical(11, (top + bottom) / 2, names[1]))
        return parts
