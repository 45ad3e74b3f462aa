"""From labels as they stand in the data to class indices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyrolora.tasks.data import DataError, Table, missing, stop_at


class LabelIndex:
    """From labels as they stand in the data to class indices.

    A label is found by its class name, or by its index (or the value it had in training, where the classes were
    read off the training labels).
    """

    def __init__(self, names: Sequence[str], values: Sequence[Any] | None = None) -> None:
        """Store the classes; ``values`` are what stands in the data for each, by default 0..K−1."""
        self.names = tuple(str(name) for name in names)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"class_names has duplicates: {self.names}.")
        self.index: dict[Any, int] = {name: i for i, name in enumerate(self.names)}
        self.index.update({value: i for i, value in enumerate(values if values is not None else range(len(names)))})

    def get(self, value: Any) -> int:
        """The class index of a label, or −1 where it names no class."""
        try:
            return self.index.get(value, -1)
        except TypeError:  # a list, a dict
            return -1

    def describe(self) -> str:
        """The classes for a message, not all 150 of them."""
        shown = ", ".join(repr(name) for name in self.names[:10])
        return shown if len(self.names) <= 10 else f"{shown}, ... ({len(self.names)} in all)"


def classes_of(table: Table, name: str) -> LabelIndex:
    """The classes of a training split: those that its data set declares, else its distinct labels, sorted.

    Raises:
        DataError: labels that can be no class, labels of several types, or fewer than two classes.
    """
    declared = table.class_label(name)
    if declared is not None:
        return LabelIndex(declared)
    values = table.column(name)
    stop_at(table, ((row, reason) for row, value in enumerate(values) if (reason := _unusable(name, value))))
    distinct = set(values)
    if len({isinstance(value, str) for value in distinct}) > 1:
        raise DataError(f"{table.origin}: '{name}' mixes text and numbers; give all labels one type.")
    ordered = sorted(distinct)
    if len(ordered) < 2:
        raise DataError(f"{table.origin}: every '{name}' is {ordered[0]!r}; classification needs two classes or more.")
    return LabelIndex([str(value) for value in ordered], ordered)


def _unusable(name: str, value: Any) -> str | None:
    """Why a value can be no class whatever the classes are."""
    if missing(value):
        return f"no '{name}'"
    if not isinstance(value, (str, int, float)):
        return f"'{name}' is {type(value).__name__} {value!r}, not a class index or name"
    if isinstance(value, str):
        return None
    if not math.isfinite(value) or value < 0 or value != int(value):
        return f"'{name}' {value!r} is not a class index; rows without a class belong in an out-of-distribution split"
    return None
