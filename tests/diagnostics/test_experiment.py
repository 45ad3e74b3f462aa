from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyrolora.construct import RecipeError
from pyrolora.diagnostics import cells
from pyrolora.diagnostics.evaluation import MAIN, evaluate_posterior, fit_scaling
from pyrolora.diagnostics.experiment import plan, run
from pyrolora.guides.sgld import SGLD
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.processes import rank
from pyrolora.priors.flat import Flat
from pyrolora.recipe import Recipe
from pyrolora.report.html import render
from tests.recipes import CONTENT, write_recipe

METHODS = ["MAP", "MeanField"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The guides really fitted, in order."""
    done: list[str] = []

    def counted(program: Any, guide: Any, **options: Any) -> Posterior:
        flat = all(isinstance(prior, Flat) for prior in program.priors.values())
        done.append("LoRA" if flat else type(guide).__name__)
        return fit(program, guide, **options)

    monkeypatch.setattr(cells, "fit", counted)
    return done


def go(path: Path, output: Path, methods: list[str] | None = None, **options: Any) -> dict[str, Any]:
    return run([Recipe.read(path)], methods or ["MAP"], **{"seeds": [0], "num_draws": 2, **options}, output=output)


def names(*recipes: Recipe, guides: tuple[str, ...] = ("MAP",), **options: Any) -> list[str]:
    return [method.name for method in plan(recipes, guides, **options)]


def test_plain_lora_is_first(recipe: Path) -> None:
    """Law: LoRA comes first, once, whatever else is asked for; unknown names list the right ones."""
    one = Recipe.read(recipe)
    assert names(one, guides=("MeanField", "MAP", "MeanField")) == ["LoRA", "MeanField", "MAP"]
    assert names(one, guides=("MAP", "LoRA")) == ["LoRA", "MAP"]
    with pytest.raises(RecipeError, match=r"'Meanfield'; there are LoRA, MAP, NUTS, SGLD"):
        names(one, guides=("Meanfield",))
    with pytest.raises(RecipeError, match="nothing to compare"):
        names()


def test_several_recipes_are_told_apart(tmp_path: Path) -> None:
    """Law: methods of several recipes bear the recipe's name; plain LoRA is repeated only where it is another one, and
    two files of one name are refused."""
    first = Recipe.read(write_recipe(tmp_path))
    narrow = replace(first, priors={"*": "Flat"}, path=tmp_path / "narrow.yaml")
    longer = replace(first, training={"max_steps": 9}, path=tmp_path / "longer.yaml")
    assert names(first, narrow, longer) == ["tiny: LoRA", "tiny: MAP", "narrow: MAP", "longer: LoRA", "longer: MAP"]
    with pytest.raises(RecipeError, match="two methods are called 'tiny-MAP'"):
        names(first, replace(narrow, path=tmp_path / "elsewhere" / "tiny.yaml"))


def test_recipes_bring_their_guides(tmp_path: Path) -> None:
    """Law: where no guides are named, each recipe is compared with those that it configures; with posteriors, none."""
    first = replace(Recipe.read(write_recipe(tmp_path)), guides={"MAP": {}, "LoRA": {}})
    second = replace(first, guides={"cold": {"class_path": "MeanField"}}, path=tmp_path / "second.yaml")
    assert names(first, second, guides=()) == ["tiny: LoRA", "tiny: MAP", "second: cold"]
    assert names(first, guides=("MeanField",)) == ["LoRA", "MeanField"]
    with pytest.raises(RecipeError, match=r"third\.yaml: nothing would be fitted but plain LoRA"):
        names(first, replace(first, guides={}, path=tmp_path / "third.yaml"), guides=())


def test_every_method_seed_and_labelled_split_is_a_cell(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: cells are methods × seeds × labelled splits; a split whose labels are unknown is left out."""
    _, results = finished
    found = [(cell["method"], cell["seed"], cell["split"]) for cell in results["cells"]]
    assert sorted(found) == sorted((m, s, x) for m in ["LoRA", *METHODS] for s in (0, 1) for x in ("test", "far"))
    assert results["baseline"] == "LoRA" == results["cells"][0]["method"]
    assert results["task"]["splits"] == {"train": 24, "validation": 16, "test": 12, "far": 6, "unknown": 1}


def test_the_baseline_has_no_priors(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: the baseline's program is flat everywhere, the others have the declared priors."""
    output, _ = finished
    priors = json.loads((output / "LoRA-seed0" / "posterior.json").read_text())["priors"]
    assert priors == {"*": {"class": "priors.Flat", "init": {}}}
    assert json.loads((output / "MAP-seed0" / "posterior.json").read_text())["priors"].keys() == {
        "*.A",
        "*.B",
        "head.*",
    }


def test_results_are_those_of_the_saved_posterior(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: a posterior loaded from its folder gives the numbers of its cell again, with τ from the validation split."""
    output, results = finished
    folder = output / "MeanField-seed0"
    recipe = Recipe.read(folder / "recipe.yaml")
    task = recipe.build_task()
    posterior = Posterior.from_pretrained(folder, recipe.load_base(task, seed=0), task=task)
    assert task.validation is not None and task.test is not None
    scaling = fit_scaling(posterior, task.validation, num_draws=4)
    assert scaling != pytest.approx(fit_scaling(posterior, task.test, num_draws=4), rel=0.01)
    for split, data in (("test", task.test), ("far", task.ood["far"])):
        (cell,) = (c for c in results["cells"] if (c["method"], c["seed"], c["split"]) == ("MeanField", 0, split))
        again = evaluate_posterior(posterior, data, scaling=scaling, num_draws=4).to_dict()
        assert cell["scaling"] == pytest.approx(scaling)
        for metric in MAIN:
            assert cell["metrics"][metric]["value"] == pytest.approx(again["metrics"][metric]["value"])
            assert cell["scaled_metrics"][metric]["value"] == pytest.approx(again["scaled_metrics"][metric]["value"])


def test_results_have_the_form_of_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: what is returned is what results.json holds, and the report renders every method, split and prior of it."""
    output, results = finished
    assert json.loads((output / "results.json").read_text()) == results
    keys = {"title", "task", "settings", "cells", "format", "baseline", "contrasts", "examples", "heatmaps", "failed"}
    assert keys == results.keys()
    for cell in results["cells"]:
        assert cell["cost"].keys() == {"fit_seconds", "fit_memory", "predict_seconds", "parameters", "passes"}
        assert cell["description"] and cell["cost"]["fit_seconds"] > 0
        assert cell["cost"]["passes"] == (4 if cell["method"] == "MeanField" else 1)
    page = render(results)
    for text in ("LoRA", "MAP", "MeanField", "far", "Normal(scale=0.1)", "an independent Normal for every weight"):
        assert text in page


def test_progress_is_told(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Law: each fit is announced with its number, method and seed."""
    with caplog.at_level(logging.INFO, logger="pyrolora"):
        go(recipe, tmp_path, seeds=[3])
        go(recipe, tmp_path, seeds=[3])
    assert "[1/2] LoRA, seed 3: fitting" in caplog.messages
    assert "[2/2] MAP, seed 3: fitting" in caplog.messages
    assert "MAP, seed 3: finished before" in caplog.messages


def test_finished_fits_are_not_repeated(recipe: Path, tmp_path: Path, fits: list[str]) -> None:
    """Law: called again, only what is new is fitted, and old results stay to the digit."""
    first = go(recipe, tmp_path)
    assert fits == ["LoRA", "MAP"]
    more = go(recipe, tmp_path, METHODS, seeds=[0, 1])
    assert fits == ["LoRA", "MAP", "MeanField", "LoRA", "MAP", "MeanField"]
    assert [cell for cell in more["cells"] if cell["seed"] == 0 and cell["method"] != "MeanField"] == first["cells"]


def test_what_is_damaged_is_made_again(recipe: Path, tmp_path: Path, fits: list[str]) -> None:
    """Law: a cell file that is truncated, foreign or of another experiment counts for nothing, and is made again from
    the posterior; a damaged posterior is fitted again."""
    whole = go(recipe, tmp_path)
    path = tmp_path / "cells" / "LoRA-seed0.json"
    for text in (path.read_text()[:-9], "[]", '{"key": "another", "cells": []}'):
        fits.clear()
        path.write_text(text)
        again = go(recipe, tmp_path)
        assert fits == []
        assert [cell["metrics"] for cell in again["cells"]] == [cell["metrics"] for cell in whole["cells"]]
    for damaged in (path.with_suffix(".safetensors"), tmp_path / "LoRA-seed0" / "posterior.safetensors"):
        damaged.write_bytes(damaged.read_bytes()[:-9])
    path.unlink()
    again = go(recipe, tmp_path)
    assert fits == ["LoRA"]
    assert [cell["metrics"] for cell in again["cells"]] == [cell["metrics"] for cell in whole["cells"]]


def test_what_a_fit_and_an_evaluation_depend_on(tmp_path: Path, fits: list[str]) -> None:
    """Law: another prior or training row fits anew, LoRA only for the row; another test row or number of draws only
    evaluates anew; another guide's options do neither."""
    folder, output = tmp_path / "recipe", tmp_path / "out"
    first = go(write_recipe(folder), output)

    def change(fitted: list[str], evaluated: bool = True, **changes: Any) -> None:
        nonlocal first
        fits.clear()
        options = {"num_draws": changes.pop("num_draws", 2)}
        again = go(write_recipe(folder, **changes), output, **options)
        assert fits == fitted
        cost = [[cell["cost"]["predict_seconds"] for cell in results["cells"]] for results in (first, again)]
        assert (cost[0] != cost[1]) == evaluated
        first = again

    change([], evaluated=False, guides={"MeanField": {"init_scale": 0.5}})
    other = {**CONTENT["priors"], "*.A": "Flat"}
    change(["MAP"], priors=other)
    change([], priors=other, num_draws=3)
    for split, fitted in (("test", []), ("train", ["LoRA", "MAP"])):
        with (folder / f"{split}.jsonl").open("a") as file:
            file.write('{"text": "a warm house", "label": 1}\n')
        change(fitted, priors=other)


def test_an_interruption_keeps_what_is_finished(
    recipe: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: killed in its third fit, a comparison can be reported as far as it came, and goes on from there."""
    counted = cells.fit

    def killed(*arguments: Any, **options: Any) -> Posterior:
        if len(fits) == 2:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    monkeypatch.setattr(cells, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        go(recipe, tmp_path, METHODS)
    part = json.loads((tmp_path / "results.json").read_text())
    assert {cell["method"] for cell in part["cells"]} == {"LoRA", "MAP"}
    assert "MAP" in render(part)
    monkeypatch.setattr(cells, "fit", counted)
    assert len(go(recipe, tmp_path, METHODS)["cells"]) == 6
    assert fits == ["LoRA", "MAP", "MeanField"]


@pytest.mark.parametrize("broken", ["MAP", "LoRA"])
def test_a_failing_fit_stops_no_other(
    broken: str, recipe: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: of a cell that fails the results hold the message, and all other cells; called again, it alone is tried."""
    counted = cells.fit

    def failing(*arguments: Any, **options: Any) -> Posterior:
        posterior = counted(*arguments, **options)
        if fits[-1] == broken:
            raise FloatingPointError("no number")
        return posterior

    monkeypatch.setattr(cells, "fit", failing)
    results = go(recipe, tmp_path, METHODS)
    assert {cell["method"] for cell in results["cells"]} == {"LoRA", *METHODS} - {broken}
    assert results["failed"] == {f"{broken}-seed0": "no number"}
    assert json.loads((tmp_path / "results.json").read_text())["failed"] == results["failed"]
    assert f"because they failed: {broken}-seed0." in render(results)
    monkeypatch.setattr(cells, "fit", counted)
    fits.clear()
    again = go(recipe, tmp_path, METHODS)
    assert fits == [broken] and again["failed"] == {} and len(again["cells"]) == 6


@pytest.mark.slow
def test_killed_and_called_again(recipe: Path, tmp_path: Path, fits: list[str]) -> None:
    """Law: after a SIGKILL the results on disk are whole, and called again the comparison ends with the numbers of one
    that nothing happened to, without another fit of what was finished."""
    whole = go(recipe, tmp_path / "whole", METHODS, seeds=[0, 1])
    fits.clear()
    command = [sys.executable, "-W", "ignore", "-m", "pyrolora.cli", "compare", str(recipe), "--guides", *METHODS]
    command += ["--seeds", "2", "--draws", "2", "--output", str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "cells" / "MeanField-seed0.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    part = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert {cell["method"] for cell in part["cells"]} >= {"LoRA", "MAP"}
    again = go(recipe, tmp_path / "killed", METHODS, seeds=[0, 1])
    assert len(fits) <= 3 and "LoRA" not in fits[1:]
    for found, expected in zip(again["cells"], whole["cells"], strict=True):
        assert (found["method"], found["seed"], found["split"]) == tuple(
            expected[k] for k in ("method", "seed", "split")
        )
        assert found["metrics"]["nll"]["value"] == pytest.approx(expected["metrics"]["nll"]["value"], rel=1e-4)


def launched(output: Path, path: Path) -> None:
    """What each of two processes does: a comparison, one of whose evaluations fails; what it found in a file."""
    fits, evaluations = [], []
    build, layers = cells.fit, cells._layers

    def counted(program: Any, guide: Any, **options: Any) -> Posterior:
        fits.append(type(guide).__name__)
        return build(program, guide, **options)

    def spoilt(posterior: Posterior, num_draws: int) -> list[dict[str, Any]]:
        evaluations.append(type(posterior.guide).__name__)
        if isinstance(posterior.guide, SGLD):
            raise FloatingPointError("no layers today")
        return layers(posterior, num_draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "fit", counted)
        patch.setattr(cells, "_layers", spoilt)
        results = go(path, output, ["MAP", "MeanField", "SGLD"])
    with pytest.raises(RecipeError, match=r"--processes 2 with 2 launched processes"):
        go(path, output, processes=2)
    record = {"results": results, "fits": fits, "evaluations": evaluations}
    (output / f"rank{rank()}.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_launched_processes_share_the_work(recipe: Path, tmp_path: Path) -> None:
    """Law: two launched processes make every fit together, once, as one process with the joint batch would; each
    evaluation is one's; both know all results, also what failed in the other; called again only that is done."""
    half = yaml.safe_load(recipe.read_text())
    half["training"]["per_device_train_batch_size"] = 4
    path = recipe.with_name("half.yaml")
    path.write_text(yaml.safe_dump(half))
    half["training"]["per_device_train_batch_size"] = 8
    whole = recipe.with_name("whole.yaml")
    whole.write_text(yaml.safe_dump(half))
    code = "import sys, pathlib, tests.diagnostics.test_experiment as t; t.launched(*map(pathlib.Path, sys.argv[1:]))"
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    records = []
    for _ in range(2):
        done = subprocess.run(
            [*command, str(tmp_path / "out"), str(path)], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        records.append([json.loads((tmp_path / "out" / f"rank{i}.json").read_text()) for i in (0, 1)])
    (first, second), again = records
    assert first["fits"] == second["fits"] == ["MAP", "MAP", "MeanField", "SGLD"]
    assert (first["evaluations"], second["evaluations"]) == (["MAP", "MeanField"], ["MAP", "SGLD"])
    assert first["results"] == second["results"] and first["results"]["failed"] == {"SGLD-seed0": "no layers today"}
    assert [record["fits"] for record in again] == [[], []]
    assert [record["evaluations"] for record in again] == [["SGLD"], []]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == again[0]["results"]
    alone = go(whole, tmp_path / "alone")
    for one, two in zip(alone["cells"], first["results"]["cells"], strict=False):
        assert (one["method"], one["split"]) == (two["method"], two["split"])
        assert two["metrics"]["nll"]["value"] == pytest.approx(one["metrics"]["nll"]["value"], rel=1e-4)


def test_stops_before_the_first_fit(tmp_path: Path, fits: list[str]) -> None:
    """Law: a wrong guide, a wrong option, a missing split and a task without classes stop before anything is fitted."""
    arguments = dict(CONTENT["task"]["init_args"])
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="unknown guide 'Laplac'"):
        go(path, tmp_path / "out", ["Laplac"])
    with pytest.raises(RecipeError, match="the baseline 'MeanField' is none of the methods LoRA, MAP"):
        go(path, tmp_path / "out", baseline="MeanField")
    with pytest.raises(RecipeError, match="--processes is at least 1"):
        go(path, tmp_path / "out", processes=0)
    with pytest.raises(RecipeError, match="nothing would be fitted but plain LoRA"):
        run([Recipe.read(path)], [], seeds=[0], output=tmp_path / "out")
    path = write_recipe(tmp_path, guides={"MeanField": {"noise": "none"}})
    with pytest.raises(RecipeError, match="noise is one of weight, example"):
        go(path, tmp_path / "out", METHODS)
    for split in ("validation", "test"):
        left = {name: value for name, value in arguments.items() if name != split}
        path = write_recipe(tmp_path, task={"class_path": "SequenceClassification", "init_args": left})
        with pytest.raises(RecipeError, match=f"needs a {split} split"):
            go(path, tmp_path / "out")
    task = {"class_path": "SequenceClassification", "init_args": {**arguments, "regression": True}}
    with pytest.raises(RecipeError, match="scores classes"):
        go(write_recipe(tmp_path, task=task), tmp_path / "out")
    assert fits == [] and not (tmp_path / "out").exists()


def test_recipe_beside_each_posterior_stands_alone(finished: tuple[Path, dict[str, Any]], recipe: Path) -> None:
    """Law: the recipe saved with a posterior says the same as the original, with paths that hold anywhere."""
    output, _ = finished
    saved = Recipe.read(output / "MAP-seed0" / "recipe.yaml")
    assert saved.content() == Recipe.read(recipe).content()
    assert Path(yaml.safe_load((output / "MAP-seed0" / "recipe.yaml").read_text())["base"]).is_absolute()


def test_another_baseline(recipe: Path, tmp_path: Path) -> None:
    """Law: any method can be the baseline; the others are compared with it, LoRA too."""
    results = go(recipe, tmp_path, baseline="MAP")
    assert results["baseline"] == "MAP"
    found = {(each["method"], each["baseline"]) for each in results["contrasts"]}
    assert found == {("LoRA", "MAP"), ("MAP", "MAP")}


def test_saved_posteriors_are_evaluated_as_they_are(
    finished: tuple[Path, dict[str, Any]], recipe: Path, tmp_path: Path, fits: list[str]
) -> None:
    """Law: posteriors from folders have the numbers of the comparison that fitted them, beside new fits or alone."""
    output, before = finished
    folders = [output / "LoRA-seed0", output / "MeanField-seed1"]
    alone = run([], [], seeds=[], output=tmp_path / "alone", posteriors=folders, num_draws=4)
    assert fits == []
    assert alone["baseline"] == "LoRA-seed0" and alone["settings"]["recipes"] == []
    assert [(cell["method"], cell["seed"]) for cell in alone["cells"] if cell["split"] == "test"] == [
        ("LoRA-seed0", 0),
        ("MeanField-seed1", 1),
    ]
    for cell in alone["cells"]:
        name = f"{cell['method']}"
        (old,) = (
            c for c in before["cells"] if f"{c['method']}-seed{c['seed']}" == name and c["split"] == cell["split"]
        )
        for metric in MAIN:
            assert cell["metrics"][metric]["value"] == pytest.approx(old["metrics"][metric]["value"])
        assert cell["cost"]["fit_seconds"] == old["cost"]["fit_seconds"]
    both = go(recipe, tmp_path / "both", ["MAP"], posteriors=folders[1:])
    assert fits == ["LoRA", "MAP"]
    assert [cell["method"] for cell in both["cells"] if cell["split"] == "test"] == ["MeanField-seed1", "LoRA", "MAP"]
    with pytest.raises(RecipeError, match=r"no recipe\.yaml there"):
        run([], [], seeds=[], output=tmp_path / "x", posteriors=[tmp_path])


def test_other_data_are_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path, fits: list[str]) -> None:
    """Law: recipes and posteriors whose test data differ are not compared; training data may differ."""
    path = write_recipe(tmp_path / "other")
    with (tmp_path / "other" / "train.jsonl").open("a") as file:
        file.write('{"text": "a warm house", "label": 1}\n')
    folder = finished[0] / "MAP-seed0"
    go(path, tmp_path / "out", posteriors=[folder])
    with (tmp_path / "other" / "test.jsonl").open("a") as file:
        file.write('{"text": "a warm house", "label": 1}\n')
    fits.clear()
    with pytest.raises(RecipeError, match="numbers on different examples cannot be compared"):
        go(path, tmp_path / "out", posteriors=[folder])
    assert fits == []


@pytest.mark.slow
def test_processes_change_no_number(recipe: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Law: two processes at once write the same cells as one."""
    _, before = finished
    after = run([Recipe.read(recipe)], ["MAP"], seeds=[0], output=tmp_path, num_draws=4, processes=2)
    for cell in after["cells"]:
        (old,) = (c for c in before["cells"] if all(c[k] == cell[k] for k in ("method", "seed", "split")))
        for metric, estimate in cell["metrics"].items():
            assert estimate["value"] == pytest.approx(old["metrics"][metric]["value"], rel=1e-5)
    assert len(after["cells"]) == 4 and "TQDM_DISABLE" not in os.environ
