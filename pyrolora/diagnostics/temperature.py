"""Temperature scaling of a mean predictive: one number, fitted on validation data, that composes with any posterior."""

from __future__ import annotations

import copy
import logging
import math

import numpy as np
from datasets import Dataset
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from pyrolora.diagnostics.calibration import FloatArray, check_predictive
from pyrolora.inference.posterior import Posterior

LOG_BOUNDS = (-3.0, 5.0)

_log = logging.getLogger("pyrolora")


def scale(log_probabilities: ArrayLike, temperature: float) -> FloatArray:
    """The log predictive at another temperature, normalised again.

    log p_τ(k) = log p̄(k) / τ − log Σ_j p̄(j)^{1/τ};  τ > 1 flattens, τ < 1 sharpens, the order of the classes
    never changes.  Shapes: (..., K), scalar → (..., K), natural logarithms.

    Raises:
        ValueError: the temperature is not a positive finite number.

    Source: Guo et al. 2017, sec. 4.2, with the mean predictive's logarithm in the place of the logits.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive finite number; got {temperature}.")
    return log_softmax(np.asarray(log_probabilities, dtype=np.float64) / temperature, axis=-1)


def calibrate(
    posterior: Posterior, validation: Dataset, *, num_draws: int = 16, seed: int = 0, batch_size: int = 32
) -> Posterior:
    """The same posterior, its mean predictive at the temperature τ that explains validation data best.

    τ stands in ``scaling`` of the posterior that is returned, is saved with it, and enters whatever `predict` gives.
    The posterior that was given stays as it is; one that was calibrated before is calibrated anew, not twice.

    Args:
        posterior: Any posterior over classes.
        validation: A labelled split that nothing was fitted on, and that is not reported.
        num_draws: S of the predictive whose temperature is fitted; 0 for the mean weights.
        seed: Of the draws.
        batch_size: Rows at once.

    Raises:
        ValueError: Data without labels.
    """
    calibrated = copy.copy(posterior)
    calibrated.scaling = 1.0
    prediction = calibrated.predict(validation, num_draws, seed=seed, batch_size=batch_size)
    if prediction.labels is None or bool((prediction.labels < 0).any()):
        raise ValueError("calibration needs the label of every row of its validation split; some are unknown")
    calibrated.scaling = fit_temperature(prediction.log_mean.numpy(), prediction.labels.numpy())
    return calibrated


def fit_temperature(log_probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The temperature τ that minimises the negative log-likelihood of the scaled predictive on these labels.

    argmin_τ −(1/n) Σ_n log p_τ(y_n | x_n) over log τ in [−3, 5]. In s = 1/τ a term is −s·log p̄(y) + logsumexp(s·log p̄),
    a linear function plus a convex one; log τ = −log s is monotone in s, so there is one valley and a bounded scalar
    search finds its bottom. Fit on validation data, never on the split that is reported.

    Shapes: (n, K), (n,) → scalar. If no τ is better than 1 (a uniform predictive does not react), 1 is returned; an
    optimum at a bound (every label is the top class, or the predictor is worse than uniform) is returned and a warning
    is logged.

    Raises:
        ValueError: see `check_predictive`; or a label has probability 0, which no temperature can repair.

    Source: Guo et al. 2017, sec. 4.2.
    """
    values, targets = check_predictive(log_probabilities, labels)
    rows = np.arange(len(targets))
    impossible = np.flatnonzero(np.isneginf(values[rows, targets]))
    if impossible.size:
        raise ValueError(
            f"the label of row {impossible[0]} has probability 0, so the likelihood is 0 at every temperature. "
            "Compute log probabilities from logits (log_softmax), not as the logarithm of rounded probabilities."
        )

    def objective(log_temperature: float) -> float:
        return -float(scale(values, math.exp(log_temperature))[rows, targets].mean())

    found = minimize_scalar(objective, bounds=LOG_BOUNDS, method="bounded", options={"xatol": 1e-6})
    if objective(0.0) <= float(found.fun):
        return 1.0
    optimum = float(found.x)
    if min(abs(optimum - bound) for bound in LOG_BOUNDS) < 1e-3:
        _log.warning(
            "temperature scaling stopped at its bound, %.4g: these %d examples do not determine the temperature; "
            "use more validation data.",
            math.exp(optimum),
            len(targets),
        )
    return math.exp(optimum)
