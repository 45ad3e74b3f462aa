from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyrolora.diagnostics import experiment
from pyrolora.diagnostics.compare import MAIN, evaluate_posterior, fit_scaling
from pyrolora.diagnostics.experiment import check_methods, load, prepare, run, table
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.priors.flat import Flat
from pyrolora.recipe import Recipe, RecipeError
from pyrolora.report.html import render
from tests.recipes import CONTENT, write_recipe

METHODS = ["MAP", "MeanField"]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The guides really fitted, in order."""
    done: list[str] = []

    def counted(program: Any, guide: Any, **options: Any) -> Posterior:
        flat = all(isinstance(prior, Flat) for prior in program.priors.values())
        done.append("LoRA" if flat else type(guide).__name__)
        return fit(program, guide, **options)

    monkeypatch.setattr(experiment, "fit", counted)
    return done


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole comparison: its folder and its results. Read only."""
    output = tmp_path_factory.mktemp("compare")
    return output, run(Recipe.read(recipe), METHODS, seeds=[0, 1], output=output, num_draws=4)


def go(path: Path, output: Path, methods: list[str] | None = None, **options: Any) -> dict[str, Any]:
    return run(Recipe.read(path), methods or ["MAP"], **{"seeds": [0], "num_draws": 2, **options}, output=output)


def test_plain_lora_is_the_baseline_and_first() -> None:
    """Law: LoRA comes first, once, whatever else is asked for; unknown names list the right ones."""
    assert check_methods(["MeanField", "MAP", "MeanField"]) == ["LoRA", "MeanField", "MAP"]
    assert check_methods(["MAP", "LoRA"]) == ["LoRA", "MAP"]
    with pytest.raises(RecipeError, match=r"'Meanfield'; there are LoRA, MAP, Inducing, Laplace, MeanField"):
        check_methods(["Meanfield"])


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
    assert {"title", "task", "settings", "cells", "format", "baseline"} == results.keys()
    for cell in results["cells"]:
        assert cell["cost"].keys() == {"fit_seconds", "predict_seconds", "parameters", "passes"}
        assert cell["description"] and cell["cost"]["fit_seconds"] > 0
        assert cell["cost"]["passes"] == (4 if cell["method"] == "MeanField" else 1)
        assert all(example["text"] and example["draws"] for example in cell["examples"])
    page = render(results)
    for text in ("LoRA", "MAP", "MeanField", "far", "Normal(scale=0.1)", "an independent Normal for every weight"):
        assert text in page


