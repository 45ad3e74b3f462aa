"""SGLD and SGHMC: the noise, the cycles, and the stationary distribution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyrolora.guides.base import Step
from pyrolora.guides.sgld import SGLD
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.guides.test_samples import arguments
from tests.programs import linear_gaussian, sentence_task, tiny_bert, tiny_program


@pytest.mark.parametrize(("momentum", "temperature"), [(0.0, 1.0), (0.9, 0.25)])
def test_on_a_gaussian_it_samples_that_gaussian(momentum: float, temperature: float) -> None:
    """Law: with gradients of ½ (θ − m)ᵀ P (θ − m) / N the points have mean m and covariance β P⁻¹."""
    size, steps, total = 20, 15_000, 10**9
    guide = SGLD(momentum=momentum, exploration=0.0, step_size=0.1 * (1 - momentum), cycles=1)
    guide.bind(linear_gaussian().program)
    point = guide.points["lora/linear/A"]
    with isolated(0):
        factor = torch.randn(8, 8) / 8 + torch.eye(8)
        precision, mean = size * factor @ factor.T, torch.linspace(-1, 1, 8)
        optimiser = torch.optim.SGD(guide.parameter_groups(1.0))
        found = []
        for number in range(1, steps + 1):
            point.grad = (precision @ (point.data.flatten() - mean) / size).reshape(point.shape)
            guide.before_step(Step(number, total, guide.step_size, temperature, size))
            optimiser.step()
            if number > 1000 and number % 5 == 0:
                found.append(point.data.flatten().clone())
    values = torch.stack(found)
    exact = temperature * torch.linalg.inv(precision)
    scale = exact.diagonal().sqrt()
    assert ((values.mean(0) - mean) / scale).abs().max() < 0.2
    assert ((torch.cov(values.T) - exact) / scale / scale.unsqueeze(-1)).abs().max() < 0.2


def test_noise_comes_in_the_second_part_of_a_cycle() -> None:
    """Law: the first part of each cycle is plain SGD; size/cycles points are kept in the second part of each."""
    guide = SGLD(size=8, cycles=2, exploration=0.5, momentum=0.0)
    guide.bind(tiny_program())
    point, noisy, kept = guide.points["lora/query/A"], [], []
    for number in range(1, 41):
        point.grad = torch.zeros_like(point)
        step = Step(number, 40, 0.1, 1.0, 24)
        guide.before_step(step)
        if point.grad.any():
            noisy.append(number)
        before = guide.num_kept
        guide.after_step(step)
        kept += [number] * (guide.num_kept - before)
    assert noisy == [*range(11, 21), *range(31, 41)]
    assert len(kept) == 8 and [number <= 20 for number in kept] == [True] * 4 + [False] * 4
    assert set(kept) <= set(noisy) and kept[3] == 20 and kept[-1] == 40


def test_a_new_cycle_gives_no_kick() -> None:
    """Law: where the rate jumps from almost 0 to ``step_size``, weights move as far as in any cycle's first steps."""
    guide = SGLD(cycles=2, exploration=0.0, step_size=0.1)
    guide.bind(tiny_program())
    point = guide.points["lora/query/A"]
    optimiser = torch.optim.SGD(guide.parameter_groups(1.0))
    moved = []
    with isolated(0):
        for number, rate in enumerate([0.1] * 20 + [1e-7] * 20 + [0.1] * 20, start=1):
            before = point.detach().clone()
            point.grad = torch.zeros_like(point)
            guide.before_step(Step(number, 60, rate, 1.0, 24))
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
            moved.append(float((point - before).square().mean().sqrt()))
    assert max(moved[40:]) < 2 * max(moved[:20]) and max(moved[38:40]) < 0.2 * max(moved[:20])


def test_it_prescribes_its_optimiser(tmp_path: Path) -> None:
    """Law: plain SGD with momentum, a cosine that restarts, no clipping, no warm-up; the arguments given stay."""
    given = arguments(tmp_path, max_steps=40, logging_steps=1, warmup_steps=5)
    before = (given.optim, given.max_grad_norm, given.lr_scheduler_type)
    posterior = fit(tiny_program(), SGLD(size=4, cycles=2, step_size=0.2), args=given)
    rates = [row["learning_rate"] for row in posterior.history if "learning_rate" in row]
    assert rates[0] == pytest.approx(0.2) and rates[20] == pytest.approx(0.2) and rates[19] < 0.01 < rates[10]
    assert before == (given.optim, given.max_grad_norm, given.lr_scheduler_type)
    assert posterior.guide.num_kept == 4


def test_saves_loads_and_predicts(tmp_path: Path) -> None:
    """Law: a loaded one predicts the same, as many draws as were asked for up to its points."""
    posterior = fit(tiny_program(), SGLD(size=4, cycles=2), args=arguments(tmp_path, max_steps=12))
    posterior.save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    test = sentence_task().test
    assert torch.equal(loaded.predict(test, 3).log_mean, posterior.predict(test, 3).log_mean)
    assert loaded.predict(test, 3).num_draws == 3 and loaded.predict(test, 16).num_draws == 4
    with pytest.raises(ValueError, match="cycles at least 1"):
        SGLD(size=2, cycles=3)
