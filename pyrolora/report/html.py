"""The HTML report of a comparison: one file that needs no network, made from a plain dictionary of results.

The dictionary is JSON-able:

    format: 2, title, baseline (a method's name)
    task: {name, class_names, splits: {split: number of examples}}
    settings: {num_draws, seeds, temperature ({method: β of the objective}), versions, hardware,
               recipes: [{name, file, sha256, git: {commit, file_changed, tree_changed} or None, priors, text}]}
    cells: one per method, seed and labelled split:
        {method, description, seed, split, num_draws, joint_draws, num_examples,
         metrics: {accuracy | nll | ece | brier | ... : {value, low, high}},
         scaling: fitted temperature τ or None, scaled_metrics: like metrics, or None,
         reliability: {edges (M + 1), confidence (M), accuracy (M), count (M)},
         risk_coverage: {coverage, risk},
         uncertainty: {entropy | expected_entropy | mutual_information: {value, low, high, monte_carlo_error}},
         averaging: {mean_weights, gain: {value, low, high, real}, by_draws: {sizes, nll} or None} or None,
         ood: {split: {scores: {score: {auroc | aupr_out | fpr95: {value, low, high}}},
                       histogram: {edges, inside, outside}, uncertainty, num_examples}},
         cost: {fit_seconds, fit_memory, predict_seconds, parameters, passes, ...}}
    contrasts: [{split, method, scaled, baseline, baseline_scaled, metrics: {metric: {value, low, high, real}}}]
    examples: [{kind: wrong | methods | draws, score: confidence or nats, text, label,
                says: {method: {probabilities (K), draws (S, K)}}}]
    heatmaps: [{title, unit, method, values: {kind of site: {layer: value}}}]
    failed: {file name of a cell without results: what it raised}

Everything but `cells` may be missing, and every number may be None or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from pyrolora.inference.archive import replacing
from pyrolora.report import cards, figures, tables
from pyrolora.report.plots import reliability_png
from pyrolora.report.summary import by_method, reported_split, sentences, show
from pyrolora.report.view import View

FORMAT = 3


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the report of `results` (described in this module) as one self-contained HTML file and returns its path.

    Args:
        results: the dictionary; it is read, never changed.
        path: the file to write; its folder must exist.

    Raises:
        ValueError: `results["format"]` is not the one that this version reads.
        ArchiveError: The file cannot be written, or the disk is full.
    """
    path = Path(path)
    with replacing(path) as new:
        new.write_text(render(results), encoding="utf-8")
    return path


def write_picture(results: Mapping[str, Any], path: Path) -> Path:
    """Writes the reliability diagrams of all methods side by side, pooled over seeds, as a PNG; returns its path.

    Args:
        results: as for `write_report`.
        path: the file to write; its folder must exist.
    """
    groups = by_method(results, reported_split(results))
    curves = {
        name: figures.pooled([c["reliability"] for c in cells if c.get("reliability")])
        for name, cells in groups.items()
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
            "make the report with the version of pyrolora that wrote the results, or run the comparison again "
            "(fits that are still there are not repeated)."
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"] = show
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(_context(results))


def _context(results: Mapping[str, Any]) -> dict[str, Any]:
    view = View.of(results)
    shifts = [View.of(results, split) for split in view.shifts]
    return {
        "title": str(results.get("title") or "Comparison"),
        "view": view,
        "summary": sentences(results),
        "rows": tables.results_rows(view),
        "columns": [tables.column(name) for name in tables.MAIN_METRICS],
        "details": tables.details(view),
        "difference_figures": figures.differences(view),
        "difference_tables": tables.differences(view),
        "overview": figures.overview(view),
        "reliability": figures.reliability(view),
        "risk": figures.risk_coverage(view),
        "uncertainty": figures.uncertainty(view),
        "averaging": figures.averaging(view),
        "shift_figures": figures.shift(view),
        "shifts": [
            {"view": other, "rows": tables.results_rows(other), "differences": tables.differences(other)}
            for other in shifts
        ],
        "detection": figures.detection(view),
        "examples": cards.groups(view),
        "cost_figures": figures.costs(view),
        "costs": tables.costs(view),
        "heatmaps": figures.heatmaps(view),
        "settings": results.get("settings") or {},
    }
