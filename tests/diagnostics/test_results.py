from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pyrolora.diagnostics import cells
from pyrolora.diagnostics import results as module
from pyrolora.diagnostics.cells import Cell, Method
from pyrolora.diagnostics.differences import difference
from pyrolora.diagnostics.evaluation import MAIN
from pyrolora.diagnostics.results import table, to_pandas
from pyrolora.recipe import Recipe
from pyrolora.report.html import render

METHODS = ["MAP", "MeanField"]


def test_results_have_the_form_of_the_report(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: the report renders every method, split and prior of the results, and every section."""
    _, results = finished
    page = render(results)
    for text in ("LoRA", "MAP", "MeanField", "far", "Normal(scale=0.1)", "an independent Normal for every weight"):
        assert text in page
    for section in (
        "differences",
        "reliability",
        "risk",
        "uncertainty",
        "averaging",
        "shifts",
        "examples",
        "layers",
        "costs",
    ):
        assert f'<h2 id="{section}">' in page
    assert results["settings"]["temperature"] == {"LoRA": 1.0, "MAP": 1.0, "MeanField": 1.0}
    (described,) = results["settings"]["recipes"]
    assert described["name"] == "tiny" and "class_path" in described["text"] and described["git"] is None
    assert results["task"]["class_names"] == ["0", "1"]


def test_heat_maps_are_means_over_seeds(finished: tuple[Path, dict[str, Any]], recipe: Path) -> None:
    """Law: for each method with noise and each summary, the mean over seeds of the cells' layer tables."""
    output, results = finished
    assert {(h["title"], h["method"]) for h in results["heatmaps"]} == {
        (title, "MeanField") for title, _ in module.LAYERS.values()
    }
    (noise,) = (h for h in results["heatmaps"] if h["title"] == "Noise of ΔW")
    own = [cells.read(Cell(Method("MeanField", "MeanField", Recipe.read(recipe)), s, 4, output)).layers for s in (0, 1)]
    assert own[0] != own[1]
    for rows in zip(*own, strict=True):
        kind, layer = rows[0]["kind"], str(rows[0]["layer"])
        if rows[0]["noise_to_mean"] is not None:
            assert noise["values"][kind][layer] == pytest.approx(sum(r["noise_to_mean"] for r in rows) / 2)
    assert set(noise["values"]) == {"query", "value"}


def test_contrasts_are_paired_by_seed(finished: tuple[Path, dict[str, Any]], recipe: Path) -> None:
    """Law: each contrast is the difference of the cells' resampled values, seed by seed, on each split."""
    output, results = finished
    kinds = {(c["split"], c["method"], c["scaled"], c["baseline_scaled"]) for c in results["contrasts"]}
    assert len(kinds) == len(results["contrasts"]) == 2 * (1 + 2 * 3)
    records = {
        (name, seed): cells.read(Cell(Method(name, name, Recipe.read(recipe)), seed, 4, output))
        for name in ("LoRA", "MeanField")
        for seed in (0, 1)
    }
    (found,) = (
        c for c in results["contrasts"] if (c["split"], c["method"], c["scaled"], c["baseline_scaled"])
        == ("far", "MeanField", False, True)
    )  # fmt: skip
    ours = {seed: records["MeanField", seed].resampled["far"][False]["nll"] for seed in (0, 1)}
    theirs = {seed: records["LoRA", seed].resampled["far"][True]["nll"] for seed in (0, 1)}
    assert found["metrics"]["nll"] == pytest.approx(difference(ours, theirs).to_dict())


def test_examples_have_what_every_method_says(finished: tuple[Path, dict[str, Any]], recipe: Path) -> None:
    """Law: texts of the test split, none twice, with the first seed's mean and draws of each method."""
    output, results = finished
    task = Recipe.read(recipe).build_task()
    rows = [example["row"] for example in results["examples"]]
    assert len(rows) == len(set(rows)) > 0
    record = cells.read(Cell(Method("MeanField", "MeanField", Recipe.read(recipe)), 0, 4, output))
    for example in results["examples"]:
        assert example["text"] == task.test["text"][example["row"]]
        assert example["label"] == task.test["labels"][example["row"]]
        said = example["says"]
        assert list(said) == ["LoRA", *METHODS]
        assert np.shape(said["MeanField"]["draws"]) == (4, 2) and np.shape(said["MAP"]["draws"]) == (1, 2)
        expected = record.log_mean["test"][example["row"]].exp().tolist()
        assert said["MeanField"]["probabilities"] == pytest.approx(expected)


def test_what_is_interesting() -> None:
    """Law: wrong counts from 0.7 on by its confidence; methods and draws by the mutual information of label and index,
    log 2 where two are sure of opposite classes; agreement is nothing."""
    means = {
        "one": np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]),
        "two": np.array([[0.9, 0.1], [0.6, 0.4], [1.0, 0.0]]),
    }
    draws = {"one": np.array([[[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]]])}
    found = module._interest(means, draws, np.array([1, 1, 1]))
    assert found["wrong"].tolist() == pytest.approx([0.9, 0.0, 1.0])
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4)) - 0.5 * -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert found["methods"].tolist() == pytest.approx([0.0, 0.0, entropy])
    assert found["draws"].tolist() == pytest.approx([math.log(2), 0.0, 0.0])
    assert module._interest(means, {}, np.array([0, 0, 0])).keys() == {"wrong", "methods"}


