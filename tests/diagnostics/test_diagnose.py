"""The whole diagnosis: what is found, what is refused and why, what it costs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal as TorchNormal

from pyrolora.diagnostics import psis
from pyrolora.diagnostics.diagnose import Diagnosis, diagnose
from pyrolora.diagnostics.verdict import Finding
from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner, log_likelihood
from pyrolora.inference.randomness import isolated
from tests.programs import sentence_task, tiny_program

ALL = ["noise", "prior", "draws", "guide", "loo", "sensitivity", "prior check", "posterior check", "runs"]


def moved(guide: Guide, *, seed: int = 0, temperature: float = 1.0, by: float = 0.1) -> Posterior:
    program = tiny_program()
    with isolated(seed), torch.no_grad():
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    if isinstance(guide, Laplace):
        guide.post_fit(program, sentence_task().train)
    return Posterior(program, guide, temperature=temperature)


def named(found: Diagnosis, name: str) -> Finding:
    return next(finding for finding in found.findings if finding.name == name)


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    return moved(MeanField(), temperature=0.1, by=0.3)


@pytest.fixture(scope="module")
def whole(posterior: Posterior) -> Diagnosis:
    """A diagnosis with another run and a rival. Read only."""
    rival = moved(MeanField(random="*.B"), seed=3)
    return diagnose(posterior, runs=[moved(MeanField(), seed=1, by=0.3)], against={"rival": rival}, num_draws=30)


def test_everything_is_found(whole: Diagnosis) -> None:
    """Law: a finding for each diagnostic, words for each, advice for whatever is bad; JSON and text hold them all."""
    assert [finding.name for finding in whole.findings] == ALL
    assert all(finding.words for finding in whole.findings)
    assert all(finding.advice for finding in whole.findings if finding.level == "bad")
    plain = json.loads(json.dumps(whole.to_dict()))
    assert [row["name"] for row in plain["findings"]] == ALL and len(plain["layers"]) == 6
    text = " ".join(str(whole).split())
    assert all(" ".join(f.words.split()) in text for f in whole.findings) and "rival" in text
    assert "&quot;" not in whole._repr_html_() and whole._repr_html_().startswith("<pre>Posterior(MeanField")


def test_numbers_are_those_of_the_parts(whole: Diagnosis, posterior: Posterior) -> None:
    """Law: k̂ is that of Σ log p/β + log p − log q over the very draws, LOO that of the same rows at the fit's β."""
    task = sentence_task()
    rows = posterior.log_likelihood(task.train, 30).double().numpy()
    stats = posterior.to_datatree(num_draws=30)["sample_stats"]
    weights = rows.sum(1) / 0.1 + stats["log_prior"].values[0] - stats["log_guide"].values[0]
    assert named(whole, "guide").numbers["khat"] == pytest.approx(psis.guide_khat(weights), abs=5e-3)
    assert whole.loo is not None
    assert whole.loo.elpd == pytest.approx(psis.loo(rows, temperature=0.1).elpd, rel=1e-6)
    assert named(whole, "loo").numbers["elpd"] == pytest.approx(whole.loo.elpd / 24)
    assert task.validation is not None
    prediction = posterior.predict(task.validation, 30)
    expected = prediction.log_mean[range(16), torch.tensor(task.validation["labels"])].mean()
    assert named(whole, "loo").numbers["held_out"] == pytest.approx(float(expected), abs=1e-5)
    p = prediction.draws[:, range(16), task.validation["labels"]].exp()  # type: ignore[index]
    error = (p.std(0) / math.sqrt(30) / p.mean(0)).mean()
    assert named(whole, "draws").numbers["error"] == pytest.approx(float(error), rel=1e-4)
    assert whole.comparison is not None and set(whole.comparison.index) == {"this", "rival"}
    assert whole.tree["posterior"].sizes["chain"] == 2


