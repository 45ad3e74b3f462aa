from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyrolora.diagnostics import cells
from pyrolora.diagnostics.cells import Cell, Method
from pyrolora.guides.map import MAP
from pyrolora.inference.archive import write_json
from pyrolora.recipe import Recipe
from pyrolora.tasks.base import Task
from tests.recipes import CONTENT, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.read(write_recipe(tmp_path_factory.mktemp("recipe"), temperature={"MeanField": 0.3}))


@pytest.fixture(scope="module")
def task(recipe: Recipe) -> Task:
    return recipe.build_task()


@pytest.fixture(scope="module")
def finished(recipe: Recipe, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Cell:
    """A computed cell of mean field. Read only."""
    output = tmp_path_factory.mktemp("out")
    (output / "cells").mkdir()
    cell = Cell(Method("MeanField", "MeanField", recipe), 1, 4, output)
    cells.compute(cell, task)
    return cell


def test_methods_describe_themselves(recipe: Recipe, finished: Cell) -> None:
    """Law: LoRA is MAP at β = 1, other guides are the recipe's with its β; a saved posterior has its own β."""
    lora, field = Method("LoRA", "LoRA", recipe), Method("x", "MeanField", recipe)
    assert isinstance(lora.build_guide(), MAP) and lora.temperature == 1.0
    assert (field.temperature, type(field.build_guide()).__name__) == (0.3, "MeanField")
    assert "no priors" in lora.description and "independent Normal" in field.description
    saved = replace(field, recipe=replace(recipe, temperature=0.9), folder=finished.folder)
    assert saved.temperature == 0.3


def test_names_are_names_of_files(recipe: Recipe, tmp_path: Path) -> None:
    """Law: whatever a method is called, its files have a plain name; a saved posterior stays in its own folder."""
    cell = Cell(Method("a/b: MAP", "MAP", recipe), 3, 4, tmp_path)
    assert cell.name == "a-b-MAP-seed3" and cell.folder == tmp_path / "a-b-MAP-seed3"
    assert cell.path == tmp_path / "cells" / "a-b-MAP-seed3.json"
    assert replace(cell, method=replace(cell.method, folder=Path("runs/map"))).folder == Path("runs/map")


def test_a_record_gives_back_what_was_computed(finished: Cell, task: Task) -> None:
    """Law: a finished cell has an entry, the predictive, the draws and the resampled metrics of each labelled split;
    resampled values begin with the entry's own."""
    record = cells.read(finished)
    assert [entry["split"] for entry in record.cells] == ["test", "far"] == list(record.log_mean)
    assert record.draws["test"].shape == (4, 12, 2)
    torch.testing.assert_close(record.draws["far"].exp().mean(0).log(), record.log_mean["far"], atol=1e-5, rtol=1e-4)
    for entry in record.cells:
        found = record.resampled[entry["split"]]
        assert found.keys() == {False, True}
        for kind, scaled in (("metrics", False), ("scaled_metrics", True)):
            for name, each in found[scaled].items():
                assert each.value == pytest.approx(entry[kind][name]["value"]) and len(each.samples) == 1000
    test, far = record.cells
    assert test["ood"].keys() == {"far", "unknown"} and far["ood"] == {}
    assert test["averaging"]["by_draws"]["sizes"] == [1, 4] and far["averaging"] is None
    assert test["cost"]["passes"] == 4 and test["cost"]["parameters"] > 0
    assert "examples" not in test and "resampled" not in test


def test_splits_with_any_name(recipe: Recipe, tmp_path: Path) -> None:
    """Law: a slash in a split's name confuses no file."""
    (tmp_path / "out" / "cells").mkdir(parents=True)
    options = {**CONTENT["task"]["init_args"], "ood": {"far/away": "far.jsonl"}}
    path = write_recipe(tmp_path, task={"class_path": "SequenceClassification", "init_args": options})
    odd = Recipe.read(path)
    cell = Cell(Method("MAP", "MAP", odd), 0, 2, tmp_path / "out")
    cells.compute(cell, odd.build_task())
    record = cells.read(cell)
    assert list(record.log_mean) == ["test", "far/away"] == list(record.resampled)
    assert record.resampled["far/away"][False].keys() == record.resampled["test"][False].keys()


def test_finished_means_whole_and_of_this_very_cell(finished: Cell, task: Task, tmp_path: Path) -> None:
    """Law: another seed, number of draws, or a missing or damaged file is not finished."""
    assert cells.is_finished(finished, task)
    assert not cells.is_finished(replace(finished, num_draws=5), task)
    copied = replace(finished, output=tmp_path)
    (tmp_path / "cells").mkdir()
    assert not cells.is_finished(copied, task)
    copied.path.write_bytes(finished.path.read_bytes())
    assert not cells.is_finished(copied, task)
    tensors = finished.path.with_suffix(".safetensors").read_bytes()
    copied.path.with_suffix(".safetensors").write_bytes(tensors[:-5])
    assert not cells.is_finished(copied, task)
    copied.path.with_suffix(".safetensors").write_bytes(tensors)
    assert cells.is_finished(copied, task)
    write_json(copied.path, [1])
    assert not cells.is_finished(copied, task)


def test_a_fit_is_taken_where_it_is(
    finished: Cell, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: with its posterior there, a cell is evaluated without a fit, to the same numbers and costs."""
    monkeypatch.setattr(cells, "fit", None)
    again = replace(finished, method=replace(finished.method, folder=finished.folder), output=tmp_path)
    (tmp_path / "cells").mkdir()
    cells.compute(again, task)
    before, after = (cells.read(cell).cells for cell in (finished, again))
    for old, new in zip(before, after, strict=True):
        assert new["metrics"]["nll"]["value"] == pytest.approx(old["metrics"]["nll"]["value"])
        assert new["cost"]["fit_seconds"] == old["cost"]["fit_seconds"] > 0


def test_draws_that_are_too_many_are_not_kept(
    task: Task, finished: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: above a size a split's draws stay out of the file, and all else is there."""
    monkeypatch.setattr(cells, "KEPT_DRAWS", 60)
    again = replace(finished, method=replace(finished.method, folder=finished.folder), output=tmp_path)
    (tmp_path / "cells").mkdir()
    cells.compute(again, task)
    record = cells.read(again)
    assert list(record.draws) == ["far"] and list(record.log_mean) == ["test", "far"]
