"""The one evaluator: what a posterior scores on a split, with the same metrics and resamples for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset

from pyrolora.diagnostics import calibration, selective
from pyrolora.diagnostics.bootstrap import Estimate, FloatArray, Resampled, percentile_estimate, resamples
from pyrolora.diagnostics.differences import Resamples, difference
from pyrolora.diagnostics.ood import separation
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.diagnostics.uncertainty import decompose, nll_by_draws
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction

MAIN = ("accuracy", "nll", "ece", "brier")
_EXAMPLES = 6
_HISTOGRAM_BINS = 20


@dataclass(frozen=True)
class Evaluation:
    """What one posterior scores on one split.

    Attributes:
        metrics: Metric to value and 95 % bootstrap interval over examples: those of `calibration` and `selective`.
        scaling: Temperature τ of the predictive, fitted on another split; or None.
        scaled_metrics: The metrics after temperature scaling, or None.
        reliability: The reliability curve, as plain lists.
        risk_coverage: Error rate among the surest 1, 2, … 100 % of the examples: coverage and risk, as plain lists.
        uncertainty: Total (entropy), aleatoric (expected_entropy) and epistemic (mutual_information) uncertainty:
            mean over examples in nats, 95 % interval, Monte Carlo error; see `uncertainty_of`.
        averaging: What averaging over draws does to the NLL, see `averaging_of`; None for a point estimate.
        ood: Out-of-distribution split to how well uncertainty tells it from this split, see `separation_of`.
        num_draws: S.
        joint_draws: Whether draws are of the weights, see `Prediction.joint`.
        num_examples: n.
        class_names: The support: the classes that probabilities are over.
        predict_seconds: Wall-clock time of the prediction.
        examples: The examples of most interest: confidently wrong, or where draws disagree.
        resampled: The metrics on the common resamples, as fitted and scaled, to make differences from.
    """

    metrics: dict[str, Estimate]
    scaling: float | None
    scaled_metrics: dict[str, Estimate] | None
    reliability: dict[str, Any]
    risk_coverage: dict[str, list[float]]
    uncertainty: dict[str, dict[str, float | None]]
    averaging: dict[str, Any] | None
    ood: dict[str, dict[str, Any]]
    num_draws: int
    joint_draws: bool
    num_examples: int
    class_names: tuple[str, ...]
    predict_seconds: float
    examples: list[dict[str, Any]]
    resampled: Resamples = field(default_factory=dict, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for JSON; without the resampled values."""
        found = asdict(replace(self, resampled={}))
        del found["resampled"]
        return {**found, "class_names": list(self.class_names)}

    def __str__(self) -> str:
        points = "draw(s)" if self.joint_draws else "quasi-Monte Carlo point(s)"
        lines = [f"{self.num_examples} examples, {self.num_draws} {points}, 95 % intervals"]
        if self.scaled_metrics is not None:
            lines[0] += f"; last column after temperature scaling, τ = {self.scaling:.2f}"
        for name, estimate in self.metrics.items():
            after = "" if self.scaled_metrics is None else f"   {self.scaled_metrics[name].value:.4f}"
            lines.append(f"  {name:13s} {estimate.value:.4f}  [{estimate.low:.4f}, {estimate.high:.4f}]{after}")
        return "\n".join([*lines, *_remarks(self)])


def evaluate_posterior(
    posterior: Posterior,
    data: Dataset,
    *,
    scaling: float | None = None,
    ood: Mapping[str, Dataset] | None = None,
    num_draws: int = 16,
    seed: int = 0,
    batch_size: int = 32,
) -> Evaluation:
    """Evaluates one posterior on one split.

    Args:
        posterior: Any posterior over classes.
        data: The split that is reported.
        scaling: Temperature τ, see `fit_scaling`, for the scaled metrics.
        ood: Splits of another distribution that uncertainty should tell from `data`; they need no labels.
        num_draws: S; 0 for the mean weights.
        seed: Of the draws and of the bootstrap.
        batch_size: Rows at once.

    Raises:
        ValueError: Data without labels.
    """

    def predict(rows: Dataset, draws: int) -> Prediction:
        return posterior.predict(rows, draws, seed=seed, batch_size=batch_size)

    start = time.perf_counter()
    prediction = predict(data, num_draws)
    seconds = time.perf_counter() - start
    labels_of(prediction)  # no labels stop here, not after further predictions
    averaged = num_draws > 0 and posterior.guide.averages
    found = evaluate_prediction(
        prediction,
        scaling=scaling,
        ood={name: predict(rows, num_draws) for name, rows in (ood or {}).items()},
        mean_weights=predict(data, 0) if averaged else None,
        seed=seed,
    )
    return replace(found, predict_seconds=seconds)


