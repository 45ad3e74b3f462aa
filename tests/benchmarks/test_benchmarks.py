"""The benchmarks run, on shapes so small that their figures say nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

FOLDER = Path(__file__).parent


def run(script: str, out: Path, *arguments: str) -> Any:
    """What a benchmark writes as JSON."""
    root = FOLDER.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(FOLDER / f"{script}.py"), *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A benchmark as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where its dataclass looks for its own names
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("benchmark", monkeypatch)


def test_ranking_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: AUROCs are scikit-learn's, ties included, on the rows and on resamples, which all methods share: of one that
    knows its errors it is 1 on each, and equal scores differ on none."""
    module = script("error_ranking", monkeypatch)
    generator = np.random.default_rng(1)
    wrong = generator.random(200) < 0.3
    guess = generator.integers(0, 20, 200).astype(float)
    found, again, knows = (module.ranking(score, wrong, num_bootstrap=50) for score in (guess, guess, wrong * 1.0))
    assert found.value == pytest.approx(roc_auc_score(wrong, guess))
    assert np.array_equal(found.samples, again.samples) and 0.02 < found.samples.std() < 0.1
    assert knows.value == 1.0 and (knows.samples == 1.0).all()


@pytest.mark.slow
def test_large_shapes(tmp_path: Path) -> None:
    """Law: for each shape there are seconds, and a ratio with its interval for every method's step and prediction."""
    options = ("--shapes", "tiny", "tiny-moe", "--rounds", "1", "--steps", "1", "--length", "16", "--draws", "1", "2")
    found = run("large", tmp_path / "large.json", *options)
    assert found.keys() == {"device", "tiny", "tiny-moe"}
    for shape in ("tiny", "tiny-moe"):
        assert found[shape].keys() == {"seconds", "gibibytes", "step", "predict"} and found[shape]["seconds"] > 0
        methods = {"plain LoRA", "MAP", "MeanField", "Inducing", "Inducing, product", "BLoB", "InputAdaptive"}
        assert found[shape]["step"].keys() == methods
        assert found[shape]["predict"].keys() == {"1 draws", "2 draws", "Laplace, fit", "Laplace, prediction"}
        for row in [*found[shape]["step"].values(), *found[shape]["predict"].values()]:
            assert row.keys() == {"ratio", "low", "high"} and 0 < row["low"] <= row["ratio"] <= row["high"]


@pytest.mark.slow
def test_pyros_overhead(tmp_path: Path, suite: ModuleType) -> None:
    """Law: the overhead is written for each width and depth, and is rows of the suite's table."""
    (tmp_path / "runs").mkdir()
    sizes = ("--layers", "2", "--widths", "32", "--depths", "2", "3", "4")
    found = run("pyro_overhead", tmp_path / "runs" / "pyro.json", *sizes, "--rounds", "3")
    assert found.keys() == {f"{layers} layers, width 32" for layers in (2, 3, 4)}
    assert [(row["sites"], row["layers"]) for row in found.values()] == [(14, 2), (14, 3), (14, 4)]
    table = suite.table(tmp_path / "runs")
    assert "Pyro's overhead" in table and "| 14 sites, 2 layers, width 32: a step | " in table


def test_every_part_has_its_script(suite: ModuleType) -> None:
    """Law: each part of the suite names a script that is there, and time and memory of the peers are among them."""
    assert all((FOLDER / f"{part.script}.py").is_file() for part in suite.PARTS.values())
    assert {"fit", "predict", "memory"} <= set(suite.PARTS["peers"].arguments)


