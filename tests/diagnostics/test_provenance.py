from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from pyrolora.diagnostics.provenance import git_state, hardware, versions


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit of two files."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("recipe.yaml", "other.txt"):
        (tmp_path / name).write_text("first\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_git_state(repository: Path) -> None:
    """Law: the commit, whether the file differs from it, and whether any tracked file does."""
    recipe = repository / "recipe.yaml"
    head = subprocess.run(
        ["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    clean = {"commit": head.stdout.strip(), "file_changed": False, "tree_changed": False}
    assert git_state(recipe) == clean
    (repository / "new.yaml").write_text("untracked")
    assert git_state(recipe) == clean
    assert git_state(repository / "new.yaml") == {**clean, "file_changed": True}
    (repository / "other.txt").write_text("second\n")
    assert git_state(recipe) == {**clean, "tree_changed": True}
    recipe.write_text("second\n")
    assert git_state(recipe) == {**clean, "file_changed": True, "tree_changed": True}
    (repository / ".gitignore").write_text("ignored.yaml\n")
    (repository / "ignored.yaml").write_text("x")
    assert git_state(repository / "ignored.yaml")["file_changed"]


def test_without_git(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a file in no repository, and a machine without git, have no state, and nothing is raised."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    assert git_state(outside / "recipe.yaml") is None
    monkeypatch.setenv("PATH", "")
    assert git_state(repository / "recipe.yaml") is None


def test_versions_and_hardware() -> None:
    """Law: installed versions by distribution name, and a line with the machine's kind."""
    found = versions()
    assert found["python"] == platform.python_version() and found["torch"] == version("torch")
    assert platform.machine() in hardware() and f"{os.cpu_count()} cores" in hardware()
