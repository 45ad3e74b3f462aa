"""Agreement of runs: R-hat with one chain for each fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import arviz_stats
import numpy as np
from arviz_base import from_dict

from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.verdict import Finding

WHY_NOT_WITHIN = (
    "R-hat compares chains. Draws of a guide are independent: within one fit they agree by construction, whatever the "
    "guide missed. What can disagree are fits with other seeds, which start elsewhere and see data in another order."
)


def rhat(values: Sequence[FloatArray]) -> FloatArray:
    """Rank-normalised split R-hat over runs, by ArviZ: about 1 where all runs have the same law.

    ``R̂ = √(((S−1)/S · W + B/S)/W)``, W the variance within and B/S that between runs, the larger of values and their
    folded ranks.

    Args:
        values: For each run S draws of the same thing, ``(S, ...)``. It must be identifiable: predictions, or norms of
            ``ΔW``; not A or B, which any rotation of the ranks changes.

    Returns:
        ``(...)``.

    Raises:
        ValueError: Fewer than two runs.

    Source: Vehtari et al. 2021.
    """
    if len(values) < 2:
        raise ValueError(f"R-hat needs at least two runs. {WHY_NOT_WITHIN}")
    shortest = min(len(run) for run in values)
    stacked = np.stack([np.asarray(run, dtype=np.float64)[:shortest] for run in values])
    tree = from_dict({"posterior": {"value": stacked}})
    return np.asarray(arviz_stats.rhat(tree)["value"])


def _by_chance(rows: Sequence[FloatArray]) -> float:
    """R-hat that one row in twenty exceeds when the draws of all runs are shuffled: few draws make it large."""
    generator = np.random.default_rng(0)
    shortest = min(len(run) for run in rows)
    pooled = generator.permutation(np.concatenate([run[:shortest] for run in rows]), axis=0)
    return float(np.nanquantile(rhat(np.split(pooled, len(rows))), 0.95))


def judge_runs(scalars: Sequence[Mapping[str, FloatArray]], rows: Sequence[FloatArray]) -> Finding:
    """Whether fits with other seeds are the same posterior, by what they predict.

    Args:
        scalars: For each run its identifiable scalars, name to ``(S,)``.
        rows: For each run ``log p(y_n | θ_s)`` of the same held-out rows, ``(S, n)``.
    """
    if len(scalars) < 2:
        advice = "Fit again with --seed 1, 2, … and give the folders: pyrolora diagnose DIR --runs DIR1 DIR2."
        return Finding("runs", "none", f"one run. {WHY_NOT_WITHIN}", advice)
    found = {name: float(rhat([run[name] for run in scalars])) for name in scalars[0]}
    by_row, chance = rhat(rows), _by_chance(rows)
    apart = float((by_row > chance).mean())
    numbers = {**{f"rhat {name}": value for name, value in found.items()}, "rows_apart": apart, "by_chance": chance}
    shown = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    words = (
        f"R-hat over {len(scalars)} runs: {shown}; of {by_row.size} held-out rows {apart:.0%} are above {chance:.2f}, "
        f"where 5% would be if all runs were one."
    )
    if apart <= 0.15:
        return Finding("runs", "fine", f"{words} The runs predict alike.", "", numbers)
    size = math.sqrt(np.var([run.mean(0) for run in rows], axis=0, ddof=1).mean())
    inside = math.sqrt(np.mean([run.var(0, ddof=1) for run in rows]))
    words += f" Between runs log p(y) of a row varies by {size:.2f} nats, within one by {inside:.2f}."
    advice = "Each run found its own mode, and none knows of the others: average the predictions of all runs."
    return Finding("runs", "look" if size < inside else "bad", words, advice, numbers)