def test_sites_restrict_the_guides_khat(posterior: Posterior) -> None:
    """Law: with sites= the others stand at their mean: k̂ is that of log p(y|θ_J, μ)/β + log p(θ_J) − log q(θ_J)."""
    found = named(diagnose(posterior, num_draws=30, sites="lora.query.*"), "guide")
    program, draws, guide = posterior.program, posterior.draw(30), posterior.guide
    fixed = {name: value for name, value in posterior.mean().items() if name != "lora.query.A"}
    runner = Runner(program, {"lora.query.A": draws["lora.query.A"]}, fixed)
    parts = [values for _, values in runner.run(log_likelihood(program), sentence_task().train)]
    loc, sd = guide.loc["lora/query/A"], guide.log_scale["lora/query/A"].exp()  # type: ignore[index,union-attr]
    a = draws["lora.query.A"]
    scale = program.latents["lora.query.A"].prior_scale
    ratio = (TorchNormal(0.0, scale).log_prob(a) - TorchNormal(loc, sd).log_prob(a)).double().sum((1, 2, 3))
    weights = torch.cat(parts, 1).double().sum(1) / 0.1 + ratio.detach()
    assert found.numbers["khat"] == pytest.approx(psis.guide_khat(weights.numpy()), abs=5e-3)
    assert found.numbers["random_numbers"] == 64 and "lora.query.A alone" in found.words
    with pytest.raises(ValueError, match="match no random site"):
        diagnose(posterior, num_draws=30, sites="lora.key.*")


def test_the_budget_is_kept(posterior: Posterior) -> None:
    """Law: beyond the budget LOO is over a part of the rows, and the guide's k̂ is refused, with the way out."""
    found = diagnose(posterior, num_draws=25, budget=25 * 12)
    assert found.settings["train_rows"] == 12 and found.settings["held_out_rows"] == 10
    guide = named(found, "guide")
    assert guide.level == "none" and "all 24 training rows" in guide.words and f"--budget {25 * 24}" in guide.advice
    assert found.loo is not None and found.loo.n_data_points == 12
    again = diagnose(posterior, num_draws=25, budget=25 * 12)
    assert json.dumps(again.to_dict()) == json.dumps(found.to_dict())


def test_too_few_draws() -> None:
    """Law: draws that disagree are too few, and how many are needed follows from 1/√S; agreeing ones are enough."""
    loud = moved(MeanField(random="*", init_scale=30.0), by=0.0)
    found = named(diagnose(loud, num_draws=25), "draws")
    assert found.level == "look" and "too few draws" in found.words
    assert f"Take {math.ceil(25 * (found.numbers['error'] / 0.1) ** 2)} draws" in found.advice
    quiet = moved(MeanField(init_scale=0.01), by=0.0)
    assert named(diagnose(quiet, num_draws=25), "draws").level == "fine"


def test_point_estimates_get_words() -> None:
    """Law: a point estimate is no error: it is said what cannot be had, and predictions are checked all the same."""
    found = diagnose(moved(MAP()), num_draws=25)
    assert [finding.name for finding in found.findings] == ["posterior", "prior check", "posterior check"]
    assert "point estimate" in found.findings[0].words and found.loo is None


@pytest.mark.parametrize(
    ("guide", "temperature", "names", "reason"),
    [
        (Laplace(), 1.0, ("guide", "sensitivity"), "linearised natural parameters"),
        (Laplace(predictive="probit"), 1.0, ("loo",), "closed-form"),
        (Inducing(posterior="ensemble"), 1.0, ("guide", "loo"), "lora.value.A.V"),
        (MeanField(), 0.0, ("guide", "loo", "sensitivity"), "β = 0"),
    ],
    ids=["laplace", "probit", "ensemble", "no temperature"],
)
def test_refusals_say_why(guide: Guide, temperature: float, names: tuple[str, ...], reason: str) -> None:
    """Law: where a diagnostic has no meaning it is refused in words that name the reason, never with an error."""
    found = diagnose(moved(guide, temperature=temperature), num_draws=25)
    for name in names:
        assert named(found, name).level == "none" and reason in named(found, name).words
    json.dumps(found.to_dict())


def test_laplace_has_loo() -> None:
    """Law: leave-one-out needs the marginals of each row alone, which linearised predictions have."""
    found = diagnose(moved(Laplace(num_points=64)), num_draws=25)
    assert found.loo is not None and found.loo.n_samples == 64 and np.isfinite(found.loo.elpd)


def test_mistakes(posterior: Posterior) -> None:
    """Law: too few draws, no task, other data and rivals without draws are said."""
    with pytest.raises(ValueError, match="at least 25, not 24"):
        diagnose(posterior, num_draws=24)
    other = Posterior(tiny_program(size=20), posterior.guide)
    with pytest.raises(ValueError, match="other training data"):
        diagnose(posterior, runs=[other])
    with pytest.raises(ValueError, match="is no run of"):
        diagnose(posterior, runs=[moved(MeanField(random="*.B"))])
    with pytest.raises(ValueError, match="map: LOO compares posteriors"):
        diagnose(posterior, against={"map": moved(MAP())}, num_draws=25)
    bare = tiny_program()
    bare.task = None
    with pytest.raises(ValueError, match="needs the program's task"):
        diagnose(Posterior(bare, posterior.guide))