def test_parquet_has_a_row_for_each_metric(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: results.parquet says what results.json says, with settings in its metadata."""
    output, results = finished
    read = pd.read_parquet(output / "results.parquet")
    pd.testing.assert_frame_equal(read, to_pandas(results))
    assert read.attrs["settings"]["versions"]["torch"] == results["settings"]["versions"]["torch"]
    assert read.attrs["task"] == results["task"]
    cell = results["cells"][3]
    chosen = (read.method == cell["method"]) & (read.seed == cell["seed"]) & (read.split == cell["split"])
    for scaled, kind in ((False, "metrics"), (True, "scaled_metrics")):
        part = read[chosen & (read.scaled == scaled)].set_index("metric")
        assert set(part.index) == set(cell[kind])
        for metric, estimate in cell[kind].items():
            for end in ("value", "low", "high"):
                assert part.loc[metric, end] == pytest.approx(estimate[end], nan_ok=True)


def test_the_table_has_means_over_seeds(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: the plain table has a row for each method and split: means over seeds, as fitted and scaled; null is ∞."""
    _, results = finished
    lines = table(results).splitlines()
    words = ("accuracy", "LoRA", "MAP", "MeanField", "SPLIT", "MAP", "MAP", "MeanField", "MeanField")
    assert [line.split()[0] for line in lines if line] == [
        word.replace("SPLIT", split) for split in ("test:", "far:") for word in ("SPLIT", *words)
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


def test_the_table_has_differences(finished: tuple[Path, dict[str, Any]]) -> None:
    """Law: below each split every method is compared with LoRA as fitted and scaled; a star marks what is real."""
    made = copy.deepcopy(finished[1])
    (found,) = (
        c for c in made["contrasts"] if (c["split"], c["method"], c["scaled"], c["baseline_scaled"])
        == ("test", "MAP", False, False)
    )  # fmt: skip
    found["metrics"]["nll"] |= {"value": -0.5, "low": -0.6, "high": -0.4, "real": True}
    found["metrics"]["ece"] |= {"value": None, "low": None, "high": None, "real": False}
    said = table(made)
    assert "nll -0.500 [-0.600, -0.400]*, ece unknown" in said
    assert "MAP − LoRA: accuracy" in said and "MeanField − (LoRA, scaled): accuracy" in said


def test_results_before_the_first_cell(recipe: Path) -> None:
    """Law: nothing finished gives results without cells, which the report can show and JSON hold."""
    read = Recipe.read(recipe)
    made = module.assemble([], read.build_task(), baseline="LoRA", recipes=[read])
    assert made["cells"] == [] and "There are no results yet." in render(json.loads(json.dumps(made)))
    assert to_pandas(made).empty and table(made) == ""
