"""MAP: a point at every site, and the objective that makes it the mode."""

from __future__ import annotations

import pytest
import torch
from pyro import poutine

from pyrolora.guides.map import MAP
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, tiny_program

HIERARCHICAL: dict[str, Prior] = {"lora.query.B": ARD(0.03), "*.B": Flat(), "*": Hierarchical(0.4)}


def moved(program: PyroLoRA) -> MAP:
    guide = MAP()
    guide.bind(program)
    with torch.no_grad(), isolated(3):
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


@pytest.mark.parametrize("priors", [PRIORS, HIERARCHICAL])
def test_nothing_is_random(priors: dict[str, Prior]) -> None:
    """Law: MAP has no random site; every run gives the same values, which are its mean."""
    guide = moved(tiny_program(priors))
    assert guide.random_sites() == []
    first, again, mean = guide(), guide(), guide.mean()
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], mean[name]) for name in first)


@pytest.mark.parametrize("priors", [PRIORS, HIERARCHICAL])
def test_its_objective_is_the_log_joint(priors: dict[str, Prior]) -> None:
    """Law: the loss is −log p(y, θ) of the program at θ, nothing added."""
    program = tiny_program(priors)
    program.model.eval()
    guide = moved(program)
    assert program.task is not None
    batch = program.task.collate(list(program.task.train))
    loss = TemperedELBO().differentiable_loss(program, guide, batch)
    joint = poutine.trace(poutine.condition(program, data=guide.mean())).get_trace(batch).log_prob_sum()
    assert loss.item() == pytest.approx(-joint.item(), rel=1e-6)


def test_its_gradient_is_that_of_the_log_joint() -> None:
    """Law: d loss / dθ is minus the score of the data plus θ/σ², the pull of the Normal prior."""
    program = tiny_program({"*": Normal(0.3)})
    program.model.eval()
    guide = moved(program)
    assert program.task is not None
    batch = program.task.collate(list(program.task.train))
    TemperedELBO().differentiable_loss(program, guide, batch).backward()
    values = {name: value.requires_grad_() for name, value in guide.mean().items()}
    data = program.likelihood.log_prob(program.logits(values, batch), {}, batch).sum()
    for name, score in zip(values, torch.autograd.grad(data, list(values.values())), strict=True):
        expected = -score + values[name] / 0.3**2
        assert torch.allclose(guide.points[name.replace(".", "/")].grad, expected, rtol=1e-4, atol=1e-4), name


def test_scales_of_priors_stay_at_their_medians() -> None:
    """Law: the joint mode over scale and weights is degenerate, so hyper-parameters stay at their prior medians."""
    program = tiny_program(HIERARCHICAL)
    guide = moved(program)
    mean = guide.mean()
    assert torch.allclose(mean["lora.query.B.scale"], torch.tensor(0.03))
    assert torch.allclose(mean["lora.query.A.scale"], torch.tensor(0.4))
    assert {name.replace("/", ".") for name in guide.points} == set(program.sites)


def test_draws_are_copies_of_the_point() -> None:
    """Law: every draw of its posterior is the point."""
    program = tiny_program()
    guide = moved(program)
    draws = Posterior(program, guide).draw(3)
    assert all((value == guide.mean()[name]).all() for name, value in draws.items())
