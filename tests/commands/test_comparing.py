from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyrolora.cli import main
from tests.programs import sentences
from tests.recipes import write_recipe, write_rows
from tests.terminal import Captured


def test_compare_and_report(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: compare takes guides as a list, prints a table, and writes results and a report that can be made again."""
    main(["compare", str(recipe), "--guides", "MAP", "MeanField", "--seeds", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {cell["method"] for cell in results["cells"]} == {"LoRA", "MAP", "MeanField"}
    for cell in results["cells"]:
        assert f"{cell['metrics']['nll']['value']:.3f} → {cell['scaled_metrics']['nll']['value']:.3f}" in out
    assert "MeanField − (LoRA, scaled): accuracy" in out
    page = (tmp_path / "report.html").read_text()
    assert "MeanField" in page
    (tmp_path / "report.html").unlink()
    posteriors = [str(tmp_path / "MAP-seed0"), str(tmp_path / "MeanField-seed0")]
    two = tmp_path / "two"
    main(["compare", "--posteriors", *posteriors, "--baseline", "MeanField-seed0", "--output", str(two)])
    assert "MAP-seed0 − MeanField-seed0: accuracy" in capsys.readouterr().out
    main(["report", str(tmp_path), str(two)])
    assert (tmp_path / "report.html").read_text() == page
    assert "MAP-seed0" in (two / "report.html").read_text()
    main(["evaluate", str(tmp_path / "LoRA-seed0")])
    assert "1 draw(s)" in capsys.readouterr().out


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_failed_is_said_at_the_end(recipe: Path, tmp_path: Path, capsys: Captured, processes: str) -> None:
    """Law: a method that cannot be fitted here is named with its reason after the others' table and report."""
    command = ["compare", str(recipe), "--guides", "TFB", "MAP", "--seeds", "1", "--processes", processes]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert "1 failed; called again, only these are tried anew:" in printed.err
    assert "TFB-seed0: TFB: B of a layer is zero" in printed.err
    assert "report.html" in printed.out and "MAP" in (tmp_path / "report.html").read_text()


def test_one_row_of_everything(tmp_path: Path, capsys: Captured) -> None:
    """Law: a comparison on validation and test splits of one row, over two seeds, ends in a table and a report."""
    path = write_recipe(tmp_path / "recipe")
    for split in ("validation", "test", "far"):
        write_rows(path.with_name(f"{split}.jsonl"), list(sentences(1)))
    main(["compare", str(path), "--guides", "MAP", "--seeds", "2", "--output", str(tmp_path / "out")])
    assert "MAP − LoRA" in capsys.readouterr().out and (tmp_path / "out" / "report.html").is_file()
    write_rows(path.with_name("train.jsonl"), list(sentences(1)))
    with pytest.raises(SystemExit):
        main(["compare", str(path), "--guides", "MAP", "--seeds", "1", "--output", str(tmp_path / "other")])
    assert "classification needs two classes or more" in capsys.readouterr().err
