"""R-hat across runs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from pyrolora.diagnostics.convergence import judge_runs, rhat


def chains(shift: float, size: int = 4000, runs: int = 2, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(shift * i, 1.0, size) for i in range(runs)]


def test_equal_runs_are_one() -> None:
    """Law: R-hat of runs with the same law is 1 + O(1/S), for each element of what is compared."""
    runs = [np.stack([run, run**3], 1) for run in chains(0.0)]
    found = rhat(runs)
    assert found.shape == (2,)
    assert np.abs(found - 1).max() < 4 / 4000


def test_shifted_runs() -> None:
    """Law: R-hat is √(((S−1)W/S + B/S)/W) of the normal scores of ranks, which grows with the runs' distance."""
    delta = 1.0
    runs = np.stack(chains(delta))
    # The definition: normal scores of the ranks, halves as chains, W and B.
    scores = norm.ppf((rankdata(runs).reshape(runs.shape) - 3 / 8) / (runs.size + 1 / 4))
    halves = scores.reshape(4, -1)
    size = halves.shape[1]
    within, between = halves.var(1, ddof=1).mean(), size * halves.mean(1).var(ddof=1)
    exact = np.sqrt(((size - 1) / size * within + between / size) / within)
    assert float(rhat(list(runs))) == pytest.approx(exact, rel=1e-6)
    assert exact > 1.1


def test_the_shorter_run_decides() -> None:
    """Law: runs of unequal length are compared over the shorter's draws; one run has no R-hat, and is told why."""
    first, second = chains(0.0)
    assert float(rhat([first, second[:1000]])) == float(rhat([first[:1000], second[:1000]]))
    with pytest.raises(ValueError, match="Draws of a guide are independent"):
        rhat([first])


@pytest.mark.parametrize("size", [40, 400])
def test_few_draws_are_no_disagreement(size: int) -> None:
    """Law: over 200 rows of runs with the same law one in twenty is apart, however few the draws."""
    generator = np.random.default_rng(2)
    rows = [generator.normal(size=(size, 200)) for _ in range(2)]
    found = judge_runs([{"log score": run.mean(1)} for run in rows], rows)
    assert found.level == "fine" and abs(found.numbers["rows_apart"] - 0.05) < 0.06
    assert found.numbers["by_chance"] - 1 < 5 / size


def test_verdicts() -> None:
    """Law: one run is no evidence and says so; runs alike are fine; runs in modes of their own are bad."""
    generator = np.random.default_rng(1)

    def run(shift: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
        rows = generator.normal(-0.5, 0.1, (400, 20)) + shift * np.linspace(-1, 1, 20)
        return {"log score": rows.mean(1) + generator.normal(0, 0.01, 400)}, rows

    alike, apart = [run(0.0) for _ in range(3)], [run(s) for s in (0.0, 1.0, 2.0)]
    assert judge_runs(*zip(*alike[:1], strict=True)).level == "none"
    assert "independent" in judge_runs(*zip(*alike[:1], strict=True)).words
    fine, bad = judge_runs(*zip(*alike, strict=True)), judge_runs(*zip(*apart, strict=True))
    assert fine.level == "fine" and fine.numbers["rows_apart"] <= 0.15
    assert bad.level == "bad" and "average the predictions" in bad.advice and bad.numbers["rows_apart"] > 0.5
