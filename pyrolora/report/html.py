"""The HTML report of a comparison: one file that needs no network, made from a plain dictionary of results.

The dictionary is JSON-able:

    format: 1, title, baseline (a method's name)
    task: {name, class_names, splits: {split: number of examples}}
    settings: {num_draws, seeds, temperature ({method: β of the objective}), versions, hardware, recipe, priors}
    cells: one per method, seed and split:
        {method, description, seed, split,
         metrics: {accuracy | nll | ece | brier | adaptive_ece | mce | ...: {value, low, high}},
         scaling: fitted temperature τ or None, scaled_metrics: like metrics, or None,
         reliability: {edges (M + 1), confidence (M), accuracy (M), count (M)},
         cost: {fit_seconds, predict_seconds, parameters, passes, ...},
         examples: [{text, label, probabilities (K), draws (S, K), mutual_information}]}

Everything but `cells` may be missing, and every number may be None or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pyrolora.report.plots import Point, draws_svg, overview_svg, reliability_png, reliability_svg
from pyrolora.report.summary import Cell, best, by_method, number, reported_split, sentences, show, spread_of

FORMAT = 1
MAIN_METRICS = ("accuracy", "nll", "ece", "brier")
EXAMPLES_SHOWN = 4
TEXT_LIMIT = 600
CONFIDENT = 0.7

_COLUMNS = {
    "accuracy": "accuracy ↑",
    "nll": "NLL ↓",
    "ece": "ECE ↓",
    "brier": "Brier ↓",
    "adaptive_ece": "adaptive ECE ↓",
    "mce": "MCE ↓",
    "auroc": "AUROC ↑",
}
_COSTS = {
    "fit_seconds": "fit (s)",
    "predict_seconds": "predict (s)",
    "parameters": "trained parameters",
    "passes": "passes per prediction",
}


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the report of `results` (described in this module) as one self-contained HTML file and returns its path.

    Args:
        results: the dictionary; it is read, never changed.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: `results["format"]` is not the one that this version reads.
    """
    path = Path(path)
    path.write_text(render(results), encoding="utf-8")
    return path


