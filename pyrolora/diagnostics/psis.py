"""Pareto-smoothed importance sampling: the guide against the model, and leave-one-out for approximate posteriors.

What a fit at temperature β approximates is ``π(θ) ∝ p(y | θ)^{1/β} p(θ)``, where ``E_q[log p(y|θ)] − β KL(q‖p)`` is
largest over all q. Draws of the guide become draws of π by the weights ``π(θ_s)/q(θ_s)``, and of π without row n by
``π(θ_s) / (q(θ_s) p(y_n | θ_s)^{1/β})``. Sites with a point estimate stand where they are: π is that of the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import arviz_stats
import numpy as np
import pandas as pd
import xarray as xr
from arviz_base import from_dict
from arviz_stats import ELPDData
from arviz_stats.base import array_stats

from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.verdict import Finding

# A generalised Pareto distribution is fitted to the largest fifth of the weights, at least five of them.
MIN_DRAWS = 25
_STEADY = 100
# Up to this k̂ weights have a finite variance, and correct leave-one-out for the guide. Above it they did not help: on a
# linear-Gaussian model with k̂ = 0.57 the corrected elpd was further from exact refits than the uncorrected one.
CORRECTABLE = 0.5
_SITE = "labels"


def good_k(num_draws: int) -> float:
    """Up to which k̂ an importance sampling estimate from S draws can be trusted: ``min(1 − 1/log₁₀ S, 0.7)``.

    Source: Vehtari et al. 2024, section 3.2.4.
    """
    return min(1 - 1 / math.log10(num_draws), 0.7)


def guide_khat(log_weights: FloatArray) -> float:
    """Pareto k̂ of ``log π(θ_s) − log q(θ_s)``, ``(S,)``: how far the guide is from what it approximates.

    Below 0.5 very close, up to `good_k` close enough to correct by weights, above 0.7 too far; −∞ where all weights
    are equal, which is the posterior itself.

    Source: Yao et al. 2018 ("Yes, but did it work?").
    """
    _check(log_weights)
    if np.ptp(log_weights) < 1e-6:
        return -math.inf
    return float(_smoothed(log_weights)[1])


def loo(log_likelihood: FloatArray, *, temperature: float = 1.0, log_weights: FloatArray | None = None) -> ELPDData:
    """PSIS-LOO: ``elpd = Σ_n log p(y_n | y_{−n})``, the predictive density of each row under the fit without it.

    ``p(y_n | y_{−n}) = Σ_s w_sn p(y_n|θ_s) / Σ_s w_sn`` with Pareto-smoothed ``w_sn = w_s p(y_n | θ_s)^{−1/β}``.

    Args:
        log_likelihood: ``log p(y_n | θ_s)`` of training rows, ``(S, n)``.
        temperature: β of the fit.
        log_weights: ``log π(θ_s) − log q(θ_s)``, ``(S,)``: corrects for the guide, needs all training rows. None takes
            the guide for the posterior.

    Returns:
        ArviZ's ``ELPDData`` with pointwise values, for `arviz_stats.compare` and `arviz_plots.plot_khat`.

    Source: Vehtari et al. 2017; with the guide's weights Magnusson et al. 2019, eq. 6.
    """
    values = np.asarray(log_likelihood, dtype=np.float64)
    _check(values)
    base = np.zeros(len(values)) if log_weights is None else np.asarray(log_weights, dtype=np.float64)
    ratios = base[:, None] - values / temperature
    weights, khat = np.empty_like(values), np.empty(values.shape[1])
    for n, column in enumerate(ratios.T):
        weights[:, n], khat[n] = _smoothed(column)
    tree = from_dict({"log_likelihood": {_SITE: values[None]}}, dims={_SITE: ["example"]})
    like: xr.DataArray = tree["log_likelihood"].to_dataset()[_SITE]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter|The point-wise LOO")
        return arviz_stats.loo(
            tree,
            pointwise=True,
            reff=1.0,
            log_weights=like.copy(data=weights[None]),
            pareto_k=xr.DataArray(khat, dims=["example"], coords={"example": like["example"]}),
        )


def compare_loo(results: Mapping[str, ELPDData]) -> pd.DataFrame:
    """ArviZ's comparison: rank, elpd, difference from the best and its standard error, stacking weight.

    Raises:
        ValueError: Fewer than two results, or results over different rows.
    """
    if len(results) < 2:
        raise ValueError("there is nothing to compare: give at least two LOO results by name")
    sizes = {name: result.n_data_points for name, result in results.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"LOO results over different rows cannot be compared: {sizes}")
    return arviz_stats.compare(dict(results))


def judge_khat(
    khat: float, num_draws: int, size: int, *, temperature: float = 1.0, sites: Sequence[str] | None = None
) -> Finding:
    """What k̂ of guide against model means here; in thousands of dimensions a large one is the rule.

    Args:
        khat: Of `guide_khat`.
        num_draws: S.
        size: How many numbers were drawn.
        temperature: β of the fit.
        sites: The random sites that were drawn, where the others stood at their means.
    """
    restricted = "" if sites is None else f"; {', '.join(sites)} alone, the other sites at their means"
    target = "the posterior" if temperature == 1 else f"the tempered posterior p(y|θ)^(1/{temperature:g}) p(θ)"
    words = f"Pareto k̂ of the guide against {target} is {khat:.2f} ({num_draws} draws{restricted})"
    numbers = {"khat": khat, "good_k": good_k(num_draws), "num_draws": num_draws, "random_numbers": size}
    if khat <= good_k(num_draws):
        words += f", at most {good_k(num_draws):.2f}: close enough for draws to be corrected by weights."
        return Finding("guide", "fine", words, "", numbers)
    words += f", above {good_k(num_draws):.2f}: reweighted draws of the guide are not draws of it."
    if size > 1000:
        words += (
            f" Over {size:,} random numbers that is what to expect of any guide, since small errors of each multiply; "
            "it does not say that predictions are bad."
        )
    advice = "Judge it by held-out rows. For a smaller k̂: fewer random numbers, a richer family, longer training."
    return Finding("guide", "look", words, f"{advice}{_unsteady(num_draws)}", numbers)


def judge_loo(
    result: ELPDData, *, temperature: float = 1.0, corrected: bool = False, held_out: FloatArray | None = None
) -> Finding:
    """Whether LOO can be trusted, and whether it agrees with rows that were held out.

    Args:
        result: Of `loo`.
        temperature: β of the fit.
        corrected: Whether the guide was corrected for by weights.
        held_out: ``log p(y_n | x_n)`` of held-out rows under the mean predictive, ``(n,)``, or None.
    """
    rows = int(result.n_data_points)
    elpd, error = result.elpd / rows, result.se / rows
    over = int((result.pareto_k.values > result.good_k).sum())
    numbers = {"elpd": float(elpd), "se": float(error), "rows": rows, "p_loo": float(result.p), "khat_over": over}
    how = "corrected for the guide" if corrected else "the guide taken for the posterior"
    words = f"leave-one-out elpd {elpd:.3f} ± {error:.3f} nats a row over {rows} training rows ({how})"
    words += f"; k̂ is above {result.good_k:.2f} at {over} of them."
    level, advice = ("fine", "") if over == 0 else ("look", "") if over <= 0.05 * rows else ("bad", "")
    if over:
        advice = "Where k̂ is large the row decides too much for weights to take it out: trust held-out rows instead."
        advice += _unsteady(result.n_samples)
        if temperature < 1:
            advice += f" At β = {temperature:g} every row counts {1 / temperature:g} times."
    if held_out is not None and len(held_out) > 1:
        mean, spread = float(held_out.mean()), float(held_out.std(ddof=1) / math.sqrt(len(held_out)))
        numbers |= {"held_out": mean, "held_out_se": spread}
        words += f" Held-out rows have {mean:.3f} ± {spread:.3f}."
        if elpd - mean > 2 * math.hypot(float(error), spread):
            level = "bad" if level == "bad" else "look"
            words += " LOO is optimistic: point estimates have seen the row that it leaves out, or the splits differ."
            advice = advice or "Compare models by held-out rows."
    return Finding("loo", level, words, advice, numbers)  # type: ignore[arg-type]


def _unsteady(num_draws: int) -> str:
    few = f" From {num_draws} draws k̂ itself is uncertain: take {_STEADY} or more."
    return few if num_draws < _STEADY else ""


def _smoothed(log_ratios: FloatArray) -> tuple[FloatArray, float]:
    """Normalised Pareto-smoothed log weights and k̂; ArviZ takes the ratios with the other sign."""
    values = np.asarray(log_ratios, dtype=np.float64)
    largest = np.sort(values)[-max(5, len(values) // 5) :]
    if np.ptp(largest) < 1e-12:  # the largest are all the same (rows that are certain): no tail, nothing to smooth
        return values - np.logaddexp.reduce(values), -math.inf
    weights, khat = array_stats.psislw(-values)
    return weights, float(khat)


def _check(values: FloatArray) -> None:
    if len(values) < MIN_DRAWS:
        raise ValueError(f"{len(values)} draws are too few for a tail: Pareto k̂ needs at least {MIN_DRAWS}")
    if not np.isfinite(values).all():
        raise ValueError("densities are not finite: are all labels known?")
