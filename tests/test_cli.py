from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pyrolora.cli import COMMANDS, build_parser, main
from tests.recipes import write_recipe
from tests.terminal import Captured, fails, helps


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("fitt RECIPE", "invalid choice: 'fitt' (choose from 'sites', 'methods', 'estimate'"),
        ("fit", "required: fit.recipe"),
        ("compare RECIPE --guides", "--guides: expected at least one argument"),
        ("fit RECIPE --sed 1", "unrecognized arguments: --sed"),
        ("fit RECIPE --seed one", '"seed"'),
        ("fit RECIPE --resume yes", "unrecognized arguments: yes"),
        ("evaluate RECIPE --format xml", '"format"'),
    ],
)
def test_wrong_arguments(recipe: Path, capsys: Captured, arguments: str, message: str) -> None:
    """Law: arguments that cannot be read stop with code 2 and one line that points to --help."""
    said = fails(capsys, *arguments.replace("RECIPE", str(recipe)).split(), code=2)
    assert message in said and "--help" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "fit RECIPE --guide Meanfield",
            "unknown class 'Meanfield'; did you mean 'MeanField'? There are Checkpoints, Dropout, Ensemble",
        ),
        ("fit RECIPE --options.nois weight", "MeanField: unknown argument 'nois'; did you mean 'noise'?"),
        ("fit RECIPE --options.noise loud", "noise is one of weight, example, local, flipout, not 'loud'"),
        ("fit RECIPE --options.random *.C", "*.C"),
        ("fit RECIPE --training.max_step 1", "unknown argument 'max_step'; did you mean 'max_steps'?"),
        ("fit RECIPE --training.max_steps many", "max_steps is a number, not 'many'"),
        ("fit RECIPE --training.weight_decay 0.1", "weight_decay=0.1 is a Normal prior in disguise"),
        ("fit RECIPE --temperature -1", "temperature is a number ≥ 0, not -1"),
        ("sites none.yaml", "none.yaml does not exist"),
        ("compare RECIPE", "name guides to compare it with (--guides, or"),
        ("compare", "there is nothing to compare: give recipes, or posteriors"),
        ("compare --posteriors none", "none: no recipe.yaml there; give a folder that pyrolora fit wrote"),
        ("compare RECIPE --guides MAP --processes 0", "--processes is at least 1, not 0"),
        ("compare RECIPE --guides MAP --baseline mode", "the baseline 'mode' is none of the methods LoRA, MAP"),
        ("compare RECIPE --guides MAP Laplac", "unknown guide 'Laplac'; there are LoRA, MAP"),
        ("compare RECIPE --guides MAP --seeds 0", "--seeds is at least 1, not 0"),
        ("evaluate none", "none: no recipe.yaml there; give a folder that pyrolora fit wrote"),
        ("report none", "give a folder that pyrolora compare wrote"),
    ],
)
def test_wrong_values(recipe: Path, tmp_path: Path, capsys: Captured, arguments: str, message: str) -> None:
    """Law: a wrong guide, option, number or folder stops with one line that says what is right, before any training."""
    command = arguments.replace("RECIPE", str(recipe)).split()
    output = ["--output", str(tmp_path / "out")] if command[0] in ("fit", "compare") else []
    assert message in fails(capsys, *command, *output)
    assert not list(tmp_path.glob("**/checkpoint-*")) and not list(tmp_path.glob("**/posterior.json"))


# -- help ------------------------------------------------------------------------------------------------------------


def test_every_option_is_explained(capsys: Captured) -> None:
    """Law: help names every command, each command's help explains every option and names the guides where it takes
    one; nothing of the option parser's own is among them."""
    assert set(re.findall(r"^    (\w+) ", helps(capsys), flags=re.M)) == set(COMMANDS)
    for name in COMMANDS:
        text = helps(capsys, name)
        assert "print_config" not in text and "<class" not in text and "Args:" not in text
        listed = text.partition("positional arguments:")[2].partition("guides, with")[0]
        for found in re.finditer(r"^  (-h, --help|--\w+|\w+)(.*(?:\n {4,}.*)*)", listed, flags=re.M):
            assert len(re.sub(r"\b[A-Z]{2,}\b", "", found[2]).split()) > 1, found[0]
    assert "MeanField(random=" in helps(capsys, "fit") and "MAP()" in helps(capsys, "compare")
    assert "(default: 0)" in helps(capsys, "fit") and "(default: MeanField)" in helps(capsys, "fit")


def test_every_example_is_a_command(capsys: Captured) -> None:
    """Law: each line of help that begins with "pyrolora" stands unbroken and can be typed as it stands; the help of
    each command has one of it."""
    seen = set()
    for command in ([], *[[name] for name in COMMANDS]):
        for line in helps(capsys, *command).splitlines():
            if line.startswith("  pyrolora "):
                assert len(line) <= 80
                parsed = build_parser().parse_args(shlex.split(line)[1:])
                seen.add((*command, parsed.subcommand))
    assert {(name, name) for name in COMMANDS} <= seen and any(len(pair) == 1 for pair in seen)


def test_without_a_command_there_is_help(capsys: Captured) -> None:
    """Law: `pyrolora` alone says what there is."""
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == helps(capsys)


def test_version(capsys: Captured) -> None:
    """Law: --version names the installed version."""
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == f"pyrolora {version('pyrolora')}"


def test_as_a_program() -> None:
    """Law: the module runs as a program, with help on stdout and nothing on stderr."""
    command = [sys.executable, "-m", "pyrolora.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0
    assert done.stdout.startswith("usage: pyrolora ") and "A first session:" in done.stdout
    # On some CPUs bitsandbytes says at its import, which is PEFT's, that it has no faster kernel.
    assert [line for line in done.stderr.splitlines() if "gemm_4bit_forward" not in line] == []
