"""Summaries of the weights against the draws themselves, explicit matrices and closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence

from pyrolora.diagnostics.weights import effective_rank, judge_noise, judge_prior, layer_table, prior_sizes, summarise
from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from tests.programs import tiny_program


def moved(guide: Guide, priors: dict[str, Prior] | None = None, *, by: float = 0.1) -> Posterior:
    program = tiny_program(priors)
    with isolated(0), torch.no_grad():
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return Posterior(program, guide)


def test_kl_of_each_layer_is_the_closed_form() -> None:
    """Law: KL by layer is that of the Normals, summed over the entries of that layer; heads have one layer."""
    posterior = moved(MeanField(random="*"))
    weights = summarise(posterior, 2)
    guide = posterior.guide
    for name, scale in {"lora.query.B": 0.1, "head.classifier.weight": 1.0}.items():
        k = name.replace(".", "/")
        loc, sd = guide.loc[k], guide.log_scale[k].exp()  # type: ignore[index,union-attr]
        expected = kl_divergence(TorchNormal(loc, sd), TorchNormal(torch.zeros(()), torch.tensor(scale)))
        assert np.allclose(weights.kl[name], expected.flatten(1).sum(1).detach(), rtol=1e-4)
    table = layer_table(posterior, weights).set_index(["kind", "layer"])
    both = weights.kl["lora.query.A"][1] + weights.kl["lora.query.B"][1]
    assert table.loc[("query", 1), "kl"] == pytest.approx(both)
    assert table.loc[("query", 1), "random"] == 2 * 2 * 16
    assert table.loc[("query", 1), "kl_per_number"] == pytest.approx(both / 64)
    assert table["kl"].sum() == pytest.approx(sum(v.sum() for v in weights.kl.values()))


def test_densities_add_up_by_site() -> None:
    """Law: log p and log q of each site include its hyper-parameters, and add up to those of the ArviZ tree."""
    priors: dict[str, Prior] = {"*.A": Hierarchical(0.1), "*.B": Flat(), "head.*": Normal(1.0)}
    posterior = moved(MeanField(), priors)
    weights, stats = summarise(posterior, 4, seed=1), posterior.to_datatree(num_draws=4, seed=1)["sample_stats"]
    assert set(weights.log_prior) == set(posterior.program.sites)
    ratio = stats["log_prior"].values[0] - stats["log_guide"].values[0]
    assert weights.log_ratio() == pytest.approx(ratio, rel=1e-4)
    assert (weights.log_guide["lora.query.B"] == 0).all() and weights.log_guide["lora.query.A"].std() > 0
    assert weights.random == {"lora.query.A": 64 + 2, "lora.value.A": 64 + 2}


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"structure": "product"}, 2 * 4),
        ({"size": 3}, 2 * 2 * 3),
        ({"size": 3, "conditional": "learned"}, 2 * (2 * 3 + 2 * 16)),
        ({"structure": "product", "posterior": "ensemble"}, 0),
    ],
    ids=["product", "factors", "learned", "ensemble"],
)
def test_random_numbers_of_inducing_guides(options: dict[str, Any], numbers: int) -> None:
    """Law: V counts, W where its noise is not the prior's; the KL of V is in its site's; point masses are named."""
    posterior = moved(Inducing(**options))
    weights = summarise(posterior, 30)
    assert weights.random == {"lora.query.A": numbers, "lora.value.A": numbers}
    assert (weights.atoms is None) == (numbers > 0)
    if numbers:
        row = posterior.guide.describe()["lora.query.A"]
        expected = row["kl_V"] + row.get("kl_conditional", 0.0)
        assert weights.kl["lora.query.A"].sum() == pytest.approx(expected, rel=1e-3)


def test_updates_noise_and_size() -> None:
    """Law: ‖ΔW‖, its noise-to-mean ratio and the size of each rank are those of explicit matrices of the draws."""
    posterior = moved(MeanField(random="lora.*"))
    weights, draws, mean = summarise(posterior, 5), posterior.draw(5), posterior.mean()
    update = 2.0 * draws["lora.value.B"] @ draws["lora.value.A"]
    centre = 2.0 * mean["lora.value.B"] @ mean["lora.value.A"]
    assert np.allclose(weights.update["lora.value"], update.square().sum((2, 3)).sqrt(), rtol=1e-4)
    away = (update - centre).square().sum((2, 3)).mean(0) / centre.square().sum((1, 2))
    assert np.allclose(weights.noise["lora.value"], away.sqrt(), rtol=1e-3)
    assert weights.overall == pytest.approx({k: v["noise_to_mean"] for k, v in posterior.describe(5).items()}, rel=1e-4)
    assert np.allclose(weights.size["lora.value.A"], draws["lora.value.A"].square().mean(-1).sqrt(), rtol=1e-4)
    assert np.allclose(weights.size["lora.value.B"], draws["lora.value.B"].square().mean(-2).sqrt(), rtol=1e-4)


def test_effective_rank() -> None:
    """Law: the exponential of the entropy of the normalised singular values of B A; r for equal ones, 0 for zero."""
    posterior = moved(MeanField(random="lora.*"))
    mean = {name: value.clone() for name, value in posterior.mean().items()}
    mean["lora.query.A"][0], mean["lora.query.B"][0] = torch.eye(2, 16), torch.eye(16, 2)
    mean["lora.query.B"][1] = 0
    ranks = effective_rank(posterior.program.sites, mean)
    assert np.allclose(ranks["lora.query"], [2.0, 0.0])
    values = torch.linalg.svdvals((mean["lora.value.B"] @ mean["lora.value.A"]).double())
    share = values / values.sum(-1, keepdim=True)
    assert np.allclose(ranks["lora.value"], torch.special.entr(share).sum(-1).exp(), rtol=1e-4)


def test_prior_sizes() -> None:
    """Law: sizes under the prior are those of its draws; N(0, τ²) has mean square τ²; flat sites have none."""
    program = tiny_program({"*.A": Normal(0.3), "*.B": Flat(), "head.*": Normal(1.0)})
    sizes = prior_sizes(program, ["lora.query.A", "lora.query.B"], 200)
    assert set(sizes) == {"lora.query.A"} and sizes["lora.query.A"].shape == (200, 2, 2)
    assert (sizes["lora.query.A"] ** 2).mean() == pytest.approx(0.09, rel=0.05)


def set_scale(posterior: Posterior, log_scale: float, loc: float | None = None) -> Posterior:
    with torch.no_grad():
        for k in posterior.guide.log_scale:  # type: ignore[union-attr]
            posterior.guide.log_scale[k].fill_(log_scale)  # type: ignore[index,union-attr]
            if loc is not None:
                posterior.guide.loc[k].fill_(loc)  # type: ignore[index,union-attr]
    return posterior


def test_collapsed_noise_is_said() -> None:
    """Law: noise far below the mean is bad and says what to do; noise of the mean's size is fine."""
    posterior = set_scale(moved(MeanField(random="lora.*")), math.log(1e-5))
    found = judge_noise(posterior, summarise(posterior, 4))
    assert found.level == "bad" and "indistinguishable" in found.words and "Start wider" in found.advice
    fine = moved(MeanField(random="lora.*"))
    assert judge_noise(fine, summarise(fine, 4)).level == "fine"


