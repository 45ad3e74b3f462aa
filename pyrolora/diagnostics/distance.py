"""How far a posterior predictive is from another, from the truth where that is known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pandas as pd
from datasets import Dataset
from torch import Tensor

from pyrolora.guides.samples import Samples
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction


@dataclass(frozen=True)
class Distance:
    """Distances between two predictives on the same inputs.

    Logits are centred (their mean over classes is 0), as a softmax sees them; moments are over draws.

    Attributes:
        total_variation: ``½ Σ_k |p_k − p*_k|``, mean over inputs, in [0, 1].
        logit_mean: Root mean square over inputs and classes of ``E f − E f*``.
        logit_variance: The same of ``var f − var f*``.
        variance: Mean of ``var f``.
        reference_variance: Mean of ``var f*``: what the one before is to be compared with.
    """

    total_variation: float
    logit_mean: float
    logit_variance: float
    variance: float
    reference_variance: float


def distance(found: Prediction, reference: Prediction) -> Distance:
    """The distances of a prediction from a reference, that of NUTS for instance.

    Raises:
        ValueError: Predictions of other inputs or classes, or draws that were too many to be kept.
    """
    if found.log_mean.shape != reference.log_mean.shape:
        shapes = f"{tuple(found.log_mean.shape)} and {tuple(reference.log_mean.shape)}"
        raise ValueError(f"these are predictions of different inputs or classes: {shapes}")
    (mean, variance), (mean0, variance0) = _moments(found), _moments(reference)
    return Distance(
        total_variation=float(0.5 * (found.mean - reference.mean).abs().sum(-1).mean()),
        logit_mean=_rms(mean - mean0),
        logit_variance=_rms(variance - variance0),
        variance=float(variance.mean()),
        reference_variance=float(variance0.mean()),
    )


def distances(
    posteriors: Mapping[str, Posterior], truth: Posterior, data: Dataset, *, num_draws: int = 200, seed: int = 0
) -> pd.DataFrame:
    """One row for each posterior: its distances from the truth on the same inputs.

    Args:
        posteriors: Name to posterior.
        truth: Usually one of `guides.NUTS`, all of whose points are used.
        data: A tokenised split; labels are not looked at.
        num_draws: S of each posterior.
        seed: Of the draws.
    """
    points = truth.guide.num_kept if isinstance(truth.guide, Samples) else num_draws
    reference = truth.predict(data, points, seed=seed)
    rows = {
        name: asdict(distance(posterior.predict(data, num_draws, seed=seed), reference))
        for name, posterior in posteriors.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def _moments(prediction: Prediction) -> tuple[Tensor, Tensor]:
    """Mean and variance over draws of the centred logits, ``(n, K)``."""
    if prediction.draws is None:
        raise ValueError("the draws of a prediction were too many to be kept: use fewer inputs or draws")
    logits = prediction.draws.double()
    logits = logits - logits.mean(-1, keepdim=True)
    return logits.mean(0), logits.var(0, correction=0)


def _rms(value: Tensor) -> float:
    return math.sqrt(float(value.square().mean()))
