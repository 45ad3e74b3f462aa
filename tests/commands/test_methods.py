"""Commands about methods, run as a user runs them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyrolora import guides
from pyrolora.cli import main
from pyrolora.commands.methods import _reference
from pyrolora.saved import load
from tests.recipes import write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), guides={"Ensemble": {"guide": "MeanField", "size": 2}})


def test_methods_lists_every_guide(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: a row for every guide: its card, the parameters it adds to MAP's, its source; what does not fit is said."""
    main(["methods", str(recipe)])
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.partition("\nguide ")[2].split("\n\n")[0].splitlines() if line}
    names = [name for name in guides.__all__ if name != "Guide"]
    assert set(names) <= set(rows)
    total = int(re.search(r"MAP has ([\d,]+) parameters", out)[1].replace(",", ""))
    assert re.search(r"\+0\b", rows["MAP"]) and "Hu et al. 2022" in rows["MAP"]
    # μ and σ of every entry of A, beside MAP: 2 kinds × 2 layers × 2 ranks × 16 inputs more.
    assert "+128 " in rows["MeanField"] and "Blundell et al. 2015" in rows["MeanField"]
    assert f"+{total + 2 * 128:,} " in rows["Ensemble"]
    assert all(getattr(guides, name).card.random in rows[name] for name in names)
    assert "Dropout does not fit this recipe" in out and "lora_dropout=0.1" in out


def test_every_guide_names_its_source() -> None:
    """Law: documentation of every guide ends in a source with a year."""
    assert _reference(guides.TFB) == "Shi et al. 2024 (arXiv 2412.05723)"
    for name in guides.__all__:
        assert name == "Guide" or re.search(r"(19|20)\d\d", _reference(getattr(guides, name))), name


def test_fits_apart_are_joined(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: a joined folder is a posterior like any other, with both members."""
    for seed in (0, 1):
        main(["fit", str(recipe), "--guide", "MAP", "--seed", str(seed), "--output", str(tmp_path / str(seed))])
    main(["join", str(tmp_path / "0"), str(tmp_path / "1"), "--output", str(tmp_path / "both")])
    posterior, task = load(tmp_path / "both")
    assert len(posterior.guide.parts()) == 2 and posterior.predict(task.test).num_draws == 2
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "both")])
    assert "accuracy" in capsys.readouterr().out


def test_calibration_is_stored(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Law: after calibrate the saved posterior predicts at the temperature that was printed, and says that figures on
    the split that it was calibrated on are too good."""
    main(["fit", str(recipe), "--guide", "Ensemble", "--output", str(tmp_path)])
    capsys.readouterr()
    main(["calibrate", str(tmp_path), "--draws", "4"])
    found = float(re.search(r"τ = ([\d.e+-]+)", capsys.readouterr().out)[1])
    posterior, _ = load(tmp_path)
    assert posterior.scaling == pytest.approx(found, rel=1e-3) and posterior.scaling != 1.0
    capsys.readouterr()
    with caplog.at_level("WARNING", logger="pyrolora"):
        main(["evaluate", str(tmp_path), "--split", "validation", "--draws", "4"])
        assert "calibrated on the validation split" in caplog.text
        caplog.clear()
        main(["evaluate", str(tmp_path), "--draws", "4"])
        assert "calibrated on" not in caplog.text
    assert [type(part).__name__ for part in posterior.guide.parts()] == ["MeanField", "MeanField"]
    assert {row["member"] for row in posterior.history} == {0, 1}


def test_calibration_needs_a_validation_split(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: without a validation split nothing is fitted on another."""
    main(["fit", str(recipe), "--guide", "MAP", "--output", str(tmp_path)])
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"\n +validation: .*", "", path.read_text()))
    with pytest.raises(SystemExit):
        main(["calibrate", str(tmp_path)])
    assert "validation" in capsys.readouterr().err
