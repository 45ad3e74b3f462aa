"""Several processes on one fit: the joint batch, independent noise, one posterior, one writer."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from pyrolora.cli import main
from pyrolora.guides.base import Guide
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.sgld import SGLD
from pyrolora.guides.swag import SWAG
from pyrolora.inference import archive, processes
from pyrolora.inference.elbo import Objective
from pyrolora.inference.fit import fit
from pyrolora.inference.predict import NonFiniteError
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.inference.stream import predict_to_parquet
from tests.programs import sentence_task, tiny_program
from tests.recipes import write_recipe

ROOT = Path(__file__).parents[2]
GUIDES: dict[str, Guide] = {
    "MAP": MAP(),
    "MeanField": MeanField(),
    "BLoB": MeanField.blob(),
    "Inducing": Inducing(),
    "InputAdaptive": InputAdaptive(),
    "SWAG": SWAG(rank=2, num_models=3, start=0.25),
    "SGLD": SGLD(size=2, cycles=1),
    "Laplace": Laplace(precision=1.0, structure="diagonal"),
    "Laplace, λ by validation": Laplace(),
    "Ensemble": Ensemble(MAP(), 2),
}
NAMES = list(GUIDES)
SEEDS = range(16)


def work(out: Path, batch_size: int) -> None:
    """What one process does, alone or among several: fits, and what is left of them in files of its own."""
    evaluate = Objective.forward

    def spoilt(self: Objective, batch: Any) -> torch.Tensor:
        return evaluate(self, batch) * (float("nan") if processes.rank() == 1 else 1.0)

    record: dict[str, Any] = {"logs": {}}
    tensors = {}
    try:
        for name, guide in GUIDES.items():
            posterior = fit(tiny_program(), guide, args=arguments(out / "run" / name, batch_size))
            posterior.save_pretrained(out / name)
            record["logs"][name] = [row for row in posterior.history if "elbo" in row]
            tensors |= {f"{name}/{key}": value.clone() for key, value in posterior.guide.state_dict().items()}
            tensors[f"{name}/prediction"] = posterior.predict(sentence_task().test, 3).log_mean
        record["first"], tensors["noise"] = first_steps(out, batch_size)
        tensors |= {f"resumed/{key}": value.clone() for key, value in resumed(out / "resumed", batch_size).items()}
        if processes.count() > 1:
            Objective.forward = spoilt  # type: ignore[method-assign]
            with pytest.raises(NonFiniteError) as error:
                fit(tiny_program(), MAP(), args=arguments(out, batch_size))
            record["error"] = str(error.value)
    finally:
        Objective.forward = evaluate  # type: ignore[method-assign]
    save_file(tensors, out / f"rank{processes.rank()}.safetensors")
    (out / f"rank{processes.rank()}.json").write_text(json.dumps({**record, "count": processes.count()}))


def first_steps(out: Path, batch_size: int) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The logged terms of mean field's first step with one seed after another, and each step's standardised draws."""
    rows, noise, program = [], [], tiny_program()
    draws: list[torch.Tensor] = []
    sample = MeanField.forward

    def watched(self: MeanField, batch: Any = None) -> dict[str, torch.Tensor]:
        values = sample(self, batch)
        white = [
            (values[name] - self.loc[name.replace(".", "/")]) / self.log_scale[name.replace(".", "/")].exp()
            for name in ("lora.query.A", "lora.value.A")
        ]
        draws.append(torch.cat([each.detach().flatten() for each in white]))
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeanField, "forward", watched)
        for seed in SEEDS:
            options = arguments(out / "first", batch_size, max_steps=1, seed=seed)
            history = fit(program, MeanField(random="*", init_scale=0.25), args=options).history
            noise.append(draws[0])  # those that follow describe the fit, from draws that are the same everywhere
            draws.clear()
            rows.append({name: history[0][name] for name in ("data", "kl", "log_prior")})
    return rows, torch.stack(noise)


def resumed(folder: Path, batch_size: int) -> dict[str, torch.Tensor]:
    """The state of mean field's fit, whose second half begins at the checkpoint in the middle."""
    options = arguments(folder, batch_size, save_strategy="steps", save_steps=2)
    fit(tiny_program(), MeanField(), args=options)
    processes.wait()
    if processes.rank() == 0:
        shutil.rmtree(folder / "checkpoint-4")
    processes.wait()
    return fit(tiny_program(), MeanField(), args=options, resume=True).guide.state_dict()


def again(out: Path, recipe: Path, batch_size: int) -> None:
    """A fit of `work` once more, in other processes, and the command line's fit and predictions into a folder."""
    guide = GUIDES["MeanField"]
    posterior = fit(tiny_program(), guide, args=arguments(out / "run", batch_size))
    tensors = {f"MeanField/{name}": value.clone() for name, value in posterior.guide.state_dict().items()}
    tensors["MeanField/prediction"] = posterior.predict(sentence_task().test, 3).log_mean
    save_file(tensors, out / f"again{processes.rank()}.safetensors")
    command_line(out, recipe, batch_size)


