"""The README's code runs as printed, on less data."""

from __future__ import annotations

import functools
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import pyrolora.tasks
from pyrolora.priors.base import checked
from tests.programs import tiny_program

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Law: what a newcomer copies works, from recipe to exported adapter."""
    small = functools.partial(pyrolora.tasks.PhysicalCommonsense, num_train=16, num_validation=8, num_test=8, num_ood=0)
    monkeypatch.setattr(pyrolora.tasks, "PhysicalCommonsense", small)
    fit_module = import_module("pyrolora.inference.fit")
    arguments = fit_module.default_arguments()
    arguments.max_steps = 2
    monkeypatch.setattr(fit_module, "default_arguments", lambda: arguments)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "mutual_information" in printed
    assert "mean field" in printed
    assert (tmp_path / "runs" / "mean" / "adapter_model.safetensors").is_file()


def test_the_readmes_own_prior_works() -> None:
    """Law: the README's prior is a prior: it samples its scale and fits every site."""
    names: dict = {}
    exec(compile(BLOCKS[1], "README.md", "exec"), names)
    program = tiny_program({"*": names["shared_scale"]})
    assert "lora.query.A.scale" in program.latents
    fn = checked(names["shared_scale"], program.sites["lora.query.A"])
    assert torch.isfinite(fn.log_prob(fn.sample())).all()


def test_its_picture_is_there() -> None:
    """Law: every picture that the README shows exists."""
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / path).is_file(), path
