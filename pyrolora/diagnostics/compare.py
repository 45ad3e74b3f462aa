"""Compare posteriors under one evaluator: the same data, the same draws, the same metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
        scaling: Temperature τ fitted on validation data, or None.
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
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON."""
        return asdict(self)


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
        return pd.DataFrame.from_dict(rows, orient="index")

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
    """
    return Comparison(
        {
            name: evaluate_posterior(
                posterior, data, validation=validation, num_draws=num_draws, seed=seed, batch_size=batch_size
            )
            for name, posterior in posteriors.items()
        }
    )


def evaluate_posterior(
    posterior: Posterior,
    data: Dataset,
    *,
    validation: Dataset | None = None,
    num_draws: int = 16,
    seed: int = 0,
    batch_size: int = 32,
) -> Evaluation:
    """Evaluates one posterior; see `compare`.

    Raises:
        ValueError: Data without labels.
    """
    start = time.perf_counter()
    prediction = posterior.predict(data, num_draws, seed=seed, batch_size=batch_size)
    seconds = time.perf_counter() - start
    labels = _labels(prediction)
    log_mean = prediction.log_mean.numpy()
    scaling = None
    if validation is not None:
        held_out = posterior.predict(validation, num_draws, seed=seed, batch_size=batch_size)
        scaling = fit_temperature(held_out.log_mean.numpy(), _labels(held_out))
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
    """Examples worth a look: the most confidently wrong, then those on which the draws disagree most."""
    if prediction.texts is None or prediction.labels is None:
        return []
    wrong = prediction.log_mean.argmax(-1) != prediction.labels
    confidence = prediction.mean.max(-1).values
    by_error = (confidence * wrong).argsort(descending=True).tolist()[:count]
    by_doubt = prediction.mutual_information.argsort(descending=True).tolist()[:count]
    rows = []
    for i in dict.fromkeys(by_error + by_doubt):
        draws = [] if prediction.draws is None else prediction.draws[:, i].exp().tolist()
        rows.append(
            {
                "text": prediction.texts[i],
                "label": int(prediction.labels[i]),
                "probabilities": prediction.mean[i].tolist(),
                "draws": draws,
                "mutual_information": float(prediction.mutual_information[i]),
            }
        )
    return rows


def _labels(prediction: Prediction) -> np.ndarray:
    if prediction.labels is None:
        raise ValueError("the data have no labels, so nothing can be scored")
    return prediction.labels.numpy()