def evaluate_prediction(
    prediction: Prediction,
    *,
    scaling: float | None = None,
    ood: Mapping[str, Prediction] | None = None,
    mean_weights: Prediction | None = None,
    seed: int = 0,
) -> Evaluation:
    """Evaluates a prediction on a labelled split.

    Args:
        prediction: Of the split that is reported.
        scaling: Temperature τ for the scaled metrics.
        ood: The same posterior's predictions on splits of another distribution.
        mean_weights: The same posterior's prediction on the same rows by its mean weights, in place of draws.
        seed: Of the bootstrap.

    Raises:
        ValueError: A prediction without labels.
    """
    labels = labels_of(prediction)
    log_mean = prediction.log_mean.numpy()

    predictives = {False: log_mean} if scaling is None else {False: log_mean, True: scale(log_mean, scaling)}
    found = {scaled: _resampled(values, labels, seed=seed) for scaled, values in predictives.items()}
    metrics = {scaled: _metrics(values, labels, found[scaled], seed=seed) for scaled, values in predictives.items()}
    return Evaluation(
        metrics=metrics[False],
        scaling=scaling,
        scaled_metrics=metrics.get(True),
        reliability=calibration.reliability_curve(log_mean, labels).to_dict(),
        risk_coverage=_percentages(selective.risk_coverage_curve(log_mean, labels)),
        uncertainty=uncertainty_of(prediction, seed=seed),
        averaging=None if mean_weights is None else averaging_of(prediction, mean_weights, seed=seed),
        ood={name: separation_of(prediction, other, seed=seed) for name, other in (ood or {}).items()},
        num_draws=prediction.num_draws,
        joint_draws=prediction.joint,
        num_examples=len(prediction),
        class_names=prediction.class_names,
        predict_seconds=math.nan,
        examples=interesting(prediction),
        resampled=found,
    )


def _resampled(log_mean: FloatArray, labels: np.ndarray, *, seed: int) -> dict[str, Resampled]:
    """Every metric that resamples of the examples have in common, (n, K) and (n,)."""
    return {
        **calibration.resampled(log_mean, labels, seed=seed),
        **selective.resampled(log_mean, labels, seed=seed),
    }


def _metrics(
    log_mean: FloatArray, labels: np.ndarray, found: Mapping[str, Resampled], *, seed: int
) -> dict[str, Estimate]:
    """Intervals from resampled values, and the one metric that resamples errors and correct answers apart."""
    estimates = {name: calibration.interval(name)(each.value, each.samples) for name, each in found.items()}
    return {**estimates, "error_auroc": selective.error_detection(log_mean, labels, seed=seed)}


def fit_scaling(
    posterior: Posterior, validation: Dataset, *, num_draws: int = 16, seed: int = 0, batch_size: int = 32
) -> float:
    """The temperature τ of a posterior's mean predictive, fitted on validation data; never on what is reported."""
    prediction = posterior.predict(validation, num_draws, seed=seed, batch_size=batch_size)
    return fit_temperature(prediction.log_mean.numpy(), labels_of(prediction))


def uncertainty_of(prediction: Prediction, *, seed: int = 0) -> dict[str, dict[str, float | None]]:
    """The mean entropy, expected entropy and mutual information over examples, in nats, with both their errors.

    The Monte Carlo error says how well these draws know the mean, examples held fixed; it is None where it cannot be
    estimated: few draws, draws too many to keep, draws that are not `joint` (quasi-Monte Carlo points, whose error
    is far below that of as many independent draws), or a calibrated posterior, whose draws do not average to its
    predictive. A closed-form predictive has no split: its parts are missing.

    Returns:
        ``{component: {value, low, high, monte_carlo_error}}``.
    """
    if (draws := _averaged(prediction)) is not None:
        return decompose(draws, seed=seed).to_dict()
    columns = {"entropy": prediction.entropy}
    if prediction.num_draws > 1:
        columns |= {
            "expected_entropy": prediction.expected_entropy,
            "mutual_information": prediction.mutual_information,
        }
    found = {}
    for name, column in columns.items():
        values = column.double().numpy()
        rows = resamples([len(values)], num_bootstrap=1000, seed=seed)
        means = np.concatenate([values[chosen].mean(axis=-1) for (chosen,) in rows])
        found[name] = {**percentile_estimate(float(values.mean()), means).to_dict(), "monte_carlo_error": None}
    return found


def averaging_of(prediction: Prediction, mean_weights: Prediction, *, seed: int = 0) -> dict[str, Any]:
    """What averaging over draws does to the NLL: if nothing moves, the noise does nothing.

    Returns:
        ``mean_weights``: the NLL of the mean weights alone; ``gain``: NLL of all draws minus that, on the same
        examples, as `Difference.to_dict`; ``by_draws``: the NLL against the number of draws 1, 4, 16, … S, from the
        same draws, as `DrawsCurve.to_dict`. None in its place where draws were too many to keep, are not `joint` (there
        is no single draw of the weights then, and more points cost no more passes), or are not what is averaged, in
        a calibrated posterior.
    """
    labels = labels_of(prediction)
    ours, theirs = (
        calibration.resampled(each.log_mean.numpy(), labels, seed=seed)["nll"] for each in (prediction, mean_weights)
    )
    curve = None
    if (draws := _averaged(prediction)) is not None:
        size = prediction.num_draws
        sizes = [4**i for i in range(size.bit_length()) if 4**i < size] + [size]
        curve = nll_by_draws(draws, labels, sizes=sizes, seed=seed).to_dict()
    gain = difference({0: ours}, {0: theirs})
    return {"mean_weights": theirs.value, "gain": gain.to_dict(), "by_draws": curve}


