"""The report's figures, each with what its caption needs; None or empty where results lack the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pyrolora.report import tables
from pyrolora.report.bars import Stack, histograms_svg, stacks_svg
from pyrolora.report.curves import Line, lines_svg, sample_svg
from pyrolora.report.heatmap import heatmap_svg, layers_of
from pyrolora.report.plots import bins_of, reliability_svg
from pyrolora.report.rows import Interval, Move, intervals_svg, moves_svg
from pyrolora.report.scatter import Point, scatter_svg
from pyrolora.report.summary import Cell, number, show, spread_of
from pyrolora.report.svg import finite
from pyrolora.report.tables import Row, Table
from pyrolora.report.view import View, mean

LEAST_NLL = 0.05  # nats that an axis spans at least: less than this does not show, nor does it matter
AXES = {"nll": "NLL", "ece": "ECE", "accuracy": "accuracy", "brier": "Brier score"}


@dataclass(frozen=True)
class Figure:
    """A picture with its heading.

    Attributes:
        title: Heading, a method's name or what is shown.
        svg: The picture.
        colour: Of its data, where they all have one.
        note: What else the heading says.
        table: The same numbers as a table, for those who want them or do not see the picture.
    """

    title: str
    svg: Markup
    colour: str | None = None
    note: str = ""
    table: Table | None = None


def overview(view: View) -> dict[str, Any]:
    """NLL against ECE, and the methods that cannot be shown there."""
    points, missing = [], []
    for name, cells in view.groups.items():
        nll, ece = spread_of(cells, "nll"), spread_of(cells, "ece")
        if nll.mean is None or ece.mean is None or not math.isfinite(nll.mean + ece.mean):
            missing.append(name)
            continue
        x, y = spread_of(cells, "nll", scaled=True).mean, spread_of(cells, "ece", scaled=True).mean
        scaled = (x, y) if x is not None and y is not None and math.isfinite(x + y) else None
        points.append(Point(name, view.colour(name), nll.mean, ece.mean, nll.sd or 0.0, ece.sd or 0.0, scaled))
    axes = ("NLL (nats per example) → worse", "ECE → worse")
    svg = Markup(scatter_svg(points, names=axes, label="NLL against ECE")) if points else ""
    return {"svg": svg, "missing": missing}


def reliability(view: View) -> list[Figure]:
    """A reliability diagram for each method, pooled over seeds."""
    found = []
    for name, cells in view.groups.items():
        curve = pooled([cell["reliability"] for cell in cells if cell.get("reliability")])
        if curve is None:
            continue
        rows = [
            Row(f"{part.left:.2f}–{part.right:.2f}", None, [f"{part.count:.0f}", *_numbers(part)])
            for part in bins_of(curve)
        ]
        columns = ["confidence", "predictions", "mean confidence", "accuracy", "95 % interval"]
        table = Table(f"Reliability of {name}", f"{name}: bins of confidence.", columns, rows)
        described = next((str(cell["description"]) for cell in cells if cell.get("description")), "")
        ece = spread_of(cells, "ece").mean
        svg = Markup(reliability_svg(curve, title=name))
        note = f"ECE {show(ece)}" + (f" · {described}" if described else "")
        found.append(Figure(name, svg, view.colour(name), note, table))
    return found


def _numbers(part: Any) -> list[str]:
    return [f"{part.confidence:.3f}", f"{part.accuracy:.3f}", f"{part.low:.2f}–{part.high:.2f}"]


def pooled(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]] | None:
    """The average over seeds: counts are averaged, confidence and accuracy weighted by count."""
    curves = [curve for curve in curves if curve["edges"] == curves[0]["edges"]]
    if not curves:
        return None
    found: dict[str, list[float | None]] = {
        "edges": list(curves[0]["edges"]), "confidence": [], "accuracy": [], "count": []
    }  # fmt: skip
    for index in range(len(curves[0]["count"])):
        weights = [number(curve["count"][index]) or 0.0 for curve in curves]
        total = sum(weights)
        found["count"].append(total / len(curves))
        for key in ("confidence", "accuracy"):
            parts = [weight * (number(curve[key][index]) or 0.0) for weight, curve in zip(weights, curves, strict=True)]
            found[key].append(sum(parts) / total if total else None)
    return found


def differences(view: View) -> list[Figure]:
    """Intervals of each method's differences from the baseline: as fitted, and of the NLL against the scaled one."""
    found = []
    for metric, scaled in (("nll", False), ("nll", True), ("ece", False), ("accuracy", False)):
        rows = []
        for each in tables.contrasts(view):
            name = str(each.get("method"))
            if each.get("scaled") or bool(each.get("baseline_scaled")) != scaled or name not in view.groups:
                continue
            entry = (each.get("metrics") or {}).get(metric) or {}
            value, low, high = (_float(entry.get(key)) for key in ("value", "low", "high"))
            rows.append(Interval(name, view.colour(name), value, low, high, bool(entry.get("real"))))
        if rows:
            better = "right" if metric == "accuracy" else "left"
            against = f"{view.baseline}, scaled" if scaled else view.baseline
            axis = f"difference in {AXES[metric]} ({better} is better)"
            label = f"{AXES[metric]}: difference from {against}"
            svg = Markup(intervals_svg(rows, axis=axis, label=label))
            title = AXES[metric][:1].upper() + AXES[metric][1:]
            found.append(Figure(f"{title} against {against}", svg))
    return found


