from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from pyrolora.cli import main
from pyrolora.diagnostics.evaluation import evaluate_posterior, fit_scaling
from pyrolora.diagnostics.tokens import token_uncertainty
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from pyrolora.saved import load
from tests.recipes import save_language
from tests.terminal import Captured, fails


def test_evaluate(fitted: Path, capsys: Captured) -> None:
    """Law: evaluate prints the evaluation of the loaded posterior, τ from the validation split, as JSON or a table."""
    main(["evaluate", str(fitted), "--draws", "4", "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    read = Recipe.read(fitted / "recipe.yaml")
    task = read.build_task()
    posterior = Posterior.from_pretrained(fitted, read.load_base(task, seed=3), task=task)
    assert task.validation is not None and task.test is not None
    tau = fit_scaling(posterior, task.validation, num_draws=4)
    expected = evaluate_posterior(posterior, task.test, scaling=tau, ood=task.ood, num_draws=4).to_dict()
    assert found.pop("split") == "test"
    for left in (found, expected):
        del left["predict_seconds"]
    assert found == expected
    main(["evaluate", str(fitted), "--draws", "4"])
    out = capsys.readouterr().out
    assert f"{expected['metrics']['nll']['value']:.4f}" in out and f"τ = {tau:.2f}" in out


def test_evaluate_other_splits(fitted: Path, capsys: Captured) -> None:
    """Law: every split can be scored, validation without scaling; unknown labels and splits stop with one line."""
    for split, size in (("far", 6), ("train", 24), ("validation", 16)):
        main(["evaluate", str(fitted), "--draws", "0", "--split", split])
        out = capsys.readouterr().out
        assert f"{split}: {size} examples, 1 draw(s)" in out
        assert ("τ" in out) == (split != "validation")
    assert "there are test, validation, train, far" in fails(capsys, "evaluate", fitted, "--split", "farr")
    assert "1 of 1 labels are unknown" in fails(capsys, "evaluate", fitted, "--split", "unknown")


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_evaluate_writes_tokens(tmp_path: Path, capsys: Captured, ending: str) -> None:
    """Law: of a language model --tokens writes the table of `token_uncertainty` beside the evaluation, whose output
    stays plain JSON; other posteriors and endings stop with one line."""
    folder = save_language(tmp_path)
    file = tmp_path / "new" / f"tokens.{ending}"
    capsys.readouterr()
    said = ["--split", "train", "--draws", "3", "--format", "json"]
    main(["evaluate", str(folder), *said, "--tokens", str(file)])
    assert json.loads(capsys.readouterr().out)["num_draws"] == 3
    posterior, task = load(folder)
    found = pd.read_parquet(file) if ending == "parquet" else pd.read_json(file, lines=True)
    expected = token_uncertainty(posterior, task.train, num_draws=3)
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, atol=1e-5)
    assert "ending is one of .csv, .jsonl, .parquet" in fails(capsys, "evaluate", folder, "--tokens", "tokens.txt")


def test_tokens_are_of_language_models(fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a classifier has no tokens to write; the error names the command that has a row for each input."""
    said = fails(capsys, "evaluate", fitted, "--tokens", tmp_path / "tokens.csv")
    assert "--tokens is for language models" in said and "pyrolora predict" in said


def test_diagnose(fitted: Path, recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: diagnose prints a verdict for each diagnostic with other runs and rivals, and writes JSON and pictures."""
    for seed, random in (("4", "*.A"), ("5", "head.*")):
        main(["fit", str(recipe), "--output", str(tmp_path / seed), "--seed", seed, "--options.random", random])
    capsys.readouterr()
    command = ["diagnose", str(fitted), "--draws", "25", "--output", str(tmp_path / "out")]
    main([*command, "--runs", str(tmp_path / "4"), "--against", str(tmp_path / "5")])
    out = capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert len(content["findings"]) == 9 and all(f" {found['name']} " in out for found in content["findings"])
    assert "R-hat over 2 runs" in " ".join(out.split()) and set(content["comparison"]) == {"this", str(tmp_path / "5")}
    assert content["settings"]["num_draws"] == 25
    for name in ("layers.png", "ranks.png", "checks.png"):
        assert (tmp_path / "out" / name).is_file() and name in out
    assert "at least 25, not 24" in fails(capsys, "diagnose", fitted, "--draws", "24")
    assert "match no random site" in fails(capsys, "diagnose", fitted, "--sites", "*.C")