def separation_of(inside: Prediction, outside: Prediction, *, seed: int = 0) -> dict[str, Any]:
    """How well the uncertainty of a prediction tells inputs of another distribution from those of the task.

    Returns:
        ``scores``: score (1 − maximal probability, entropy, and mutual information where there is more than one draw)
        to AUROC, AUPR and FPR@95 as `ood.separation` gives them; ``histogram``: counts of the entropy in 20 bins of
        [0, log K], inside and outside; ``uncertainty``: of the other split, as `uncertainty_of`; ``num_examples``.
    """
    first, second = _scores(inside), _scores(outside)
    edges = np.linspace(0.0, math.log(inside.log_mean.shape[1]), _HISTOGRAM_BINS + 1)
    counts = {}
    for name, scores in (("inside", first), ("outside", second)):
        # Round-off may put the entropy of a uniform predictive just above log K.
        counts[name] = np.histogram(np.clip(scores["entropy"], 0.0, edges[-1]), edges)[0].tolist()
    return {
        "scores": {name: separation(first[name], second[name], seed=seed) for name in first},
        "histogram": {"edges": edges.tolist(), **counts},
        "uncertainty": uncertainty_of(outside, seed=seed),
        "num_examples": len(outside),
    }


def _scores(prediction: Prediction) -> dict[str, FloatArray]:
    """As `ood.scores`, from what a prediction holds whether or not its draws were kept."""
    found = {
        "max_probability": -np.expm1(prediction.log_mean.double().numpy().max(axis=-1)),
        "entropy": prediction.entropy.double().numpy(),
    }
    if prediction.num_draws > 1:
        found["mutual_information"] = prediction.mutual_information.double().numpy()
    return found


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


def labels_of(prediction: Prediction) -> np.ndarray:
    """The labels of a prediction on a split, all of them known.

    Raises:
        ValueError: There are none, or some are unknown.
    """
    if prediction.labels is None:
        raise ValueError("the data have no labels, so nothing can be scored")
    labels = prediction.labels.numpy()
    if (labels < 0).any():
        raise ValueError(f"{(labels < 0).sum()} of {len(labels)} labels are unknown, so nothing can be scored")
    return labels


def _averaged(prediction: Prediction) -> np.ndarray | None:
    """The draws ``(S, n, K)``, where they are kept, independent, and the predictive is their average."""
    plain = prediction.joint and prediction.scaling == 1
    return prediction.draws.numpy() if plain and prediction.draws is not None else None


def _percentages(curve: selective.RiskCoverageCurve) -> dict[str, list[float]]:
    """The curve at 1, 2, … 100 % of the examples: a thousand points draw the same line as a hundred."""
    n = len(curve.coverage)
    places = sorted({max(1, round(n * percent / 100)) - 1 for percent in range(1, 101)})
    return {"coverage": curve.coverage[places].tolist(), "risk": curve.risk[places].tolist()}


def _remarks(found: Evaluation) -> list[str]:
    """What an evaluation says beside its metrics, a line each."""
    lines = []
    if "mutual_information" in found.uncertainty:
        parts = [found.uncertainty[name] for name in ("entropy", "expected_entropy", "mutual_information")]
        total, aleatoric, epistemic = (part["value"] for part in parts)
        error = parts[2]["monte_carlo_error"]
        known = "" if error is None else f" (Monte Carlo error {error:.4f})"
        lines.append(
            f"uncertainty: total {total:.4f} = aleatoric {aleatoric:.4f} + epistemic {epistemic:.4f} nats{known}"
        )
    if found.averaging is not None:
        curve = found.averaging["by_draws"] or {"sizes": [found.num_draws], "nll": [found.metrics["nll"].value]}
        steps = [f"{nll:.4f} with {size}" for size, nll in zip(curve["sizes"], curve["nll"], strict=True)]
        verdict = "" if found.averaging["gain"]["real"] else ": averaging changes nothing that these examples show"
        lines.append(f"NLL: {found.averaging['mean_weights']:.4f} with mean weights, {', '.join(steps)}{verdict}")
    for split, apart in found.ood.items():
        scores = [
            f"{name.replace('_', ' ')} {each['auroc'].value:.3f} [{each['auroc'].low:.3f}, {each['auroc'].high:.3f}]"
            for name, each in apart["scores"].items()
        ]
        lines.append(f"{split}, {apart['num_examples']} examples told apart (AUROC): {', '.join(scores)}")
    return lines
