"""Paired traces: the same values, all sites, densities that are those of guide and rewritten prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyrolora.guides.inducing import Inducing
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.density import paired_traces, statements, values_of
from pyrolora.inference.posterior import Posterior
from tests.programs import tiny_program

GUIDES: dict[str, dict[str, Any]] = {"product": {"structure": "product"}, "factors": {"size": 2}}


@pytest.mark.parametrize("options", GUIDES.values(), ids=GUIDES)
def test_both_traces_have_the_same_sites_and_values(options: dict[str, Any]) -> None:
    """Law: prior and guide are evaluated at the same values of the same sites, auxiliary ones included."""
    program, guide = tiny_program(), Inducing(**options)
    guide.bind(program)
    for q, p in paired_traces(program, guide, 2, seed=3):
        assert set(values_of(q)) == set(values_of(p)) > {"lora.query.A.V", "lora.query.A"}
        for name, value in values_of(q).items():
            assert torch.equal(value, values_of(p)[name])
            assert statements(q)[name]["log_prob"].shape == statements(p)[name]["log_prob"].shape


def test_draws_are_those_of_the_posterior() -> None:
    """Law: draw s of the traces is draw s of Posterior.draw for the same seed."""
    program, guide = tiny_program(), MeanField()
    guide.bind(program)
    draws = Posterior(program, guide).draw(3, seed=5)
    for s, (q, _) in enumerate(paired_traces(program, guide, 3, seed=5)):
        for name, value in values_of(q).items():
            assert torch.equal(value, draws[name][s])


def test_an_auxiliary_site_counts_in_both_densities() -> None:
    """Law: log p(V) is that of N(0, 1), log q(V) that of the guide's Normal, and W given V cancels at λ = 1."""
    program, guide = tiny_program(), Inducing(size=2)
    guide.bind(program)
    (q, p) = next(iter(paired_traces(program, guide, 1)))
    v = values_of(q)["lora.query.A.V"]
    family = guide.families["lora/query/A"]
    by_hand = torch.distributions.Normal(family.loc, family.log_scale.exp()).log_prob(v).sum((1, 2))
    assert torch.allclose(statements(q)["lora.query.A.V"]["log_prob"], by_hand, atol=1e-4)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(v).sum((1, 2))
    assert torch.allclose(statements(p)["lora.query.A.V"]["log_prob"], prior, atol=1e-4)
    w = "lora.query.A"
    assert torch.allclose(statements(q)[w]["log_prob"], statements(p)[w]["log_prob"], atol=1e-3)
