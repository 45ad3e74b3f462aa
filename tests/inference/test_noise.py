"""Noise-to-mean ratio of the weight update against explicit matrices."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from pyrolora.guides.inducing import Inducing
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.noise import noise_to_mean, update_squares, verdict
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import tiny_program


def moved(guide: MeanField | MAP | Inducing) -> Posterior:
    program = tiny_program()
    with isolated(0), torch.no_grad():
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Posterior(program, guide)


def test_ratio_is_that_of_explicit_updates() -> None:
    """Law: √(E‖s B A − s B̄ Ā‖²/‖s B̄ Ā‖²) with the matrices made, for each kind of module."""
    posterior = moved(MeanField(random="lora.*"))
    draws, mean = posterior.draw(5), posterior.mean()
    ratios = noise_to_mean(posterior.program.sites, draws, mean)
    assert list(ratios) == ["lora.query", "lora.value"]
    for kind, ratio in ratios.items():
        update = 2.0 * draws[f"{kind}.B"] @ draws[f"{kind}.A"]
        centre = 2.0 * mean[f"{kind}.B"] @ mean[f"{kind}.A"]
        expected = (update - centre).square().sum((1, 2, 3)).mean() / centre.square().sum()
        assert ratio == pytest.approx(float(expected.sqrt()), rel=1e-4)
        assert ratio > 0.1


def test_squares_are_those_of_explicit_updates() -> None:
    """Law: ‖ΔW_s‖², ‖ΔW_s − ΔW̄‖² and ‖ΔW̄‖² of every draw and layer, with the matrices made."""
    posterior = moved(MeanField(random="lora.*"))
    draws, mean = posterior.draw(3), posterior.mean()
    for kind, (whole, noise, own) in update_squares(posterior.program.sites, draws, mean).items():
        update = 2.0 * draws[f"{kind}.B"] @ draws[f"{kind}.A"]
        centre = 2.0 * mean[f"{kind}.B"] @ mean[f"{kind}.A"]
        for found, matrix in ((whole, update), (noise, update - centre), (own, centre)):
            assert torch.allclose(found, matrix.double().square().sum((-2, -1)), rtol=1e-4)


def test_limits() -> None:
    """Law: equal draws have ratio zero; noise about a zero update is infinite; no update at all is zero."""
    posterior = moved(MeanField(random="lora.*"))
    mean = posterior.mean()
    same = {name: value.expand(3, *value.shape) for name, value in mean.items()}
    sites = posterior.program.sites
    assert max(noise_to_mean(sites, same, mean).values()) < 1e-6
    zero = {name: 0 * value for name, value in mean.items()}
    assert set(noise_to_mean(sites, posterior.draw(3), zero).values()) == {math.inf}
    assert set(noise_to_mean(sites, {n: 0 * v for n, v in same.items()}, zero).values()) == {0.0}


def test_verdicts() -> None:
    """Law: too quiet everywhere, or too loud anywhere, is said with what to do; all else is fine."""
    assert verdict({}) is None and verdict({"lora.query": 0.5, "lora.value": 0.001}) is None
    quiet = verdict({"lora.query": 0.005, "lora.value": 0.001})
    assert quiet is not None and "indistinguishable" in quiet and "Start wider" in quiet
    loud = verdict({"lora.query": 40.0, "lora.value": 1.0})
    assert loud is not None and "lora.query:" in loud and "lora.value" not in loud


def test_a_posterior_describes_itself(caplog: pytest.LogCaptureFixture) -> None:
    """Law: the guide's own numbers for each site and the noise for each kind; a point estimate has none."""
    rows = moved(Inducing()).describe()
    assert set(rows) == {"lora.query.A", "lora.value.A", "lora.query", "lora.value"}
    assert set(rows["lora.query.A"]) == {"sigma_V", "lambda", "kl_V", "kl_conditional", "effective"}
    assert set(moved(Inducing(structure="product")).describe()["lora.query.A"]) == {"sigma_V", "kl_V", "effective"}
    assert rows["lora.query"]["noise_to_mean"] > 0
    assert moved(MAP()).describe() == {}
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
