"""The report's tables: methods by metrics, with standard deviations over seeds or intervals over examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pyrolora.report.summary import Cell, Spread, best, number, show, signed, spread_of
from pyrolora.report.view import View, mean

MAIN_METRICS = ("accuracy", "nll", "ece", "brier")
HIGHER_IS_BETTER = frozenset({"accuracy", "error_auroc", "accuracy@0.8", "accuracy@0.9", "accuracy@0.95"})

COLUMNS = {
    "accuracy": "accuracy ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
    "adaptive_ece": "adaptive ECE ↓",
    "classwise_ece": "class-wise ECE ↓",
    "mce": "MCE ↓",
    "aurc": "AURC ↓",
    "excess_aurc": "excess AURC ↓",
    "error_auroc": "error AUROC ↑",
    "accuracy@0.8": "accuracy at 80 % ↑",
    "accuracy@0.9": "accuracy at 90 % ↑",
    "accuracy@0.95": "accuracy at 95 % ↑",
}
_COSTS = {
    "fit_seconds": "fit (s)",
    "fit_memory": "peak memory of the fit (MB)",
    "predict_seconds": "predict (s)",
    "parameters": "trained parameters",
    "passes": "passes per prediction",
}


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is about, its colour (or none), and its cells as text."""

    name: str
    colour: str | None
    cells: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        label: What it is, for those who do not see it.
        caption: What stands above it.
        columns: Headings, the first one that of the rows' names.
        rows: Lines.
    """

    label: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]


def stat(spread: Spread, *, bold: bool = False, digits: int = 3) -> Markup:
    """A mean with its standard deviation over seeds, or the interval of the only seed."""
    value = Markup("<strong>{}</strong>" if bold else "{}").format(show(spread.mean, digits=digits))
    if spread.sd is not None:
        return value + Markup(" <small>± {}</small>").format(show(spread.sd, digits=digits))
    if spread.count == 1 and spread.low is not None:
        ends = (show(spread.low, digits=digits), show(spread.high, digits=digits))
        return value + Markup(" <small>{}–{}</small>").format(*ends)
    return value


def results_rows(view: View, keys: Sequence[str] = MAIN_METRICS) -> list[dict[str, Any]]:
    """A block for each method: its metrics as fitted, and after temperature scaling; the best of each kind in bold."""
    blocks = []
    for name, cells in view.groups.items():
        versions = [(name, False, [spread_of(cells, key) for key in keys])]
        scaled = [spread_of(cells, key, scaled=True) for key in keys]
        if any(spread.count for spread in scaled):
            tau = mean([cell.get("scaling") for cell in cells])
            versions.append((f"τ = {tau:.2f}" if tau is not None else "scaled", True, scaled))
        lines = []
        for label, is_scaled, spreads in versions:
            winners = [best(view.groups, k, scaled=is_scaled, highest=k in HIGHER_IS_BETTER) for k in keys]
            texts = [stat(each, bold=winner == name) for each, winner in zip(spreads, winners, strict=True)]
            lines.append({"label": label, "scaled": is_scaled, "cells": texts})
        blocks.append({"colour": view.colour(name), "lines": lines})
    return blocks


def details(view: View) -> dict[str, Any]:
    """Every seed's numbers with their intervals."""
    keys = metric_keys([cell for cells in view.groups.values() for cell in cells])
    rows = []
    for name, cells in view.groups.items():
        for cell in cells:
            for scaled, key in ((False, "metrics"), (True, "scaled_metrics")):
                metrics = cell.get(key) or {}
                if metrics:
                    label = f"scaled, τ = {show(cell.get('scaling'), digits=2)}" if scaled else "as fitted"
                    values = [metrics.get(metric) or {} for metric in keys]
                    rows.append({"method": name, "seed": cell.get("seed"), "label": label, "values": values})
    return {"columns": [column(key) for key in keys], "rows": rows}


def metric_keys(cells: Sequence[Cell]) -> list[str]:
    """The metrics that occur, the usual ones first."""
    found = {key for cell in cells for key in (cell.get("metrics") or {})}
    return [key for key in COLUMNS if key in found] + sorted(found - set(COLUMNS))


def column(metric: str) -> str:
    """What a metric's column is called."""
    return COLUMNS.get(metric, metric.replace("_", " "))