def write_picture(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the reliability diagrams of all methods side by side, pooled over seeds, as a PNG; returns its path.

    Args:
        results: as for `write_report`.
        path: the file to write; its folder must exist.
    """
    groups = by_method(results, reported_split(results))
    curves = {
        name: _pooled([c["reliability"] for c in cells if c.get("reliability")]) for name, cells in groups.items()
    }
    return reliability_png({name: curve for name, curve in curves.items() if curve}, path)


def render(results: Mapping[str, Any]) -> str:
    """The report of `results` as a string of HTML; texts from the dictionary are escaped.

    Raises:
        ValueError: `results["format"]` is not the one that this version reads.
    """
    if results.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"results have format {results['format']!r}, this version reads format {FORMAT}: "
            "make the report with the version of pyrolora that wrote the results."
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(_context(results))


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    split = reported_split(results)
    groups = by_method(results, split)
    task = results.get("task") or {}
    names = [str(name) for name in task.get("class_names") or []]
    colours = _colours(list(dict.fromkeys(str(cell.get("method")) for cell in results.get("cells") or [])), results)
    others = list(dict.fromkeys(str(cell.get("split")) for cell in results.get("cells") or []))
    wrong = _examples(groups, names, colours, kind="wrong")
    disputed = _examples(groups, names, colours, kind="disputed")
    return {
        "title": str(results.get("title") or "Comparison"),
        "baseline": str(results.get("baseline")),
        "split": split,
        "summary": sentences(results),
        "methods": [_method(name, cells, colours[name]) for name, cells in groups.items()],
        "rows": _rows(groups, colours),
        "columns": [_COLUMNS[name] for name in MAIN_METRICS],
        "overview": _overview(groups, colours),
        "details": _details(groups),
        "costs": _costs(groups, str(results.get("baseline"))),
        "wrong": wrong,
        "disputed": [card for card in disputed if card not in wrong],
        "shifts": [
            _shift(results, other, (task.get("splits") or {}).get(other), colours) for other in others if other != split
        ],
        "task": task,
        "settings": results.get("settings") or {},
    }


def _colours(methods: Sequence[str], results: Mapping[str, Any]) -> dict[str, str]:
    """A style-sheet colour per method: the baseline is grey, so that the eye goes to what is compared with it."""
    baseline = str(results.get("baseline"))
    others = [name for name in methods if name != baseline]
    return {baseline: "var(--baseline)"} | {name: f"var(--series-{i % 7})" for i, name in enumerate(others)}


def _method(name: str, cells: Sequence[Cell], colour: str) -> dict[str, Any]:
    described = next((cell["description"] for cell in cells if cell.get("description")), "")
    curve = _pooled([cell["reliability"] for cell in cells if cell.get("reliability")])
    return {
        "name": name,
        "colour": colour,
        "description": str(described),
        "ece": spread_of(cells, "ece"),
        "diagram": Markup(reliability_svg(curve, title=name)) if curve else "",
    }


def _pooled(curves: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]] | None:
    """The average over seeds: counts are averaged, confidence and accuracy weighted by count."""
    curves = [curve for curve in curves if curve["edges"] == curves[0]["edges"]]
    if not curves:
        return None
    pooled: dict[str, list[float | None]] = {
        "edges": list(curves[0]["edges"]), "confidence": [], "accuracy": [], "count": []
    }  # fmt: skip
    for index in range(len(curves[0]["count"])):
        weights = [number(curve["count"][index]) or 0.0 for curve in curves]
        total = sum(weights)
        pooled["count"].append(total / len(curves))
        for key in ("confidence", "accuracy"):
            parts = [weight * (number(curve[key][index]) or 0.0) for weight, curve in zip(weights, curves, strict=True)]
            pooled[key].append(sum(parts) / total if total else None)
    return pooled


def _rows(groups: Mapping[str, Sequence[Cell]], colours: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for name, cells in groups.items():
        versions = [{"label": name, "scaled": False, "spreads": [spread_of(cells, key) for key in MAIN_METRICS]}]
        scaled = [spread_of(cells, key, scaled=True) for key in MAIN_METRICS]
        if any(spread.count for spread in scaled):
            taus = [tau for tau in (number(cell.get("scaling")) for cell in cells) if tau is not None]
            label = f"τ = {sum(taus) / len(taus):.2f}" if taus else "scaled"
            versions.append({"label": label, "scaled": True, "spreads": scaled})
        for version in versions:
            winners = [
                best(groups, key, scaled=bool(version["scaled"]), highest=key == "accuracy") for key in MAIN_METRICS
            ]
            version["best"] = [winner == name for winner in winners]
        rows.append({"method": name, "colour": colours[name], "versions": versions})
    return rows


def _overview(groups: Mapping[str, Sequence[Cell]], colours: Mapping[str, str]) -> dict[str, Any]:
    points, missing = [], []
    for name, cells in groups.items():
        nll, ece = spread_of(cells, "nll"), spread_of(cells, "ece")
        if nll.mean is None or ece.mean is None or not math.isfinite(nll.mean + ece.mean):
            missing.append(name)
            continue
        x, y = spread_of(cells, "nll", scaled=True).mean, spread_of(cells, "ece", scaled=True).mean
        scaled = (x, y) if x is not None and y is not None and math.isfinite(x + y) else None
        points.append(Point(name, colours[name], nll.mean, ece.mean, nll.sd or 0.0, ece.sd or 0.0, scaled))
    return {"svg": Markup(overview_svg(points)) if points else "", "missing": missing}


def _details(groups: Mapping[str, Sequence[Cell]]) -> dict[str, Any]:
    """Every seed's numbers with their intervals."""
    keys = _metric_keys([cell for cells in groups.values() for cell in cells])
    rows = []
    for name, cells in groups.items():
        for cell in cells:
            for scaled, key in ((False, "metrics"), (True, "scaled_metrics")):
                metrics = cell.get(key) or {}
                if metrics:
                    label = f"scaled, τ = {show(cell.get('scaling'), digits=2)}" if scaled else "as fitted"
                    values = [metrics.get(metric) or {} for metric in keys]
                    rows.append({"method": name, "seed": cell.get("seed"), "label": label, "values": values})
    return {"columns": [_COLUMNS.get(key, key.replace("_", " ")) for key in keys], "rows": rows}


def _metric_keys(cells: Sequence[Cell]) -> list[str]:
    found = {key for cell in cells for key in (cell.get("metrics") or {})}
    return [key for key in _COLUMNS if key in found] + sorted(found - set(_COLUMNS))


def _costs(groups: Mapping[str, Sequence[Cell]], baseline: str) -> dict[str, Any] | None:
    found = {key for cells in groups.values() for cell in cells for key in (cell.get("cost") or {})}
    keys = [key for key in _COSTS if key in found] + sorted(found - set(_COSTS))
    if not keys:
        return None

    def mean(name: str, key: str) -> float | None:
        values = [number((cell.get("cost") or {}).get(key)) for cell in groups.get(name, [])]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    rows = []
    for name in groups:
        values = [mean(name, key) for key in keys]
        texts = [_amount(value) for value in values]
        if "fit_seconds" in keys:
            own, reference = mean(name, "fit_seconds"), mean(baseline, "fit_seconds")
            texts.append(f"{own / reference:.2f} ×" if own is not None and reference else "–")
        rows.append({"method": name, "texts": texts})
    columns = [_COSTS.get(key, key.replace("_", " ")) for key in keys]
    return {"columns": columns + (["fit, relative"] if "fit_seconds" in keys else []), "rows": rows}


def _amount(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return show(value)
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"


def _shift(results: Mapping[str, Any], split: str, size: Any, colours: Mapping[str, str]) -> dict[str, Any]:
    """Another split's table: whatever was measured there."""
    groups = by_method(results, split)
    keys = _metric_keys([cell for cells in groups.values() for cell in cells])
    rows = [
        {"method": name, "colour": colours[name], "spreads": [spread_of(cells, key) for key in keys]}
        for name, cells in groups.items()
    ]
    return {"name": split, "size": size, "rows": rows, "columns": [_COLUMNS.get(k, k.replace("_", " ")) for k in keys]}


def _examples(
    groups: Mapping[str, Sequence[Cell]], names: Sequence[str], colours: Mapping[str, str], *, kind: str
) -> list[dict[str, Any]]:
    """Texts on which some method is confidently wrong, or where its draws disagree most, and what each says."""
    texts: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for method, cells in groups.items():
        first = next((cell for cell in cells if cell.get("examples")), None)
        for example in (first or {}).get("examples") or []:
            label, probabilities = example.get("label"), example.get("probabilities") or []
            if isinstance(label, int) and 0 <= label < len(probabilities) and None not in map(number, probabilities):
                texts.setdefault((str(example.get("text")), label), {})[method] = example
    score = _confident_error if kind == "wrong" else _disagreement
    ranked = sorted(texts, key=lambda key: -max(score(example) for example in texts[key].values()))
    chosen = [key for key in ranked if max(score(example) for example in texts[key].values()) > 0.0]
    cards = []
    for text, label in chosen[:EXAMPLES_SHOWN]:
        says = [_say(method, example, names, colours[method]) for method, example in texts[text, label].items()]
        clipped = text if len(text) <= TEXT_LIMIT else text[:TEXT_LIMIT] + " …"
        cards.append({"text": clipped, "label": _class_name(names, label), "says": says})
    return cards


def _confident_error(example: Mapping[str, Any]) -> float:
    probabilities = example["probabilities"]
    top = max(range(len(probabilities)), key=probabilities.__getitem__)
    wrong = top != example["label"] and probabilities[top] >= CONFIDENT
    return float(probabilities[top]) if wrong else 0.0


def _disagreement(example: Mapping[str, Any]) -> float:
    """The mutual information I = H(mean of draws) − mean of H(draw) in nats: as given, or from the draws, or 0."""
    given = number(example.get("mutual_information"))
    draws = example.get("draws") or []
    if given is not None or not draws:
        return given or 0.0
    mean = [math.fsum(column) / len(draws) for column in zip(*draws, strict=True)]
    return _entropy(mean) - math.fsum(_entropy(draw) for draw in draws) / len(draws)


def _entropy(probabilities: Sequence[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _say(method: str, example: Mapping[str, Any], names: Sequence[str], colour: str) -> dict[str, Any]:
    probabilities, label = example["probabilities"], example["label"]
    top = max(range(len(probabilities)), key=probabilities.__getitem__)
    draws = [draw[label] for draw in example.get("draws") or []] or [probabilities[label]]
    return {
        "method": method,
        "colour": colour,
        "right": top == label,
        "top": _class_name(names, top),
        "confidence": show(probabilities[top], digits=2),
        "probability": show(probabilities[label], digits=2),
        "draws": Markup(draws_svg(draws, label=f"{method}, probability of the true class")),
    }
