"""A heat map over layers: one row for each kind of site, one column for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyrolora.report.svg import SERIES, bar, finite, picture, shortened, text, told

Values = Mapping[str, Mapping[Any, Any]]
"""Kind of site → layer → value."""


def layers_of(values: Values) -> list[str]:
    """The layers of all kinds, numbers in their order, then names as they occur."""
    found = list(dict.fromkeys(str(layer) for row in values.values() for layer in row))
    return sorted((layer for layer in found if layer.isdigit()), key=int) + [x for x in found if not x.isdigit()]


def heatmap_svg(values: Values, *, unit: str, label: str) -> str:
    """Cells from pale, the lowest value, to full colour, the highest; an empty cell where there is no number.

    Args:
        values: Kind of site → layer → value.
        unit: What a value is.
        label: What is shown.

    Raises:
        ValueError: There is no finite number.
    """
    known = [float(value) for row in values.values() for value in row.values() if finite(value)]
    if not known:
        raise ValueError("heatmap_svg got no finite value: leave the picture out")
    low, high = min(known), max(known)
    layers = layers_of(values)
    left, top, right, tall = 118.0, 8.0, 352.0, 24.0
    wide = min((right - left) / len(layers), 40.0)
    parts = []
    for row, (kind, by_layer) in enumerate(values.items()):
        y = top + tall * row
        parts.append(text(left - 8, y + tall / 2 + 4, shortened(kind, 17), anchor="end"))
        named = {str(layer): value for layer, value in by_layer.items()}
        for column, layer in enumerate(layers):
            value, place = named.get(layer), (left + wide * column + 0.5, y + 0.5, wide - 1, tall - 1)
            if not finite(value):
                parts.append(bar(*place, 'fill="none" stroke="currentColor" stroke-opacity=".2"'))
                continue
            share = (float(value) - low) / (high - low) if high > low else 1.0
            mark = bar(*place, f'fill="{SERIES}" fill-opacity="{0.08 + 0.92 * share:.2f}"')
            parts.append(told(f"{kind}, layer {layer}: {value:.3g} {unit}", mark))
    bottom = top + tall * len(values)
    step = max(1, -(-len(layers) // max(1, int((right - left) / 22))))
    for column in range(0, len(layers), step):
        parts.append(text(left + wide * (column + 0.5), bottom + 14, shortened(layers[column], 6)))
    parts.append(text(left + wide * len(layers) / 2, bottom + 31, "layer"))
    words = (
        f"{unit} from {low:.3g} (pale) to {high:.3g} (full colour), {len(values)} kinds of site, {len(layers)} layers."
    )
    return picture(right + 10, bottom + 38, parts, label=label, name="heatmap", words=words)