def selective(view: View) -> Table | None:
    """How well each method knows when it errs."""
    keys = [key for key in COLUMNS if key.startswith("accuracy@") or key in ("aurc", "excess_aurc", "error_auroc")]
    keys = [key for key in keys if any(spread_of(cells, key).count for cells in view.groups.values())]
    if not keys:
        return None
    rows = [
        Row(name, view.colour(name), [stat(spread_of(cells, key)) for key in keys])
        for name, cells in view.groups.items()
    ]
    caption = (
        "AURC: the error rate averaged over all coverages; excess: above that of an order with every error last. Error "
        "AUROC: how often an error is less sure than a correct answer, 0.5 is chance. Accuracy at 80 %: on the 80 % of "
        "which it is surest."
    )
    return Table("Table of selective prediction", caption, ["method", *(column(key) for key in keys)], rows)


def differences(view: View) -> list[Table]:
    """Each method minus the baseline, as fitted and scaled; the verdict in words."""
    keys = [*MAIN_METRICS, "aurc"]
    tables = []
    for against_scaled in (False, True):
        rows = []
        for each in contrasts(view):
            if bool(each.get("baseline_scaled")) == against_scaled and view.groups.get(str(each.get("method"))):
                name = f"{each.get('method')}, scaled" if each.get("scaled") else str(each.get("method"))
                metrics = each.get("metrics") or {}
                cells = [_difference(metrics.get(key) or {}, key) for key in keys]
                rows.append(Row(name, view.colour(str(each.get("method"))), cells))
        if rows:
            against = f"{view.baseline}, {'temperature-scaled' if against_scaled else 'as fitted'}"
            caption = f"Method minus {against}, on the same examples and seeds; 95 % intervals over both."
            tables.append(
                Table(f"Differences from {against}", caption, ["method", *(column(key) for key in keys)], rows)
            )
    return tables


def contrasts(view: View) -> list[Mapping[str, Any]]:
    """The contrasts of the view's split."""
    return [each for each in view.results.get("contrasts") or [] if each.get("split") == view.split]


def verdict(found: Mapping[str, Any], metric: str) -> str:
    """“better”, “worse”, or “undecided”."""
    value = number(found.get("value"))
    if not found.get("real") or value is None:
        return "undecided"
    return "better" if (value > 0) == (metric in HIGHER_IS_BETTER) else "worse"


def _difference(found: Mapping[str, Any], metric: str) -> Markup:
    value = number(found.get("value"))
    if value is None or not math.isfinite(value):
        return Markup("–")
    said = verdict(found, metric)
    shown = Markup("<strong>{}</strong>" if said != "undecided" else "{}").format(signed(value))
    ends = (signed(found.get("low")), signed(found.get("high")))
    return shown + Markup(' <small class="ends">{1} to {2}</small> <small class="{0}">{0}</small>').format(said, *ends)


def costs(view: View) -> Table | None:
    """What each method took, measured in the same run, and the ratio of fit times to the baseline's."""
    found = {key for cells in view.groups.values() for cell in cells for key in (cell.get("cost") or {})}
    keys = [key for key in _COSTS if key in found] + sorted(found - set(_COSTS))
    if not keys:
        return None

    def average(name: str, key: str) -> float | None:
        value = mean([(cell.get("cost") or {}).get(key) for cell in view.groups.get(name, [])])
        return value / 1e6 if value is not None and key == "fit_memory" else value

    rows = []
    for name in view.groups:
        texts = [_amount(average(name, key)) for key in keys]
        if "fit_seconds" in keys:
            own, reference = average(name, "fit_seconds"), average(view.baseline, "fit_seconds")
            texts.append(f"{own / reference:.2f} ×" if own is not None and reference else "–")
        rows.append(Row(name, view.colour(name), texts))
    columns = ["method", *(_COSTS.get(key, key.replace("_", " ")) for key in keys)]
    caption = (
        f"Means over seeds, measured in the same run; wall-clock times. Relative to {view.baseline}. Memory: on a CPU "
        "that of the whole process, libraries and base model included."
    )
    return Table("Table of costs", caption, columns + (["fit, relative"] if "fit_seconds" in keys else []), rows)


def _amount(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return show(value)
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"
