"""The command line as tests use it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyrolora.cli import main

Captured = pytest.CaptureFixture[str]


def fails(capsys: Captured, *arguments: str | Path, code: int = 1) -> str:
    """The one line on stderr with which a command stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == code
    said = [line for line in re.split(r"[\r\n]+", err) if line and "tokenising" not in line and "Loading" not in line]
    assert len(said) == 1 and said[0].startswith("pyrolora: "), err
    assert "Traceback" not in out + err
    return said[0]


def helps(capsys: Captured, *command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out