def command_line(out: Path, recipe: Path, batch_size: int) -> None:
    training = ["--training.per_device_train_batch_size", str(batch_size), "--training.learning_rate", "0.01"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "write", functools.partial(_late, archive.write))  # the first process is behind
        main(["fit", str(recipe), "--guide", "MAP", "--output", str(out / "fitted"), *training])
        patch.setitem(predict_to_parquet.__kwdefaults__, "block_size", 5)  # else these few rows are one part
        main(["predict", str(out / "fitted"), str(recipe.parent / "test.jsonl"), "--output", str(out / "parts")])


def _late(function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    time.sleep(1)
    function(*arguments, **options)


def arguments(folder: Path, batch_size: int, **changes: Any) -> TrainingArguments:
    chosen: dict = {"max_steps": 4, "learning_rate": 1e-2, "disable_tqdm": True, "report_to": "none", "seed": 3}
    chosen |= {"save_strategy": "no", "logging_steps": 1, "use_cpu": True, "per_device_train_batch_size": batch_size}
    chosen |= changes
    return TrainingArguments(output_dir=str(folder), **chosen)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")


def launch(out: Path, task: str, launcher: tuple[str, ...]) -> None:
    """Two processes under a launcher, each of which does a task of this module."""
    script = out / "script.py"
    script.write_text(f"import pathlib, tests.inference.test_processes as t; out = pathlib.Path({str(out)!r}); {task}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of what one process and two other processes did: `again`."""
    folder = tmp_path_factory.mktemp("again")
    recipe = write_recipe(folder / "recipe")
    for name in ("one", "two"):
        (folder / name).mkdir()
    command_line(folder / "one", recipe, 8)
    launch(folder / "two", f"t.again(out, pathlib.Path({str(recipe)!r}), 4)", ACCELERATE)
    return folder / "one", folder / "two"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[dict[str, torch.Tensor]]]:
    """What one process found with batches of 8, and what each of two found with batches of 4."""
    folder = tmp_path_factory.mktemp("processes")
    one, two = folder / "one", folder / "two"
    two.mkdir()
    work(one, 8)
    launch(two, "t.work(out, 4)", TORCHRUN)
    files = [one / "rank0", two / "rank0", two / "rank1"]
    records = [json.loads(file.with_suffix(".json").read_text()) for file in files]
    written = sorted(path.name for path in (two / "MAP").iterdir())
    assert written == ["adapter_config.json", "posterior.json", "posterior.safetensors"]
    assert load_file(two / "last-good" / "posterior.safetensors")
    return records, [load_file(file.with_suffix(".safetensors")) for file in files]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(fitted) -> None:
    """Law: without noise (MAP) two processes with batches of 4 take the steps of one with batches of 8: the data term
    is scaled by the joint batch and log p(θ) counts once; the Laplace curvature at the end agrees too."""
    (one, two, _), (alone, first, _) = fitted
    assert (one["count"], two["count"]) == (1, 2)
    for name in ("MAP", "Laplace", "Ensemble"):
        for key in (key for key in alone if key.startswith(f"{name}/")):
            torch.testing.assert_close(
                first[key], alone[key], rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
        for mine, theirs in zip(two["logs"][name], one["logs"][name], strict=True):
            assert mine["elbo"] == pytest.approx(theirs["elbo"], rel=1e-5)
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    # Ten directions of 48 are kept here, and from which shares of the rows they are merged changes them a little.
    key = "Laplace, λ by validation/prediction"
    torch.testing.assert_close(first[key], alone[key], rtol=1e-2, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_divergences_count_once(fitted, name: str) -> None:
    """Law: at the first step the KL and log p(θ) are those of one process with the same rows: of global latent
    variables once, not once for each process, of local ones (α's) over all rows of the joint batch."""
    (one, two, _), _ = fitted
    mine, theirs = two["logs"][name][0], one["logs"][name][0]
    assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-5)
    assert mine["log_prior"] == pytest.approx(theirs["log_prior"], rel=1e-5)
    assert mine["kl"] or mine["log_prior"]


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on(fitted) -> None:
    """Law: two processes, stopped and started at a checkpoint, end with the bits of a run without a stop, each with
    noise of its own after it as before."""
    for tensors in fitted[1]:
        names = [key for key in tensors if key.startswith("resumed/")]
        assert len(names) > 2
        assert not [key for key in names if not torch.equal(tensors[key], tensors[f"MeanField/{key[8:]}"])]


@pytest.mark.slow
def test_all_processes_have_one_posterior(fitted) -> None:
    """Law: parameters, buffers, and predictions are the same bits in every process."""
    _, (_, first, second) = fitted
    assert first.keys() == second.keys()
    different = [key for key in first if key != "noise" and not torch.equal(first[key], second[key])]
    assert not different


@pytest.mark.slow
def test_noise_is_each_processes_own(fitted) -> None:
    """Law: the draws of two processes in one step are uncorrelated standard Normals, and so are those of two steps and
    those that one process alone has; the correlation of n numbers is within 4/√n of zero."""
    _, found = fitted
    alone, first, second = (tensors["noise"] for tensors in found)
    pairs = [(first, second), (alone, first), (alone, second)]
    pairs += [(own[1:], other[:-1]) for own in (alone, first, second) for other in (alone, first, second)]
    for own, other in pairs:
        correlation = torch.corrcoef(torch.stack([own.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / own.numel() ** 0.5
        for noise in (own, other):
            assert abs(noise.mean()) < 4 / noise.numel() ** 0.5
            assert abs(noise.square().mean() - 1) < 4 * (2 / noise.numel()) ** 0.5


@pytest.mark.slow
def test_the_objective_with_noise_is_the_same_in_expectation(fitted) -> None:
    """Law: at mean field's first step the KL is that of one process, and the data term, with each process's noise, has
    that of one process with the same rows as its mean: over seeds the difference is within four standard errors of
    zero, of which ten are less than the term itself."""
    (one, two, _), _ = fitted
    for mine, theirs in zip(two["first"], one["first"], strict=True):
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=1e-6)
        assert mine["log_prior"] == pytest.approx(theirs["log_prior"], rel=1e-6, abs=1e-6)
    data = [torch.tensor([row["data"] for row in record["first"]]) for record in (one, two)]
    difference = data[1] - data[0]
    error = difference.std() / len(difference) ** 0.5
    assert 0 < 10 * error < data[0].mean().abs()
    assert abs(difference.mean()) < 4 * error


@pytest.mark.slow
def test_two_runs_are_the_same_bits(fitted, second) -> None:
    """Law: two processes started again, by accelerate and beside other work, fit and predict to the bit what they did
    under torchrun."""
    before = fitted[1][1]
    for rank in range(2):
        tensors = load_file(second[1] / f"again{rank}.safetensors")
        assert len(tensors) > 2
        assert not [name for name, value in tensors.items() if not torch.equal(value, before[name])]


@pytest.mark.slow
def test_the_command_line_in_two_processes(second) -> None:
    """Law: `fit` and `predict --output FOLDER` under accelerate write what they write alone: one posterior, whose steps
    are those of the joint batch, and every part once, with the same rows and probabilities."""
    alone, together = (load_file(folder / "fitted" / "posterior.safetensors") for folder in second)
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-5)
    parts = [sorted(path.name for path in (folder / "parts").iterdir()) for folder in second]
    assert parts[0] == parts[1] == [f"part-{i:05d}.parquet" for i in range(3)]
    tables = [pd.read_parquet(folder / "parts") for folder in second]
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=1e-3, atol=1e-5)
    assert not list(second[1].rglob("*.new")) and len(tables[0]) == 12


@pytest.mark.slow
def test_the_log_is_of_all_processes(fitted) -> None:
    """Law: every process logs the same terms, and they add up to the loss, which is a mean over processes."""
    (_, first, second), _ = fitted
    for name in NAMES:
        assert [row["elbo"] for row in first["logs"][name]] == [row["elbo"] for row in second["logs"][name]]
        for row in first["logs"][name]:
            assert row["objective"] == pytest.approx(-row["loss"], rel=1e-3)


@pytest.mark.slow
def test_nan_in_one_process_stops_all(fitted) -> None:
    """Law: where one process has NaN every process stops with an error, and the last good state is on disk."""
    (_, first, second), _ = fitted
    assert (
        "not finite in another process" in first["error"] and "step 1: the objective is not finite" in second["error"]
    )


def test_a_process_that_is_alone() -> None:
    """Law: without a process group there is one process, which waits for nobody and keeps its random state."""
    assert (processes.rank(), processes.count()) == (0, 1)
    processes.wait()
    with isolated(0):
        expected = torch.rand(3)
    with isolated(0), processes.own_noise():
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_own_noise_by_hand(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Law: inside, process r draws from seed spawn(s, r), s from the shared state, which moves on by one number."""
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: rank)
    with isolated(0):
        seed, after = int(torch.randint(2**62, ())), torch.rand(2)
    with isolated(spawn(seed, rank)):
        own = torch.rand(3)
    with isolated(0):
        with processes.own_noise():
            assert torch.equal(torch.rand(3), own)
        assert torch.equal(torch.rand(2), after)


def test_work_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: under a launcher with several processes it stops and says what to do instead; under one it goes on."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a comparison is the work of one process, not of 2: start it alone"):
        processes.refuse("a comparison", "start it alone")
    monkeypatch.setenv("WORLD_SIZE", "1")
    processes.refuse("a comparison", "start it alone")


def test_launched_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a launcher's environment says who and how many; without one a process is alone."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.launched() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.launched() == (3, 4)


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: each process on a machine has an accelerator of its own; without one it computes on the CPU."""
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert processes.device() == torch.device("cuda:2")
    monkeypatch.delenv("LOCAL_RANK")
    assert processes.device() == torch.device("cuda:0")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert processes.device() == torch.device("cpu")
