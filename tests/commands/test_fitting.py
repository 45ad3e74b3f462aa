from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pyrolora.cli import main
from pyrolora.recipe import Recipe
from tests.terminal import Captured, fails


def test_sites(recipe: Path, capsys: Captured) -> None:
    """Law: the table of sites has every site of the program with its prior."""
    main(["sites", str(recipe)])
    out = capsys.readouterr().out
    program = Recipe.read(recipe).build_program(Recipe.read(recipe).build_task())
    assert [line.split()[0] for line in out.splitlines()] == ["site", *program.sites]
    assert re.search(r"lora\.query\.A .*Normal\(scale=0\.1\)", out)


def test_fit_writes_a_posterior_that_stands_alone(fitted: Path, recipe: Path) -> None:
    """Law: the folder has guide, seed and recipe; it loads as the posterior that was asked for."""
    meta = json.loads((fitted / "posterior.json").read_text())
    assert meta["guide"]["class"] == "guides.MeanField" and meta["seed"] == 3
    assert [row["step"] for row in meta["history"] if "elbo" in row] == [1, 2, 3]
    saved, original = Recipe.read(fitted / "recipe.yaml"), Recipe.read(recipe)
    assert (saved.base, saved.task, saved.priors) == (original.base, original.task, original.priors)


def test_fit_tells_what_it_did(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: fit prints the posterior, where it is, and its last ELBO = data − KL + log prior of point estimates."""
    main(["fit", str(recipe), "--output", str(tmp_path / "mf")])
    out = capsys.readouterr().out
    assert "Posterior(MeanField" in out and f"pyrolora evaluate {tmp_path / 'mf'}" in out
    elbo, data, kl, log_prior = map(float, re.findall(r"-?\d+\.\d{4}", out.partition("\nelbo")[2].partition("\n")[0]))
    assert elbo == pytest.approx(data - kl + log_prior, abs=3e-4)
    assert re.search(r"lora\.query: noise_to_mean \d", out)


def test_fit_without_a_logged_step(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: fewer steps than logging_steps are a fit all the same."""
    main(["fit", str(recipe), "--output", str(tmp_path), "--training.logging_steps", "50", "--guide", "MAP"])
    out = capsys.readouterr().out
    assert "Posterior(MAP" in out and "elbo" not in out


def test_dotted_options_arrive(recipe: Path, tmp_path: Path) -> None:
    """Law: --options.NAME and --training.NAME reach the guide and the Trainer as numbers, words and booleans."""
    options = ["--options.noise", "example", "--options.init_scale", "5e-1", "--temperature", "0.3"]
    training = ["--training.max_steps", "2", "--training.learning_rate", "1e-4", "--training.bf16=false"]
    main(["fit", str(recipe), "--output", str(tmp_path), *options, *training])
    meta = json.loads((tmp_path / "posterior.json").read_text())
    assert meta["guide"]["init"]["noise"] == "example" and meta["guide"]["init"]["init_scale"] == 0.5
    assert meta["temperature"] == 0.3
    assert max(row["step"] for row in meta["history"]) == 2
    saved = Recipe.read(tmp_path / "recipe.yaml")
    assert saved.training == {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-4, "bf16": False}
    assert saved.guides == {"MeanField": {"noise": "example", "init_scale": 0.5}}


def test_same_seed_same_posterior(recipe: Path, fitted: Path, tmp_path: Path) -> None:
    """Law: the same command gives the same numbers; another seed gives others."""
    for seed in ("3", "4"):
        main(["fit", str(recipe), "--output", str(tmp_path / seed), "--seed", seed])
    first, again, other = (load_file(f / "posterior.safetensors") for f in (fitted, tmp_path / "3", tmp_path / "4"))
    assert all((first[name] == again[name]).all() for name in first)
    assert not all((first[name] == other[name]).all() for name in first)


def test_resume(recipe: Path, tmp_path: Path, capsys: Captured, caplog: pytest.LogCaptureFixture) -> None:
    """Law: --resume, a bare flag, goes on from the last checkpoint; without it fit and checkpoints begin anew."""
    command = ["fit", str(recipe), "--guide", "MAP", "--output", str(tmp_path)]
    steps = ["--training.save_strategy", "steps", "--training.save_steps", "1", "--training.save_total_limit", "9"]
    main([*command, *steps, "--training.max_steps", "2"])
    state = tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    written = state.stat().st_mtime_ns
    main([*command, *steps, "--training.max_steps", "4", "--resume"])
    assert state.stat().st_mtime_ns == written
    assert json.loads((tmp_path / "posterior.json").read_text())["history"][-1]["step"] == 4
    assert "without --resume" in fails(capsys, *command, "--resume", "--seed", "1")
    assert "without --resume" in fails(capsys, *command, "--resume", "--guide", "MeanField")
    main([*command, *steps, "--training.max_steps", "2"])
    assert state.stat().st_mtime_ns != written
    assert not state.parent.with_name("checkpoint-4").exists()
    main([*command[:-1], str(tmp_path / "new"), "--resume"])
    assert any("no complete checkpoint" in message for message in caplog.messages)