def _float(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found


def legend(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Names beside a sample of each line."""
    return [{"name": line.name, "sample": Markup(sample_svg(line))} for line in lines]


def risk_coverage(view: View) -> dict[str, Any] | None:
    """Error rate among the surest examples, against their share; means over seeds."""
    lines = []
    for name, cells in view.groups.items():
        curves = [cell["risk_coverage"] for cell in cells if cell.get("risk_coverage")]
        if not curves:
            continue
        coverage = curves[0]["coverage"]
        same = [curve["risk"] for curve in curves if curve["coverage"] == coverage]
        risks = [mean(column) for column in zip(*same, strict=True)]
        points = [(100 * c, 100 * risk) for c, risk in zip(coverage, risks, strict=True) if risk is not None]
        lines.append(Line(name, view.colour(name), points, view.styles[name][1]))
    if not any(line.points for line in lines):
        return None
    axes = ("share that is answered, surest first (%)", "errors among them (%)")
    return {
        "svg": Markup(lines_svg(lines, names=axes, label="Risk against coverage")),
        "legend": legend(lines),
        "table": tables.selective(view),
    }


def averaging(view: View) -> dict[str, Any] | None:
    """NLL of the mean weights and of 1, 4, … draws. No line for methods whose draws are not of the weights."""
    sizes = sorted({size for c in _cells(view) for size in (_curve(c) or {}).get("sizes") or []})
    lines, rows = [], []
    for name, cells in view.groups.items():
        known = [cell for cell in cells if cell.get("averaging")]
        if not known:
            continue
        start = mean([cell["averaging"].get("mean_weights") for cell in known])
        by_size = {size: mean([_at(_curve(cell), size) for cell in known]) for size in sizes}
        gains = [cell["averaging"].get("gain") or {} for cell in known]
        real = sum(bool(gain.get("real")) for gain in gains)
        change = mean([gain.get("value") for gain in gains])
        final = spread_of(known, "nll").mean
        texts = [show(start), *(show(by_size[size]) for size in sizes), show(final)]
        said = f"{show(change)}; real in {real} of {len(gains)} fits"
        rows.append(Row(name, view.colour(name), [*texts, said]))
        if any(value is not None for value in by_size.values()):
            steps = [start, *(by_size[size] for size in sizes)]
            points = [(float(i), value) for i, value in enumerate(steps) if value is not None]
            lines.append(Line(name, view.colour(name), points, view.styles[name][1], dots=True))
    if not rows:
        return None
    across = [(0.0, "mean weights"), *((float(i), str(size)) for i, size in enumerate(sizes, start=1))]
    axes = ("draws that are averaged", "NLL (nats per example)")
    drawn = any(line.points for line in lines)
    svg = (
        lines_svg(lines, names=axes, label="NLL against the number of draws", across=across, span=LEAST_NLL)
        if drawn
        else ""
    )
    columns = ["method", "mean weights", *(f"{size} draw{'s' * (size > 1)}" for size in sizes), "as reported", "change"]
    caption = (
        "NLL of the mean weights, and of the average of so many of the same draws (mean over subsets of them). Change: "
        "as reported minus mean weights, on the same examples; “real” where its 95 % interval leaves out 0."
    )
    table = Table("Table of NLL by draws", caption, columns, rows)
    return {"svg": Markup(svg), "legend": legend(lines), "table": table}


def _cells(view: View) -> list[Cell]:
    return [cell for cells in view.groups.values() for cell in cells]


def _curve(cell: Cell) -> Mapping[str, Any] | None:
    return (cell.get("averaging") or {}).get("by_draws")


def _at(curve: Mapping[str, Any] | None, size: int) -> Any:
    found = curve or {"sizes": [], "nll": []}
    return dict(zip(found["sizes"], found["nll"], strict=True)).get(size)


def uncertainty(view: View) -> dict[str, Any] | None:
    """Aleatoric and epistemic uncertainty by split, and as a table with both errors."""
    splits: dict[str, dict[str, list[Mapping[str, Any]]]] = {view.split: {}}
    for name, cells in view.groups.items():
        for cell in cells:
            found = {view.split: cell.get("uncertainty")}
            found |= {split: (each or {}).get("uncertainty") for split, each in (cell.get("ood") or {}).items()}
            for split, parts in found.items():
                if parts:
                    splits.setdefault(split, {}).setdefault(name, []).append(parts)
    most = math.log(len(view.class_names)) if len(view.class_names) > 1 else None
    figures, rows = [], []
    for split, methods in splits.items():
        stacks = []
        for name, parts in methods.items():
            total, aleatoric, epistemic = (
                _part(parts, key) for key in ("entropy", "expected_entropy", "mutual_information")
            )
            known = aleatoric is not None
            stacks.append(
                Stack(name, view.colour(name), _float(aleatoric if known else total), epistemic if known else None)
            )
            error = _error(parts)
            shown = show(epistemic, digits=4) + (f" ± {show(error, digits=4)}" if error is not None else "")
            rows.append(Row(name, view.colour(name), [split, show(total), show(aleatoric), shown]))
        if stacks:
            end = most or max(s.aleatoric + (s.epistemic or 0.0) for s in stacks)
            svg = stacks_svg(stacks, most=end, label=f"Aleatoric and epistemic uncertainty on {split}")
            figures.append(Figure(split, Markup(svg)))
    if not figures:
        return None
    caption = (
        "Means over examples and seeds in nats: the entropy of the averaged predictive, the average entropy of a draw, "
        "and their difference, the mutual information of label and weights, with its Monte Carlo standard error where "
        "independent draws of the weights allow one."
    )
    columns = ["method", "split", "total", "aleatoric", "epistemic"]
    return {"figures": figures, "table": Table("Table of uncertainty", caption, columns, rows)}


def _part(parts: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return mean([(each.get(key) or {}).get("value") for each in parts])


def _error(parts: Sequence[Mapping[str, Any]]) -> float | None:
    """The Monte Carlo error of the mean over seeds of the epistemic part."""
    errors = [number((each.get("mutual_information") or {}).get("monte_carlo_error")) for each in parts]
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(known) if known and len(known) == len(errors) else None


def shift(view: View) -> list[Figure]:
    """How NLL and ECE move from the reported split to the others."""
    others = {split: View.of(view.results, split).groups for split in view.shifts}
    found = []
    for metric in ("nll", "ece") if others else ():
        rows = []
        for name, cells in view.groups.items():
            moved = [(split, _float(spread_of(groups.get(name, []), metric).mean)) for split, groups in others.items()]
            rows.append(Move(name, view.colour(name), _float(spread_of(cells, metric).mean), moved))
        if any(finite(value) for row in rows for _, value in row.others):
            label = f"{AXES[metric]} on {view.split} and on {', '.join(others)}"
            axis = f"{AXES[metric]} (left is better)"
            found.append(Figure(AXES[metric], Markup(moves_svg(rows, axis=axis, label=label))))
    return found


def detection(view: View) -> list[dict[str, Any]]:
    """For each other split: histograms of the entropy, and how well each score tells its examples apart."""
    splits = dict.fromkeys(split for cell in _cells(view) for split in cell.get("ood") or {})
    found = []
    for split in splits:
        figures, rows, size = [], [], None
        for name, cells in view.groups.items():
            entries = [cell["ood"][split] for cell in cells if (cell.get("ood") or {}).get(split)]
            if not entries:
                continue
            size = entries[0].get("num_examples")
            histograms = [each["histogram"] for each in entries if each.get("histogram")]
            if histograms:
                both = {key: _summed(histograms, key) for key in ("inside", "outside")}
                label = f"{name}: entropy on {view.split} and {split}"
                shares = {"edges": histograms[0]["edges"], **both}
                svg = histograms_svg(shares, split=split, inside=view.split, label=label)
                figures.append(Figure(name, Markup(svg), view.colour(name)))
            for score in dict.fromkeys(key for each in entries for key in each.get("scores") or {}):
                estimates = [{"metrics": (each.get("scores") or {}).get(score)} for each in entries]
                texts = [tables.stat(spread_of(estimates, key)) for key in ("auroc", "aupr_out", "fpr95")]
                rows.append(Row(name, view.colour(name), [score.replace("_", " "), *texts]))
        columns = ["method", "score", "AUROC ↑", "AUPR ↑", "FPR@95 ↓"]
        inside = (view.task.get("splits") or {}).get(view.split)
        chance = f"{size / (size + inside):.2f}" if isinstance(size, int) and isinstance(inside, int) else "its share"
        caption = (
            f"Telling {split} from {view.split} by uncertainty. Chance: AUROC 0.5, AUPR (of finding {split}) {chance}, "
            f"FPR@95 0.95: the share of {split} that is let in when 95 % of {view.split} are."
        )
        table = Table(f"Detection of {split}", caption, columns, rows)
        found.append({"split": split, "size": size, "figures": figures, "table": table})
    return found


def _summed(histograms: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [sum(column) for column in zip(*(each[key] for each in histograms), strict=True)]


def costs(view: View) -> list[Figure]:
    """NLL against passes per prediction (doubling along the axis) and against the fit's time."""
    found = []
    for key, title in (("passes", "Passes through the model per prediction"), ("fit_seconds", "Time of the fit")):
        points = []
        for name, cells in view.groups.items():
            cost, nll = mean([(cell.get("cost") or {}).get(key) for cell in cells]), spread_of(cells, "nll")
            if cost is not None and cost > 0 and nll.mean is not None and math.isfinite(nll.mean):
                x = math.log2(cost) if key == "passes" else cost
                points.append(Point(name, view.colour(name), x, nll.mean, 0.0, nll.sd or 0.0))
        if points:
            # 2 and 3 passes would be written over each other: powers of two alone are ticks.
            powers = range(math.ceil(max(point.x for point in points)) + 1) if key == "passes" else ()
            across = [(float(power), str(2**power)) for power in powers] or None
            axes = ("passes" if key == "passes" else "seconds", "NLL (nats per example) → worse")
            svg = scatter_svg(points, names=axes, label=f"NLL against cost: {title.lower()}", across=across)
            found.append(Figure(title, Markup(svg)))
    return found


def heatmaps(view: View) -> list[Figure]:
    """What results say about layers, a picture and a table for each entry."""
    found = []
    for entry in view.results.get("heatmaps") or []:
        values, unit = entry.get("values") or {}, str(entry.get("unit") or "")
        if not any(finite(value) for row in values.values() for value in row.values()):
            continue
        title, method = str(entry.get("title") or unit), entry.get("method")
        layers = layers_of(values)
        rows = []
        for kind, by_layer in values.items():
            named = {str(layer): value for layer, value in by_layer.items()}
            rows.append(Row(str(kind), None, [show(named.get(layer)) for layer in layers]))
        table = Table(f"Table: {title}", f"{unit}, by layer.", ["sites", *layers], rows)
        colour = view.styles.get(str(method), ("var(--series-0)", ""))[0]
        svg = Markup(heatmap_svg(values, unit=unit, label=title))
        found.append(Figure(title, svg, colour, str(method or ""), table))
    return found
