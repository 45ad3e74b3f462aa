"""What a recipe needs, asked as a user asks."""

from __future__ import annotations

from pathlib import Path

from pyrolora.cli import main
from tests.terminal import Captured, fails


def test_estimate(recipe: Path, capsys: Captured) -> None:
    """Law: parts in GiB add up to what is printed for all; parameters are those of `pyrolora methods`."""
    main(["estimate", str(recipe), "--guide", "MAP", "--batch-size", "4", "--length", "8", "--draws", "2"])
    out = capsys.readouterr().out
    assert "4 × 8 tokens in training, 2 draws" in out.splitlines()[0]
    numbers = {line.rsplit(None, 1)[0].strip(): line.rsplit(None, 1)[1] for line in out.splitlines()[1:4]}
    assert numbers["MAP"] == numbers["plain LoRA"] and numbers["base model"] != numbers["MAP"]
    for part in ("base weights", "Adam's two moments", "activations kept for the backward pass", "in all"):
        assert f"  {part}" in out


def test_estimate_needs_a_configuration(recipe: Path, tmp_path: Path, capsys: Captured) -> None:
    """Law: a base that is not there is one line that says how to give its configuration."""
    text = recipe.read_text().replace("base: base", "base: nobody/nothing")
    path = tmp_path / "far.yaml"
    path.write_text(text)
    assert "--config PATH" in fails(capsys, "estimate", path)
    main(["estimate", str(path), "--config", str(recipe.parent / "base" / "config.json")])
    assert "in all" in capsys.readouterr().out