def test_noise_elsewhere_than_in_the_adapters() -> None:
    """Law: where the head alone is random its noise is not that of ΔW; kinds that have noise are judged alone."""
    head = moved(MeanField(random="head.*"))
    found = judge_noise(head, summarise(head, 4))
    assert found.level == "none" and "point estimates" in found.words
    one = moved(MeanField(random="lora.query.A"))
    assert set(judge_noise(one, summarise(one, 4)).numbers) == {"noise_to_mean lora.query"}


def test_a_posterior_equal_to_the_prior_is_said() -> None:
    """Law: q = p has KL 0 and is bad; a posterior that the data moved is fine; both say how many nats."""
    priors: dict[str, Prior] = {"*": Normal(0.3)}
    same = set_scale(moved(MeanField(random="*"), priors), math.log(0.3), loc=0.0)
    found = judge_prior(same, summarise(same, 2))
    assert found.level == "bad" and "equals the prior" in found.words
    assert found.numbers["kl"] == pytest.approx(0, abs=1e-3)
    fine = moved(MeanField(random="*"), priors)
    assert judge_prior(fine, summarise(fine, 2)).level == "fine"


def test_what_cannot_be_said() -> None:
    """Law: Laplace is told apart, with its effective parameters; point masses have no KL, point estimates no noise."""
    laplace = moved(Laplace(), by=0.0)
    laplace.guide.post_fit(laplace.program, laplace.program.task.train)  # type: ignore[union-attr]
    weights = summarise(laplace, 2)
    assert weights.natural and judge_noise(laplace, weights).level == "none"
    assert judge_prior(laplace, weights).numbers["effective"] > 0
    assert layer_table(laplace, weights)["kl"].isna().all()
    for structure in ("factors", "product"):
        ensemble = moved(Inducing(structure=structure, posterior="ensemble"))  # type: ignore[arg-type]
        assert judge_prior(ensemble, summarise(ensemble, 30)).level == "none"
    point = moved(MAP())
    table = layer_table(point, summarise(point, 2))
    assert table["noise_to_mean"].isna().all() and table["effective_rank"].iloc[0] > 0