def test_progress_is_told(recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Law: each fit is announced with its number, method and seed."""
    with caplog.at_level(logging.INFO, logger="pyrolora"):
        go(recipe, tmp_path, seeds=[3])
    assert "[1/2] LoRA, seed 3: fitting" in caplog.messages
    assert "[2/2] MAP, seed 3: fitting" in caplog.messages


def test_finished_fits_are_not_repeated(recipe: Path, tmp_path: Path, fits: list[str]) -> None:
    """Law: called again, only what is new is fitted, and old results stay to the digit."""
    first = go(recipe, tmp_path)
    assert fits == ["LoRA", "MAP"]
    more = go(recipe, tmp_path, METHODS, seeds=[0, 1])
    assert fits == ["LoRA", "MAP", "MeanField", "LoRA", "MAP", "MeanField"]
    assert [cell for cell in more["cells"] if cell["seed"] == 0 and cell["method"] != "MeanField"] == first["cells"]


def test_a_damaged_cell_is_fitted_again(recipe: Path, tmp_path: Path, fits: list[str]) -> None:
    """Law: a cell file that is truncated, foreign or of another experiment counts for nothing."""
    whole = go(recipe, tmp_path, ["LoRA"])
    path = tmp_path / "cells" / "LoRA-seed0.json"
    for text in (path.read_text()[:-9], "[]", '{"key": "another", "cells": []}'):
        fits.clear()
        path.write_text(text)
        again = go(recipe, tmp_path, ["LoRA"])
        assert fits == ["LoRA"]
        assert [cell["metrics"] for cell in again["cells"]] == [cell["metrics"] for cell in whole["cells"]]


def test_what_a_cell_depends_on(tmp_path: Path, fits: list[str]) -> None:
    """Law: another prior, data row or number of draws fits anew; another guide's options do not."""
    folder, output = tmp_path / "recipe", tmp_path / "out"
    go(write_recipe(folder), output, ["LoRA"])
    go(write_recipe(folder, guides={"MeanField": {"init_scale": 0.5}}), output, ["LoRA"])
    assert len(fits) == 1
    go(write_recipe(folder, priors={**CONTENT["priors"], "*.A": "Flat"}), output, ["LoRA"])
    assert len(fits) == 2
    go(write_recipe(folder, priors={**CONTENT["priors"], "*.A": "Flat"}), output, ["LoRA"], num_draws=3)
    assert len(fits) == 3
    with (folder / "test.jsonl").open("a") as file:
        file.write('{"text": "a warm house", "label": 1}\n')
    go(write_recipe(folder, priors={**CONTENT["priors"], "*.A": "Flat"}), output, ["LoRA"], num_draws=3)
    assert len(fits) == 4


def test_an_interruption_keeps_what_is_finished(
    recipe: Path, tmp_path: Path, fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: killed in its third fit, a comparison can be reported as far as it came, and goes on from there."""
    counted = experiment.fit

    def killed(*arguments: Any, **options: Any) -> Posterior:
        if len(fits) == 2:
            raise KeyboardInterrupt
        return counted(*arguments, **options)

    monkeypatch.setattr(experiment, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        go(recipe, tmp_path, METHODS)
    part = json.loads((tmp_path / "results.json").read_text())
    assert {cell["method"] for cell in part["cells"]} == {"LoRA", "MAP"}
    assert "MAP" in render(part)
    monkeypatch.setattr(experiment, "fit", counted)
    assert len(go(recipe, tmp_path, METHODS)["cells"]) == 6
    assert fits == ["LoRA", "MAP", "MeanField"]


def test_stops_before_the_first_fit(tmp_path: Path, fits: list[str]) -> None:
    """Law: a wrong guide, a wrong option, a missing split and a task without classes stop before anything is fitted."""
    arguments = dict(CONTENT["task"]["init_args"])
    path = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="unknown guide 'Laplac'"):
        go(path, tmp_path / "out", ["Laplac"])
    path = write_recipe(tmp_path, guides={"MeanField": {"noise": "none"}})
    with pytest.raises(RecipeError, match='noise is "weight" or "example"'):
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


def test_load_is_the_inverse_of_save(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Law: posterior and task come back from the folder; a folder without a recipe is named."""
    posterior, task = load(finished[0] / "MeanField-seed1")
    assert posterior.seed == 1 and posterior.program.task is task and len(task.train) == 24
    with pytest.raises(RecipeError, match=r"no recipe\.yaml there"):
        load(tmp_path)


def test_prepare_keeps_checkpoints_of_the_same_fit_only(tmp_path: Path) -> None:
    """Law: older checkpoints go unless the same fit is resumed; another's are not resumed."""
    folder = tmp_path / "checkpoints"
    prepare(folder, {"seed": 0}, False)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    prepare(folder, {"seed": 0}, True)
    assert (folder / "checkpoint-1").exists()
    with pytest.raises(RecipeError, match="another recipe, guide or seed"):
        prepare(folder, {"seed": 1}, True)
    prepare(folder, {"seed": 1}, False)
    assert not (folder / "checkpoint-1").exists() and json.loads((folder / "fit.json").read_text()) == {"seed": 1}


def test_table_has_means_over_seeds(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: the plain table has a row for each method and split: means over seeds, as fitted and scaled; null is ∞."""
    _, results = finished
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines if line] == [
        word for split in ("test:", "far:") for word in (split, "accuracy", "LoRA", "MAP", "MeanField")
    ]
    cells = [c for c in results["cells"] if (c["method"], c["split"]) == ("MeanField", "test")]
    means = [
        f"{sum(cell[kind][metric]['value'] for cell in cells) / 2:.3f}"
        for metric in MAIN
        for kind in ("metrics", "scaled_metrics")
    ]
    assert lines[4].replace("→", "").split()[1:] == means
    broken = copy.deepcopy(results)
    broken["cells"][0]["metrics"]["nll"]["value"] = None
    assert "inf" in table(broken)
