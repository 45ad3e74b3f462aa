"""Kept weights, and snapshots of one run."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from pyrolora.guides.base import Step
from pyrolora.guides.map import MAP
from pyrolora.guides.samples import Checkpoints, Samples, _spread
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from tests.programs import sentence_task, tiny_bert, tiny_program


def arguments(folder: Path, **options: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.05, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, **{**chosen, **options})


def test_snapshots_are_the_weights_of_the_run(tmp_path: Path) -> None:
    """Law: the kept points are MAP's weights at evenly spaced steps of the same run, the last of them its end."""
    program = tiny_program()
    options: dict = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    alone = fit(program, MAP(), args=arguments(tmp_path, **options))
    posterior = fit(program, Checkpoints(size=3, start=0.0), args=arguments(tmp_path / "other"))
    kept = posterior.guide.kept(program.latents["lora.query.A"])
    assert torch.equal(kept[2], alone.mean()["lora.query.A"])
    for place, step in enumerate((2, 4, 6)):
        state = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        assert torch.equal(kept[place], state["points.lora/query/A"])


def test_the_prediction_is_the_mean_over_snapshots(tmp_path: Path) -> None:
    """Law: every snapshot counts once, whatever number of draws is asked for; the mean weights are the last's."""
    posterior = fit(tiny_program(), Checkpoints(size=3), args=arguments(tmp_path))
    test = sentence_task().test
    prediction = posterior.predict(test, 16)
    assert prediction.num_draws == 3 == posterior.guide.passes(16, 2) and prediction.variance.max() > 0
    point = MAP()
    point.bind(posterior.program)
    found = []
    for m in range(3):
        for latent in posterior.program.latents.values():
            point.points[latent.name.replace(".", "/")].data.copy_(posterior.guide.kept(latent)[m])
        found.append(Posterior(posterior.program, point).predict(test).mean)
    assert torch.allclose(prediction.mean, torch.stack(found).mean(0), atol=1e-6)
    assert torch.equal(posterior.predict(test, 0).mean, found[2])


def test_a_resumed_run_goes_on_with_its_snapshots(tmp_path: Path) -> None:
    """Law: snapshots are in the checkpoint; a run killed between two of them ends with the same ones."""
    program, guide = tiny_program(), Checkpoints(size=3)
    options: dict = {"save_strategy": "steps", "save_steps": 5}
    whole = fit(program, guide, args=arguments(tmp_path, **options)).guide.state_dict()
    for folder in tmp_path.glob("checkpoint-6"):
        folder.rename(tmp_path / "gone")
    resumed = fit(program, guide, args=arguments(tmp_path, **options), resume=True).guide.state_dict()
    assert int(whole["count"]) == 3 and all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_saves_loads_and_exports(tmp_path: Path) -> None:
    """Law: a loaded one predicts the same, and exports each snapshot as an adapter."""
    posterior = fit(tiny_program(), Checkpoints(size=2), args=arguments(tmp_path))
    posterior.save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    test = sentence_task().test
    assert torch.equal(loaded.predict(test).log_mean, posterior.predict(test).log_mean)
    loaded.export_peft(tmp_path / "one", draw=1)


def test_few_draws_are_spread_and_all_are_used() -> None:
    """Law: the order of points is a permutation, and its first few are far apart."""
    for count in range(1, 200):
        assert sorted(_spread(turn, count) for turn in range(count)) == list(range(count))
    first = sorted(_spread(turn, 100) for turn in range(5))
    assert min(b - a for a, b in itertools.pairwise(first)) >= 10


def test_never_more_than_there_is_room_for() -> None:
    """Law: after ``size`` points no other is taken; before the first there is nothing to fit; one alone is a point."""
    guide = Samples(2)
    guide.bind(tiny_program())
    with pytest.raises(ValueError, match="too short to leave a single point"):
        guide.post_fit(tiny_program(), sentence_task().train)
    guide.keep()
    guide.post_fit(tiny_program(), sentence_task().train)
    assert guide.random_sites() == [] and guide.passes(16, 2) == 1
    guide.after_step(Step(1, 1, 0.1, 1.0, 10))
    for _ in range(3):
        guide.keep()
    assert guide.num_kept == 2 and guide.passes(16, 2) == 2
    for wrong in (lambda: Samples(0), lambda: Checkpoints(start=1.0)):
        with pytest.raises(ValueError, match=r"Samples: size|Checkpoints: start"):
            wrong()
