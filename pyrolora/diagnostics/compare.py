"""Compare posteriors under one evaluator: the same data, the same draws, the same metrics."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
from datasets import Dataset

from pyrolora.diagnostics.bootstrap import Estimate
from pyrolora.diagnostics.differences import Contrast, contrasts
from pyrolora.diagnostics.evaluation import MAIN, Evaluation, evaluate_posterior, fit_scaling
from pyrolora.inference.posterior import Posterior


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several posteriors on one split; shows itself as a table.

    Attributes:
        evaluations: Name to evaluation.
        contrasts: Every method against the baseline on the same examples and resamples.
    """

    evaluations: dict[str, Evaluation]
    contrasts: list[Contrast] = field(default_factory=list)

    def to_pandas(self) -> pd.DataFrame:
        """One row a method (and one for its temperature-scaled predictive): metric values."""
        rows = {name: {metric: each[metric].value for metric in MAIN} for name, each in self._rows().items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(MAIN))

    def differences(self) -> pd.DataFrame:
        """One row for each contrast and metric: the difference, its 95 % interval, and whether it is real.

        Real means that the interval leaves out 0. It is about these fits: how much others of the same methods would
        differ, only several seeds can tell (`pyrolora compare`).
        """
        rows = [
            {
                "method": label(contrast.method, contrast.scaled),
                "baseline": label(contrast.baseline, contrast.baseline_scaled),
                "metric": metric,
                "difference": found.value,
                "low": found.low,
                "high": found.high,
                "real": found.real,
            }
            for contrast in self.contrasts
            for metric, found in contrast.metrics.items()
        ]
        columns = ["method", "baseline", "metric", "difference", "low", "high", "real"]
        return pd.DataFrame(rows, columns=columns)

    def _rows(self) -> dict[str, dict[str, Estimate]]:
        rows = {}
        for name, evaluation in self.evaluations.items():
            rows[name] = evaluation.metrics
            if evaluation.scaled_metrics is not None:
                rows[f"{name}, τ = {evaluation.scaling:.2f}"] = evaluation.scaled_metrics
        return rows

    def __repr__(self) -> str:
        return self.to_pandas().to_string(float_format=lambda value: f"{value:.3f}")

    def _repr_html_(self) -> str:
        cells = {name: {metric: _cell(each[metric]) for metric in MAIN} for name, each in self._rows().items()}
        table = pd.DataFrame.from_dict(cells, orient="index", columns=list(MAIN)).to_html(escape=True)
        first = next(iter(self.evaluations.values()))
        draws = sorted({each.num_draws for each in self.evaluations.values()})
        said = f"{first.num_examples} examples, {' or '.join(map(str, draws))} draws, 95 % intervals over examples."
        lines = [_sentence(each) for each in self.contrasts if not each.scaled]
        return f"<p>{html.escape(said)}</p>{table}" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)


def compare(
    posteriors: Mapping[str, Posterior],
    data: Dataset,
    *,
    validation: Dataset | None = None,
    ood: Mapping[str, Dataset] | None = None,
    baseline: str | None = None,
    num_draws: int = 16,
    seed: int = 0,
    batch_size: int = 32,
) -> Comparison:
    """Evaluates several posteriors on the same data with the same draws and metrics, and takes their differences.

    Args:
        posteriors: Name to posterior.
        data: The split that is reported; it chooses nothing.
        validation: Another split, on which the temperature scaling of each method is fitted.
        ood: Splits of another distribution that uncertainty should tell from `data`.
        baseline: The name that the others are compared with; default the first.
        num_draws: S.
        seed: Of the draws and of the bootstrap.
        batch_size: Rows at once.

    Raises:
        ValueError: No posteriors; a baseline that is none of them; data without labels.
    """
    if not posteriors:
        raise ValueError('there is nothing to compare: give posteriors by name, {"map": p, "mean field": q}')
    baseline = next(iter(posteriors)) if baseline is None else baseline
    if baseline not in posteriors:
        raise ValueError(f"the baseline {baseline!r} is none of the posteriors {', '.join(posteriors)}")
    evaluations, fits = {}, {}
    for name, posterior in posteriors.items():
        scaling = None
        if validation is not None:
            scaling = fit_scaling(posterior, validation, num_draws=num_draws, seed=seed, batch_size=batch_size)
        evaluations[name] = evaluate_posterior(
            posterior, data, scaling=scaling, ood=ood, num_draws=num_draws, seed=seed, batch_size=batch_size
        )
        fits[name] = {0: evaluations[name].resampled}
    return Comparison(evaluations, contrasts(fits, baseline=baseline))


def label(name: str, scaled: bool) -> str:
    """How tables call the temperature-scaled predictive of a method."""
    return f"{name}, scaled" if scaled else name


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _sentence(contrast: Contrast) -> str:
    parts = []
    for metric in MAIN:
        found = contrast.metrics[metric]
        verdict = "" if found.real else " (undecided)"
        parts.append(f"{metric} {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{verdict}")
    against = label(contrast.baseline, contrast.baseline_scaled)
    return f"{contrast.method} against {against}: {', '.join(parts)}"
