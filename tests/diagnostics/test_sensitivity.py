"""Power scaling against conjugate posteriors whose power-scaled forms are known exactly."""

from __future__ import annotations

import arviz_stats
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from pyrolora.diagnostics.sensitivity import judge_sensitivity, power_scaling, sensitivity_tree

DRAWS = 3000


class Conjugate:
    """``θ_d ~ N(0, τ²)``, n observations of each with unit noise and mean ȳ, likelihood to the power 1/β."""

    def __init__(self, prior_sd: float, mean: float, *, count: int = 10, beta: float = 1.0, dims: int = 1):
        self.prior, self.data, self.centre, self.beta, self.dims = prior_sd**-2, count / beta, mean, beta, dims

    def posterior(self, prior_power: float = 1.0, likelihood_power: float = 1.0) -> tuple[float, float]:
        prior, data = prior_power * self.prior, likelihood_power * self.data
        return data * self.centre / (prior + data), (prior + data) ** -0.5

    def table(self, size: int = DRAWS) -> pd.DataFrame:
        mean, sd = self.posterior()
        generator, quantiles = np.random.default_rng(0), norm.ppf((np.arange(size) + 0.5) / size)
        theta = mean + sd * np.stack([generator.permutation(quantiles) for _ in range(self.dims)], 1)
        prior = (-0.5 * self.prior * theta**2).sum(1)
        likelihood = (-0.5 * self.data * (theta - self.centre) ** 2).sum(1)  # with its 1/β
        return power_scaling({"theta": theta[:, 0]}, log_prior=prior, log_likelihood=likelihood)


def distance(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Cumulative Jensen–Shannon distance of two Normals on a common grid, the larger of x and −x."""
    x = np.linspace(first[0] - 3.6 * first[1], first[0] + 3.6 * first[1], 20_001)
    step = x[1] - x[0]
    found = []
    for sign in (1, -1):
        p, q = (norm.cdf(sign * x, sign * m, s) for m, s in (first, second))
        middle = (p + q) / 2
        divergence = (p * np.log2(p / middle) + q * np.log2(q / middle)).sum() * step
        found.append(np.sqrt(divergence / ((p + q).sum() * step)))
    return max(found)


@pytest.mark.parametrize("beta", [1.0, 0.2])
@pytest.mark.parametrize("prior_sd", [0.3, 2.0])
def test_sensitivities_are_those_of_the_exact_power_scaled_posterior(prior_sd: float, beta: float) -> None:
    """Law: distance between the posteriors at powers 1 and 1 ± 0.01 for each doubling, by exact Normals, at any β."""
    exact = Conjugate(prior_sd, 2.0, beta=beta)
    row = exact.table().loc["theta"]
    for part, power in (("prior", lambda a: (a, 1.0)), ("likelihood", lambda a: (1.0, a))):
        away = [distance(exact.posterior(), exact.posterior(*power(a))) / abs(np.log2(a)) for a in (0.99, 1.01)]
        assert row[part] == pytest.approx(np.mean(away), rel=0.04, abs=0.002)


def test_direction() -> None:
    """Law: a prior in conflict with the data is sensitive with the likelihood, a wide one is not; each is said."""
    conflict = judge_sensitivity(Conjugate(0.5, 2.0).table(), DRAWS)
    assert conflict.level == "look" and "Prior–data conflict" in conflict.advice and "theta" in conflict.words
    assert judge_sensitivity(Conjugate(10.0, 2.0).table(), DRAWS).level == "fine"
    strong = judge_sensitivity(Conjugate(0.5, 0.3, count=1).table(), DRAWS)
    assert strong.level == "look"


def test_noise_of_many_dimensions_is_not_a_finding() -> None:
    """Law: a number that nothing moves is undecided beside a thousand that are moved, and not sensitive; how many draws
    would decide follows from noise ∝ 1/√S."""
    alone = Conjugate(1.0, 0.0)
    generator = np.random.default_rng(0)
    squares, unmoved = (generator.normal(size=(400, 1000)) ** 2).sum(1), generator.normal(size=400)
    table = power_scaling({"unmoved": unmoved}, log_prior=-0.5 * squares, log_likelihood=-5 * squares)
    found = judge_sensitivity(table, 400)
    assert found.level == "none" and "undecided" in found.words
    noise = table[["prior_noise", "likelihood_noise"]].to_numpy().max()
    assert noise > 0.05
    assert f"{int(np.ceil(400 * (noise / 0.05) ** 2)):,} draws" in found.advice
    assert alone.table(4000).loc["theta", "prior_noise"] < alone.table(400).loc["theta", "prior_noise"]


def test_the_tree_is_arvizs() -> None:
    """Law: ArviZ's own summary of the tree has the same sensitivities."""
    generator = np.random.default_rng(0)
    theta = generator.normal(size=500)
    parts = {"log_prior": -(theta**2), "log_likelihood": -((theta - 1) ** 2)}
    summary = arviz_stats.psense_summary(sensitivity_tree({"theta": theta}, *parts.values()), round_to=12)
    table = power_scaling({"theta": theta}, **parts)
    for part in ("prior", "likelihood"):
        assert float(summary.loc["theta", part]) == pytest.approx(table.loc["theta", part], rel=1e-6)
