"""What every part of the report needs to know: the methods of a split, their colours, and what numbers are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyrolora.report.curves import DASHES
from pyrolora.report.summary import Cell, by_method, number, reported_split

COLOURS = 7


@dataclass(frozen=True)
class View:
    """Results, seen from one split.

    Attributes:
        results: The dictionary that `pyrolora.report.html` describes.
        split: The split that is looked at.
        groups: Method → its cells of that split, the baseline first.
        styles: Method → CSS colour and pattern of its line.
    """

    results: Mapping[str, Any]
    split: str
    groups: Mapping[str, Sequence[Cell]]
    styles: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, results: Mapping[str, Any], split: str | None = None) -> View:
        """The view of a split, by default the one that is reported."""
        split = reported_split(results) if split is None else split
        methods = dict.fromkeys(str(cell.get("method")) for cell in results.get("cells") or [])
        baseline = str(results.get("baseline"))
        others = [name for name in methods if name != baseline]
        # The baseline is grey, so that the eye goes to what is compared with it.
        styles = {baseline: ("var(--baseline)", DASHES[0])}
        for i, name in enumerate(others):
            styles[name] = (f"var(--series-{i % COLOURS})", DASHES[(i + 1) % len(DASHES)])
        return cls(results, split, by_method(results, split), styles)

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return str(self.results.get("baseline"))

    @property
    def task(self) -> Mapping[str, Any]:
        """Name, classes and sizes of the splits, as far as they are known."""
        return self.results.get("task") or {}

    @property
    def class_names(self) -> list[str]:
        """The support of the predictive."""
        return [str(name) for name in self.task.get("class_names") or []]

    @property
    def shifts(self) -> list[str]:
        """The other splits that have cells."""
        splits = dict.fromkeys(str(cell.get("split")) for cell in self.results.get("cells") or [])
        return [split for split in splits if split != self.split]

    @property
    def pointwise(self) -> list[str]:
        """Methods whose draws are points of each example's own predictive, not draws of the weights."""
        return [name for name, cells in self.groups.items() if cells[0].get("joint_draws") is False]

    def colour(self, method: str) -> str:
        """The CSS colour of a method."""
        return self.styles[method][0]

    def facts(self, *, draws: bool = True) -> str:
        """What a figure is of: split, number of examples, support, draws and seeds.

        Args:
            draws: Whether the number of draws matters to it.
        """
        size = (self.task.get("splits") or {}).get(self.split)
        parts = [f"{size:,} examples"] if isinstance(size, int) else []
        if self.class_names:
            shown = self.class_names if len(self.class_names) <= 6 else [*self.class_names[:5], "…"]
            parts.append(f"{len(self.class_names)} classes ({', '.join(shown)})")
        seeds = max((len(cells) for cells in self.groups.values()), default=0)
        parts.append(f"{seeds} seed{'s' * (seeds != 1)}")
        said = self._draws() if draws else ""
        return f"Split “{self.split}”: {', '.join(parts)}{'; ' * bool(said)}{said}."

    def _draws(self) -> str:
        """What was averaged, method by method: draws, points, or nothing."""
        kinds: dict[str, list[str]] = {}
        for name, cells in self.groups.items():
            count = number(cells[0].get("num_draws"))
            if count is None:
                continue
            if cells[0].get("joint_draws") is False:
                kind = f"{count:.0f} quasi-Monte Carlo points an example"
            else:
                kind = "one pass" if count == 1 else f"{count:.0f} draws"
            kinds.setdefault(kind, []).append(name)
        return "; ".join(f"{', '.join(names)}: {kind}" for kind, names in kinds.items())


def mean(values: Sequence[Any]) -> float | None:
    """The mean of the numbers among these; None where there are none."""
    known = [found for found in (number(value) for value in values) if found is not None]
    return sum(known) / len(known) if known else None
