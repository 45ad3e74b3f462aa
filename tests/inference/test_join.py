"""Posteriors that were fitted apart, put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.join import join
from pyrolora.inference.posterior import Posterior
from tests.programs import PRIORS, sentence_task, tiny_bert, tiny_program, untrained


def test_joining_is_the_ensemble_of_the_same_members(tmp_path: Path) -> None:
    """Law: the joined predictive is the mean of the members', also when saved and loaded; they stay as they were."""
    members = [untrained(MAP()), untrained(MeanField()), untrained(Ensemble(Inducing(), 2))]
    test = sentence_task().test
    before = [member.predict(test, 4).mean for member in members]
    joined = join(members)
    joined.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    assert [type(part).__name__ for part in loaded.guide.parts()] == ["MAP", "MeanField", "Ensemble"]
    draws = loaded.predict(test, 12).draws.exp()
    assert torch.allclose(draws[0::3].mean(0), before[0], atol=1e-6)
    assert torch.equal(loaded.predict(test, 12).log_mean, joined.predict(test, 12).log_mean)
    assert all(torch.equal(m.predict(test, 4).mean, old) for m, old in zip(members, before, strict=True))


def test_the_log_says_whose_row_it_is() -> None:
    """Law: the history is that of all members."""
    one, two = untrained(MAP()), untrained(MAP())
    one.history, two.history = [{"loss": 1.0}], [{"loss": 2.0}]
    assert join([one, two]).history == [{"member": 0, "loss": 1.0}, {"member": 1, "loss": 2.0}]


def test_refuses_posteriors_of_different_models() -> None:
    """Law: other sites, base weights, priors or temperatures are no ensemble, and the message says which."""
    first = untrained(MAP())
    with pytest.raises(ValueError, match="nothing to join"):
        join([])
    other = untrained(MAP())
    other.temperature = 0.1
    with pytest.raises(ValueError, match="member 1 has other temperature"):
        join([first, other])
    for program, what in (
        (tiny_program(seed=1), "base weights"),
        (tiny_program({**PRIORS, "*.B": PRIORS["*.A"]}), "priors"),
    ):
        guide = MAP()
        guide.bind(program)
        with pytest.raises(ValueError, match=f"member 1 has other {what}"):
            join([first, Posterior(program, guide)])
