"""SWAG: moments along the trajectory, in the checkpoint, and the Gaussian of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora.guides.base import Step
from pyrolora.guides.swag import SWAG
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from tests.programs import linear_gaussian, sentence_task, tiny_bert, tiny_program

SITE = "lora.linear.A"


def arguments(folder: Path, **options: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 0.05, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, **{**chosen, **options})


def wandering(rank: int, size: int, *, rate: float = 0.1, curvature: float = 2.0) -> tuple[SWAG, torch.Tensor]:
    """SGD on ``h θ²/2`` with gradient noise of covariance C; the exact stationary covariance ``η C / (2h − η h²)``."""
    guide = SWAG(rank=rank)
    guide.bind(linear_gaussian().program)
    point = guide.points["lora/linear/A"].data
    with isolated(0):
        factor = torch.randn(8, 8) / 2
        for _ in range(size):
            for _ in range(8):  # steps between two models: they are then nearly independent
                noise = (factor @ torch.randn(8)).reshape(point.shape)
                point.copy_(point - rate * (curvature * point + noise))
            guide.collect()
    guide.get_buffer("fitted").fill_(True)
    return guide, rate * factor @ factor.T / (2 * curvature - rate * curvature**2)


def test_on_a_quadratic_it_has_the_stationary_covariance() -> None:
    """Law: draws have mean 0 and covariance η C/(2h − η h²), the exact one, within sampling error."""
    guide, exact = wandering(1000, 1000)
    with isolated(1):
        draws = torch.stack([guide()[SITE].detach().flatten() for _ in range(3000)])
    scale = exact.diagonal().sqrt()
    found = torch.cov(draws.T)
    assert draws.mean(0).abs().le(0.15 * scale).all()
    # Half of the low-rank part plus half of the diagonal: variances in full, covariances by half.
    half = 0.5 * exact + 0.5 * exact.diagonal().diag()
    assert ((found - half) / scale / scale.unsqueeze(-1)).abs().max() < 0.12


def test_at_rank_zero_it_is_the_diagonal() -> None:
    """Law: ``N(θ_SWA, Σ_diag)`` without a low-rank part; Σ_diag is the variance along the trajectory."""
    guide, exact = wandering(0, 1000)
    q = guide.family(guide.latents[SITE])
    assert torch.allclose(q.variance.detach().flatten(), exact.diagonal(), rtol=0.2)
    assert int(guide.count) == 1000


def test_moments_are_those_of_the_models() -> None:
    """Law: mean, variance and deviations equal those computed from all models at once; the last K deviations stay."""
    guide = SWAG(rank=3)
    guide.bind(linear_gaussian().program)
    with isolated(2):
        models = torch.randn(7, *guide.points["lora/linear/A"].shape) + 100
    for model in models:
        guide.points["lora/linear/A"].data.copy_(model)
        guide.collect()
    mean, squares, deviations = guide._moments(guide.latents[SITE])
    torch.testing.assert_close(mean, models.mean(0), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(squares / 7, models.var(0, correction=0), rtol=1e-3, atol=1e-5)
    running = [models[i] - models[: i + 1].mean(0) for i in range(7)]
    for i in (4, 5, 6):
        torch.testing.assert_close(deviations[i % 3], running[i], rtol=1e-3, atol=1e-3)


def test_the_low_rank_noise_is_one_for_all_sites() -> None:
    """Law: deviations of different sites move together in a draw, as they did along the trajectory."""
    guide = SWAG(rank=2)
    guide.bind(linear_gaussian().program)
    for sign in (1.0, -1.0, 1.0):
        for parameter in guide.points.values():
            parameter.data.fill_(sign)
        guide.collect()
    guide.get_buffer("fitted").fill_(True)
    for name, buffer in guide.named_buffers():
        if name.startswith("squares"):
            buffer.zero_()
    draw = guide()
    assert draw[SITE].std() < 1e-6
    assert torch.allclose(draw[SITE].flatten()[0], draw["lora.linear.B"].flatten()[0]) and draw[SITE].abs().sum() > 0


def test_a_resumed_run_goes_on_with_its_moments(tmp_path: Path) -> None:
    """Law: a run that was killed in the collecting part ends with the same moments, to the bit."""
    program, guide = tiny_program(), SWAG(rank=3, num_models=4)
    options: dict = {"save_strategy": "steps", "save_steps": 6}
    whole = fit(program, guide, args=arguments(tmp_path, **options))
    assert int(whole.guide.count) == 4
    ours = whole.guide.state_dict()
    for last in (8, 6):  # once the run had ended, once it was killed
        assert (tmp_path / f"checkpoint-{last}").is_dir()
        theirs = fit(program, guide, args=arguments(tmp_path, **options), resume=True).guide.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        shutil.rmtree(tmp_path / "checkpoint-8")
    assert any(name.startswith("deviations") and bool(value.any()) for name, value in ours.items())
    rates = {
        row["learning_rate"] for row in fit(program, guide, args=arguments(tmp_path, logging_steps=1)).history[:-1]
    }
    assert rates == {0.05}


def test_saves_loads_and_predicts(tmp_path: Path) -> None:
    """Law: a loaded one predicts the same; its mean is the trajectory's; draws differ at every site."""
    posterior = fit(tiny_program(), SWAG(rank=2, num_models=4), args=arguments(tmp_path))
    posterior.save_pretrained(tmp_path / "saved")
    test = sentence_task().test
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    assert torch.equal(loaded.predict(test, 3).log_mean, posterior.predict(test, 3).log_mean)
    assert loaded.guide.random_sites() == list(posterior.program.sites)
    assert torch.equal(loaded.mean()["lora.query.A"], posterior.guide.get_buffer("mean:lora/query/A"))
    assert loaded.predict(test, 3).variance.max() > 0 and loaded.describe()["lora.query.A"]["models"] == 4
    loaded.export_peft(tmp_path / "mean")
    loaded.to_datatree(test, 2)


def test_models_are_evenly_spaced_in_the_last_part() -> None:
    """Law: exactly ``count`` steps after ``start``, the last one among them; all steps where there are fewer."""

    def chosen(total: int, count: int, start: float) -> list[int]:
        return [n for n in range(1, total + 1) if Step(n, total, 0.1, 1.0, 10).is_one_of(count, start=start)]

    assert chosen(100, 5, 0.5) == [60, 70, 80, 90, 100]
    assert chosen(10, 40, 0.5) == [6, 7, 8, 9, 10]
    assert chosen(7, 3, 0.0) == [3, 5, 7]
    assert all(len(chosen(97, count, 0.3)) == count for count in range(1, 60))


def test_too_short_a_run_is_an_error(tmp_path: Path) -> None:
    """Law: fewer than two weights have no variance."""
    with pytest.raises(ValueError, match="fewer than two steps"):
        fit(tiny_program(), SWAG(start=0.9), args=arguments(tmp_path, max_steps=2))
    with pytest.raises(ValueError, match="rank 0 or at least 2"):
        SWAG(rank=1)
