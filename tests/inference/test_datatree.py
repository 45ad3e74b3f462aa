"""The ArviZ tree: groups, named dimensions, sizes."""

from __future__ import annotations

from dataclasses import replace

import arviz_stats
import numpy as np
import pytest
import torch

from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference import datatree
from pyrolora.inference.posterior import Posterior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD
from pyrolora.priors.normal import Normal
from tests.programs import sentence_task, tiny_program

PRIORS = {"*.A": Flat(), "*.B": ARD(0.1), "head.*": Normal(1.0)}


def posterior(guide: MeanField | MAP | Laplace | None = None) -> Posterior:
    program = tiny_program(PRIORS)
    guide = guide or MeanField(random="*.B")
    guide.bind(program)
    return Posterior(program, guide)


def test_groups_dims_and_coordinates() -> None:
    """Law: all groups exist, with chain and draw, layer and rank, and the layers' own numbers."""
    tree = posterior().to_datatree(sentence_task().test, 4)
    names = {"posterior", "prior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data"}
    assert names <= set(tree.children)
    a = tree["posterior"]["lora.query.B"]
    assert a.dims == ("chain", "draw", "layer", "lora.query.B.out_feature", "rank")
    assert a.shape == (1, 4, 2, 16, 2)
    assert a.coords["layer"].values.tolist() == [0, 1]
    assert tree["posterior"]["lora.query.B.scale"].dims == ("chain", "draw", "layer", "rank")
    assert tree["posterior"]["head.classifier.bias"].shape == (1, 4, 1, 2)
    assert tree["log_likelihood"]["labels"].shape == (1, 4, 12)
    assert tree["observed_data"]["labels"].values.tolist() == sentence_task().test["labels"][:]
    assert "lora.query.A" not in tree["prior"]


def test_values_are_the_draws() -> None:
    """Law: the tree's draws are those of Posterior.draw for the same seed."""
    one = posterior()
    tree = one.to_datatree(num_draws=3, seed=4)
    for name, value in one.draw(3, seed=4).items():
        assert np.array_equal(tree["posterior"][name].values[0], value.numpy())


def test_densities_are_those_of_prior_and_guide() -> None:
    """Law: log_guide and log_prior are the summed densities of the draw, by hand for Normal sites."""
    program = tiny_program({"*": Normal(0.5)})
    guide = MeanField(random="*")
    guide.bind(program)
    one = Posterior(program, guide)
    tree, draws = one.to_datatree(num_draws=2), one.draw(2)
    for s in range(2):
        prior = sum(torch.distributions.Normal(0, 0.5).log_prob(v[s]).sum() for v in draws.values())
        q = sum(
            torch.distributions.Normal(guide.loc[k], guide.log_scale[k].exp())
            .log_prob(draws[k.replace("/", ".")][s])
            .sum()
            for k in guide.loc
        )
        assert tree["sample_stats"]["log_prior"].values[0, s] == pytest.approx(float(prior), rel=1e-4)
        assert tree["sample_stats"]["log_guide"].values[0, s] == pytest.approx(float(q), rel=1e-4)


def test_arviz_takes_it() -> None:
    """Law: ArviZ's own functions run on the tree: summary and LOO."""
    tree = posterior().to_datatree(sentence_task().test, 50)
    summary = arviz_stats.summary(tree, var_names=["head.classifier.bias"])
    assert len(summary) == 2
    assert np.isfinite(arviz_stats.loo(tree).elpd)


def test_point_estimates_have_a_row_for_every_draw() -> None:
    """Law: groups agree in the number of draws also where all draws are the same."""
    tree = posterior(MAP()).to_datatree(sentence_task().test, 5)
    assert tree["log_likelihood"]["labels"].shape == tree["posterior_predictive"]["labels"].shape == (1, 5, 12)


def test_linearised_predictions_have_as_many_rows_as_points() -> None:
    """Law: a guide that predicts from natural parameters chooses how many of them there are."""
    one = posterior(Laplace(num_points=32))
    one.guide.post_fit(one.program, sentence_task().train)
    tree = one.to_datatree(sentence_task().test, 5)
    assert tree["posterior"].sizes["draw"] == 5
    assert tree["log_likelihood"]["labels"].shape == tree["posterior_predictive"]["labels"].shape == (1, 32, 12)


def test_layer_numbers() -> None:
    """Law: the layers' own numbers; 0, 1, ... for heads and where the names have none that tell layers apart."""
    sites = tiny_program().sites
    assert datatree.layer_numbers(sites["lora.query.B"]) == (0, 1)
    assert datatree.layer_numbers(sites["head.classifier.weight"]) == (0,)
    named = ("bert.layer.7.query", "bert.layer.3.query")
    assert datatree.layer_numbers(replace(sites["lora.query.B"], layers=named)) == (7, 3)
    assert datatree.layer_numbers(replace(sites["lora.query.B"], layers=("a.query", "b.query"))) == (0, 1)


def test_predictive_labels_follow_the_probabilities() -> None:
    """Law: posterior predictive labels are draws from each draw's class probabilities."""
    one = posterior()
    tree = one.to_datatree(sentence_task().test, 400)
    share = tree["posterior_predictive"]["labels"].values.mean((0, 1))
    expected = one.predict(sentence_task().test, 400).mean[:, 1].numpy()
    assert np.abs(share - expected).max() < 4 * np.sqrt(0.25 / 400)


def test_sizes_are_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a tree too large is refused before any draw, naming the largest sites; var_names makes it small."""
    monkeypatch.setattr(datatree, "MAX_ELEMENTS", 1000)
    with pytest.raises(ValueError, match=r"var_names.*lora\.query\.[AB]"):
        posterior().to_datatree(num_draws=50)
    tree = posterior().to_datatree(num_draws=50, var_names="head.*.bias")
    assert list(tree["posterior"].data_vars) == ["head.classifier.bias"]
    with pytest.raises(ValueError, match=r"'lora\.key\.\*' matches no site"):
        posterior().to_datatree(var_names="lora.key.*")
