from __future__ import annotations

from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from pyrolora.options import build_parser


def paint(wall: Path, *, colours: list[str], coats: int = 2, dry: bool = False, no_drips: int) -> None:
    """Paints a wall.

    Example:
      pyrolora paint wall.txt --colours red blue

    Args:
        wall: A file.
        colours: Names of colours.
        coats: How often.
        dry: Do nothing.
        no_drips: Where not.
    """


def parser() -> ArgumentParser:
    flags = {"paint": {"--colours": {"nargs": "+", "metavar": "COLOUR"}, "--dry": {"action": "store_true"}}}
    flags["paint"]["--no-drips"] = {"type": int, "default": 0}
    return build_parser({"paint": paint}, description="A painter.", flags=flags, epilogs={"paint": "The end."})


def test_signatures_become_options() -> None:
    """Law: an argument without default is positional, the others are options of their types; flags are as spelt."""
    found = parser().parse_args(["paint", "w.txt", "--colours", "red", "blue", "--coats", "3", "--dry"])
    assert found.subcommand == "paint"
    assert vars(found.paint) == {
        "wall": Path("w.txt"),
        "colours": ["red", "blue"],
        "coats": 3,
        "dry": True,
        "no_drips": 0,
    }
    assert parser().parse_args(["paint", "w.txt", "--colours", "red", "--no-drips", "4"]).paint.no_drips == 4
    assert parser().parse_args(["paint", "w.txt", "--colours", "red"]).paint.coats == 2


def test_docstrings_become_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Law: help has the docstring without its arguments, what it says of each of them, defaults, and the epilog."""
    with pytest.raises(SystemExit):
        parser().parse_args(["paint", "--help"])
    said = capsys.readouterr().out
    for text in (
        "Paints a wall.",
        "pyrolora paint wall.txt --colours red blue",
        "Names of colours.",
        "Where not.",
        "The end.",
    ):
        assert text in said
    assert "How often. (default: 2)" in said
    assert "Args:" not in said and "Do nothing. (default" not in said
    with pytest.raises(SystemExit):
        parser().parse_args(["--help"])
    assert "A painter." in capsys.readouterr().out
