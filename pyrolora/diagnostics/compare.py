"""Compare posteriors under one evaluator: the same data, the same draws, the same metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from pyrolora.diagnostics.calibration import Estimate, evaluate, reliability_curve
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction

MAIN = ("accuracy", "nll", "ece", "brier")
_EXAMPLES = 6


@dataclass(frozen=True)
class Evaluation:
    """What one posterior scores on one split.

    Attributes:
        metrics: Metric to value and 95 % bootstrap interval over examples.
        scaling: Temperature τ of the predictive, fitted on another split; or None.
        scaled_metrics: The metrics after temperature scaling, or None.
        reliability: The reliability curve, as plain lists.
        num_draws: S.
        num_examples: n.
        predict_seconds: Wall-clock time of the prediction.
        examples: The examples of most interest: confidently wrong, or where draws disagree.
    """

    metrics: dict[str, Estimate]
    scaling: float | None
    scaled_metrics: dict[str, Estimate] | None
    reliability: dict[str, Any]
    num_draws: int
    num_examples: int
    predict_seconds: float
    examples: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.num_examples} examples, {self.num_draws} draw(s), 95 % intervals"]
        if self.scaled_metrics is not None:
            lines[0] += f"; last column after temperature scaling, τ = {self.scaling:.2f}"
        for name, estimate in self.metrics.items():
            after = "" if self.scaled_metrics is None else f"   {self.scaled_metrics[name].value:.4f}"
            lines.append(f"  {name:13s} {estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]{after}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several posteriors on one split; shows itself as a table."""

    evaluations: dict[str, Evaluation]

    def to_pandas(self) -> pd.DataFrame:
        """One row a method (and one for its temperature-scaled predictive): metric values."""
        rows = {}
        for name, evaluation in self.evaluations.items():
            rows[name] = {metric: evaluation.metrics[metric].value for metric in MAIN}
            if evaluation.scaled_metrics is not None:
                scaled = {metric: evaluation.scaled_metrics[metric].value for metric in MAIN}
                rows[f"{name}, τ = {evaluation.scaling:.2f}"] = scaled
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(MAIN))

    def __repr__(self) -> str:
        return self.to_pandas().to_string(float_format=lambda value: f"{value:.3f}")

    def _repr_html_(self) -> str:
        return self.to_pandas().to_html(float_format=lambda value: f"{value:.3f}")


def compare(
    posteriors: Mapping[str, Posterior],
    data: Dataset,
    *,
    validation: Dataset | None = None,
    num_draws: int = 16,
    seed: int = 0,
    batch_size: int = 32,
) -> Comparison:
    """Evaluates several posteriors on the same data with the same draws and metrics.

    Args:
        posteriors: Name to posterior.
        data: The split that is reported; it chooses nothing.
        validation: Another split, on which the temperature scaling of each method is fitted.
        num_draws: S.
        seed: Of the draws and of the bootstrap.
        batch_size: Rows at once.

    Raises:
        ValueError: No posteriors; data without labels.
    """
    if not posteriors:
        raise ValueError('there is nothing to compare: give posteriors by name, {"map": p, "mean field": q}')
    evaluations = {}
    for name, posterior in posteriors.items():
        scaling = None
        if validation is not None:
            scaling = fit_scaling(posterior, validation, num_draws=num_draws, seed=seed, batch_size=batch_size)
        evaluations[name] = evaluate_posterior(
            posterior, data, scaling=scaling, num_draws=num_draws, seed=seed, batch_size=batch_size
        )
    return Comparison(evaluations)


def fit_scaling(
    posterior: Posterior, validation: Dataset, *, num_draws: int = 16, seed: int = 0, batch_size: int = 32
) -> float:
    """The temperature τ of a posterior's mean predictive, fitted on validation data; never on what is reported."""
    prediction = posterior.predict(validation, num_draws, seed=seed, batch_size=batch_size)
    return fit_temperature(prediction.log_mean.numpy(), _labels(prediction))


def evaluate_posterior(
    posterior: Posterior,
    data: Dataset,
    *,
    scaling: float | None = None,
    num_draws: int = 16,
    seed: int = 0,
    batch_size: int = 32,
) -> Evaluation:
    """Evaluates one posterior on one split.

    Args:
        posterior: Any posterior over classes.
        data: The split that is reported.
        scaling: Temperature τ, see `fit_scaling`, for the scaled metrics.
        num_draws: S; 0 for the mean weights.
        seed: Of the draws and of the bootstrap.
        batch_size: Rows at once.

    Raises:
        ValueError: Data without labels.
    """
    start = time.perf_counter()
    prediction = posterior.predict(data, num_draws, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - start
    labels = _labels(prediction)
    log_mean = prediction.log_mean.numpy()
    return Evaluation(
        metrics=evaluate(log_mean, labels, seed=seed),
        scaling=scaling,
        scaled_metrics=None if scaling is None else evaluate(scale(log_mean, scaling), labels, seed=seed),
        reliability=reliability_curve(log_mean, labels).to_dict(),
        num_draws=prediction.num_draws,
        num_examples=len(prediction),
        predict_seconds=seconds,
        examples=interesting(prediction),
    )


def interesting(prediction: Prediction, count: int = _EXAMPLES) -> list[dict[str, Any]]:
    """Examples worth a look: the most confidently wrong, then those on which the draws disagree most.

    Args:
        prediction: Of a labelled split.
        count: How many of each kind at most.

    Returns:
        For each example its text, label, mean probabilities ``(K,)``, those of every draw ``(S, K)``, and the mutual
        information in nats. Nothing where texts or labels are unknown.
    """
    if prediction.texts is None or prediction.labels is None:
        return []
    confidence, predicted = prediction.mean.max(-1)
    wrong = predicted != prediction.labels
    by_error = [i for i in (confidence * wrong).argsort(descending=True).tolist() if wrong[i]]
    by_doubt = prediction.mutual_information.argsort(descending=True).tolist()
    return [
        {
            "text": prediction.texts[i],
            "label": int(prediction.labels[i]),
            "probabilities": prediction.mean[i].tolist(),
            "draws": [] if prediction.draws is None else prediction.draws[:, i].exp().tolist(),
            "mutual_information": float(prediction.mutual_information[i]),
        }
        for i in dict.fromkeys(by_error[:count] + by_doubt[:count])
    ]


def _labels(prediction: Prediction) -> np.ndarray:
    if prediction.labels is None:
        raise ValueError("the data have no labels, so nothing can be scored")
    labels = prediction.labels.numpy()
    if (labels < 0).any():
        raise ValueError(f"{(labels < 0).sum()} of {len(labels)} labels are unknown, so nothing can be scored")
    return labels