def test_what_is_not_installed_is_said(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: absent peers are named, and what is left is measured; without any nothing runs."""
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(suite.subprocess, "run", run)
    for absent, runs in (({"laplace", "bayesian_lora"}, 0), ({"bayesian_lora"}, 1), (set(), 1)):
        ran.clear()
        monkeypatch.setattr(suite, "find_spec", lambda name, absent=absent: None if name in absent else object())
        suite.measure("peers", tmp_path)
        said = capsys.readouterr().out
        assert len(ran) == runs and all(name in said for name in absent)
        assert ("NOT INSTALLED" in said) == bool(absent)


def test_a_part_that_fails_does_not_end_the_others(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: what follows a part that fails is measured, the table written, and the failure is the exit status."""
    codes = iter([3, 0])
    monkeypatch.setattr(suite.subprocess, "run", lambda command: subprocess.CompletedProcess(command, next(codes)))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--output", str(tmp_path), "--only", "predict", "store"])
    with pytest.raises(SystemExit, match="failed, and not in the table: predict; again with --only predict"):
        suite.main()
    assert "predict: 0 s; FAILED with exit code 3\nstore: 0 s\n" in capsys.readouterr().out
    assert (tmp_path / "table.md").is_file()


def test_the_peers_have_sentences_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the embedded task's rows serve them, with their text and label."""
    monkeypatch.syspath_prepend(str(FOLDER))
    methods = importlib.import_module("laplace_methods")
    rows = methods._sentences(None, "train", ["commonsense"], 8)
    assert len(rows) == 8 and set(rows["label"]) <= {0, 1} and all(rows["text"])


@pytest.mark.parametrize("classes", [2, 12])
def test_laplaces_cost_is_that_of_as_many_classes_as_it_says(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Law: a program over fewer rows than classes has all classes."""
    monkeypatch.syspath_prepend(str(FOLDER))
    program, _, _ = importlib.import_module("laplace_cost").bench(classes, 8, 4, "minilm")
    assert program.task.num_labels == classes


def test_intervals_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: rounds of one process have the interval of their median, and processes that differ widen it to hold both."""
    monkeypatch.syspath_prepend(str(FOLDER))
    pooled = importlib.import_module("step_time").pooled
    rounds = np.random.default_rng(0).normal(1.0, 0.01, 41).tolist()
    one, apart = pooled([rounds]), pooled([rounds, [1.1 + each - 1.0 for each in rounds]])
    error = 1.2533 * 0.01 / len(rounds) ** 0.5  # of a median of Normals
    assert abs(one["ratio"] - 1.0) < 4 * error and 2 * error < one["high"] - one["low"] < 6 * error
    assert apart["low"] < 1.01 and apart["high"] > 1.09 and apart["low"] < apart["ratio"] < apart["high"]


@pytest.mark.slow
def test_step_times(tmp_path: Path) -> None:
    """Law: over several processes there is a ratio with its interval for each method, and plain LoRA's own is 1."""
    options = ("--rounds", "1", "--steps", "2", "--processes", "2", "--methods", "MAP", "--no-memory")
    found = run("step_time", tmp_path / "steps.json", *options)
    assert found.keys() == {"plain LoRA", "MAP"} and found["plain LoRA"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert 0 < found["MAP"]["low"] <= found["MAP"]["ratio"] <= found["MAP"]["high"]


@pytest.mark.slow
def test_variance_of_gradients(tmp_path: Path) -> None:
    """Law: every kind has a ratio for each parameter, to that of one draw for the batch, whose own is 1."""
    found = run("gradient_variance", tmp_path / "variance.json", "--epochs", "1", "--batches", "1", "--draws", "3")
    assert found.keys() == {"weight", "example", "local", "flipout", "flipout, signs of inputs too"}
    for kind, row in found.items():
        assert row.keys() == {"μ of A", "G of A", "B", "head"}
        assert all(one["ratio"] == 1.0 if kind == "weight" else one["ratio"] > 0 for one in row.values())


def test_variances_are_those_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what is accumulated draw by draw is the unbiased variance, summed over the entries."""
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("gradient_variance")
    draws = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double() + 3
    monkeypatch.setattr(module, "gradients", lambda *_: iter({"B": draw} for draw in draws))
    found = module.variances(None, {}, "weight", len(draws))
    assert found["B"] == pytest.approx(float(draws.var(0).sum()))
