"""A recipe, a fit and new rows that tests of the commands share. Read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyrolora.cli import main
from tests.recipes import write_recipe, write_rows


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="session")
def fitted(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `pyrolora fit` wrote. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "mf"
    main(["fit", str(recipe), "--guide", "MeanField", "--output", str(folder), "--seed", "3"])
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New rows, without labels."""
    texts = ["a warm house", "the dark cold river", "stone"]
    return write_rows(tmp_path_factory.mktemp("new") / "new.jsonl", [{"text": text} for text in texts])
