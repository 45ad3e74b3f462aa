"""Power scaling: how much the posterior would change if the prior, or the likelihood, counted a little more or less."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import arviz_stats
import numpy as np
import pandas as pd
from arviz_base import from_dict
from xarray import DataTree

from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.verdict import Finding

# Where Kallioinen et al. call a quantity sensitive: a change of 0.05 for each doubling of the component.
SENSITIVE = 0.05
_SHUFFLES = 10
_PARTS = ("prior", "likelihood")


def power_scaling(
    quantities: Mapping[str, FloatArray], *, log_prior: FloatArray, log_likelihood: FloatArray, seed: int = 0
) -> pd.DataFrame:
    """Sensitivity of quantities of the posterior to prior and likelihood, by ArviZ's `psense`.

    The prior is taken to the power α, 1 ± 0.01, and draws are reweighted by ``p(θ_s)^{α−1}``; the sensitivity is the
    cumulative Jensen–Shannon distance between a quantity's distributions for each doubling of α. Draws have to be those
    of the posterior: a guide is taken at its word.

    In D dimensions ``log p(θ)`` varies by about ``√(D/2)``, and so do the weights whatever the quantity. What that
    noise alone gives is measured by shuffling the draws of the quantity: a sensitivity below it is no finding.

    Args:
        quantities: Name to an identifiable scalar of each draw, ``(S,)``.
        log_prior: ``log p(θ_s)`` in nats, ``(S,)``.
        log_likelihood: ``Σ_n log p(y_n | θ_s)/β``, the likelihood as it counted in the fit, ``(S,)``.
        seed: Of the shuffles.

    Returns:
        One row for each quantity: ``prior``, ``likelihood``, and what ten shuffles give of each (mean plus three
        standard deviations), ``prior_noise`` and ``likelihood_noise``.

    Source: Kallioinen et al. 2024, section 3.
    """
    generator = np.random.default_rng(seed)
    shuffled = {
        f"{name}#{i}": generator.permutation(value) for name, value in quantities.items() for i in range(_SHUFFLES)
    }
    found = _sensitivities(sensitivity_tree({**quantities, **shuffled}, log_prior, log_likelihood))
    rows = {}
    for name in quantities:
        alone = found.loc[[f"{name}#{i}" for i in range(_SHUFFLES)]]
        noise = alone.mean() + 3 * alone.std()
        rows[name] = {
            "prior": found.loc[name, "prior"],
            "likelihood": found.loc[name, "likelihood"],
            "prior_noise": noise["prior"],
            "likelihood_noise": noise["likelihood"],
        }
    return pd.DataFrame.from_dict(rows, orient="index").astype(float)


def sensitivity_tree(
    quantities: Mapping[str, FloatArray], log_prior: FloatArray, log_likelihood: FloatArray
) -> DataTree:
    """The tree that `arviz_stats.psense` and `arviz_plots.plot_psense_dist` take."""
    groups = {
        "posterior": {name: np.asarray(value)[None] for name, value in quantities.items()},
        "log_prior": {"all": np.asarray(log_prior)[None]},
        "log_likelihood": {"all": np.asarray(log_likelihood)[None, :, None]},
    }
    return from_dict(groups)


def judge_sensitivity(table: pd.DataFrame, num_draws: int) -> Finding:
    """Prior–data conflict, a strong prior, or nothing to say; undecided where the noise is above the threshold."""
    numbers = {f"{column} {name}": float(table.loc[name, column]) for name in table.index for column in table}
    moved = {part: table.index[table[part] > np.maximum(SENSITIVE, table[f"{part}_noise"])] for part in _PARTS}
    both = [name for name in moved["prior"] if name in moved["likelihood"]]
    noise = float(table[[f"{part}_noise" for part in _PARTS]].to_numpy().max())
    if both:
        words = f"{', '.join(both)}: sensitive to the prior and to the likelihood, which pull apart."
        advice = (
            "Prior–data conflict: look at the prior predictive, and widen or move the prior. Or the guide is not yet "
            "the posterior, see its k̂: train longer."
        )
        return Finding("sensitivity", "look", words, advice, numbers)
    if len(moved["prior"]):
        words = f"{', '.join(moved['prior'])}: sensitive to the prior, hardly to the likelihood."
        advice = "The prior decides there: make sure that it is what you believe, or use more data."
        return Finding("sensitivity", "look", words, advice, numbers)
    if noise > SENSITIVE:
        needed = math.ceil(num_draws * (noise / SENSITIVE) ** 2)
        words = (
            f"undecided: with {num_draws} draws the noise of power scaling alone is {noise:.2g}, above the threshold "
            f"of {SENSITIVE}, because log p varies with the number of random weights."
        )
        advice = f"{needed:,} draws would decide it; cheaper is to refit with half and twice the prior's scale."
        return Finding("sensitivity", "none", words, advice, numbers)
    largest = float(table["prior"].max())
    return Finding(
        "sensitivity", "fine", f"the prior's power changes nothing by more than {largest:.2g} (0.05).", "", numbers
    )


def _sensitivities(tree: DataTree) -> pd.DataFrame:
    columns = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of tail draws")
        for part in _PARTS:
            found = arviz_stats.psense(tree, group=part)
            columns[part] = {name: float(value) for name, value in found.data_vars.items()}
    return pd.DataFrame(columns)
