from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pyrolora.cli import main
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from tests.recipes import write_rows
from tests.terminal import Captured, fails


def test_predict(fitted: Path, rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: rows without labels are predicted in their order; screen, CSV, JSON Lines and Parquet say the same."""
    main(["predict", str(fitted), str(rows), "--draws", "4"])
    screen = capsys.readouterr().out
    assert "label" not in screen
    for ending in (".csv", ".jsonl", ".parquet"):
        main(["predict", str(fitted), str(rows), "--draws", "4", "--output", str(tmp_path / "new" / f"p{ending}")])
    with (tmp_path / "new" / "p.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in table] == ["a warm house", "the dark cold river", "stone"]
    lines = [json.loads(line) for line in (tmp_path / "new" / "p.jsonl").read_text().splitlines()]
    parquet = pd.read_parquet(tmp_path / "new" / "p.parquet")
    for i, row in enumerate(table):
        assert float(row["p(0)"]) + float(row["p(1)"]) == pytest.approx(1, abs=1e-5)
        assert f"{float(row['confidence']):.3f}" in screen
        for name in ("p(1)", "entropy", "mutual_information"):
            assert float(row[name]) == pytest.approx(lines[i][name], abs=1e-6)
            assert float(row[name]) == pytest.approx(float(parquet[name][i]), abs=1e-6)


@pytest.mark.parametrize("name", ["many.jsonl", "many.csv", "many.parquet"])
def test_predict_into_a_folder(name: str, fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a folder gets the rows in parts, with the numbers that one table has; again, they stay as they are."""
    frame = pd.DataFrame({"text": ["a warm house", "NA", "stone", "007"]})
    file = tmp_path / name
    {
        ".jsonl": lambda: frame.to_json(file, orient="records", lines=True),
        ".csv": lambda: frame.to_csv(file, index=False),
    }.get(file.suffix, lambda: frame.to_parquet(file))()
    for _ in range(2):
        main(["predict", str(fitted), str(file), "--draws", "4", "--output", str(tmp_path / "parts")])
        assert f"4 predictions in 1 file in {tmp_path / 'parts'}" in capsys.readouterr().out
    main(["predict", str(fitted), str(file), "--draws", "4", "--output", str(tmp_path / "one.parquet")])
    one, parts = pd.read_parquet(tmp_path / "one.parquet"), pd.read_parquet(tmp_path / "parts")
    assert list(parts["text"]) == list(frame["text"])
    assert one.pop("label").isna().all() and parts.pop("label").isna().all()  # without values they have no one type
    pd.testing.assert_frame_equal(one, parts, check_dtype=False, atol=1e-6)


def test_predict_in_processes(
    fitted: Path, rows: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: several processes share a folder, and are refused where they would write one table several times."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "give --output a folder" in fails(capsys, "predict", fitted, rows, "--output", tmp_path / "p.csv")
    main(["predict", str(fitted), str(rows), "--output", str(tmp_path / "parts")])
    assert not list((tmp_path / "parts").iterdir())  # the only part is the other process's


def test_predict_bad_files(fitted: Path, rows: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a missing file, a missing column and unknown endings are one line that names them."""
    assert "none.jsonl does not exist" in fails(capsys, "predict", fitted, tmp_path / "none.jsonl")
    wrong = write_rows(tmp_path / "wrong.jsonl", [{"sentence": "x"}])
    assert "no column 'text'; its columns are sentence" in fails(capsys, "predict", fitted, wrong)
    (tmp_path / "rows.xml").write_text("<a/>")
    assert "cannot read '.xml' files; use one of .jsonl" in fails(capsys, "predict", fitted, tmp_path / "rows.xml")
    message = fails(capsys, "predict", fitted, rows, "--output", tmp_path / "p.xls")
    assert "the ending is one of .csv, .jsonl, .parquet" in message


def test_export(fitted: Path, tmp_path: Path) -> None:
    """Law: the mean and every draw are adapters that stock PEFT loads, with the posterior's own numbers."""
    main(["export", str(fitted), "--draws", "2", "--output", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw-0", "draw-1", "mean"]
    read = Recipe.read(fitted / "recipe.yaml")
    task = read.build_task()
    posterior = Posterior.from_pretrained(fitted, read.load_base(task), task=task)
    values = {"mean": posterior.mean()["lora.query.B"][1]}
    values |= {f"draw-{s}": posterior.draw(2)["lora.query.B"][s, 1] for s in range(2)}
    for name, expected in values.items():
        model = PeftModel.from_pretrained(read.load_base(task), str(tmp_path / name))
        query = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.query")
        assert (query.lora_B["default"].weight == expected).all()


def test_another_base(fitted: Path, recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a folder whose recipe was edited to another base, or to one that is gone, says so."""
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    text = (fitted / "recipe.yaml").read_text()
    base = str(recipe.parent / "base")
    (folder / "recipe.yaml").write_text(text.replace(base, base + "-gone"))
    assert "cannot be loaded" in fails(capsys, "evaluate", folder)
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    doubled = {name: 2 * value for name, value in weights.items()}
    save_file(doubled, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text(text.replace(base, str(tmp_path / "other")))
    assert "fingerprints differ" in fails(capsys, "evaluate", folder)


def test_a_folder_that_is_no_posterior(fitted: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a posterior folder with a file missing or damaged, and a report without results, are named."""
    folder = tmp_path / "copy"
    shutil.copytree(fitted, folder)
    (folder / "posterior.json").write_text("{")
    assert "posterior.json cannot be read" in fails(capsys, "evaluate", folder)
    (folder / "posterior.json").unlink()
    assert "posterior.json does not exist" in fails(capsys, "evaluate", folder)
    (folder / "results.json").write_text('{"format": 1')
    assert "results.json is damaged" in fails(capsys, "report", folder)
