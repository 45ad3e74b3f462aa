"""The command line: ``pyrolora COMMAND``. The signatures of the commands are its options."""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from pyrolora.commands.comparing import compare, report
from pyrolora.commands.estimating import estimate
from pyrolora.commands.fitting import fit, sites
from pyrolora.commands.generating import generate
from pyrolora.commands.judging import diagnose, evaluate
from pyrolora.commands.methods import calibrate, join, methods
from pyrolora.commands.using import export, predict
from pyrolora.construct import classes
from pyrolora.inference.predict import NonFiniteError
from pyrolora.inference.processes import launched
from pyrolora.options import build_parser as parser_of

logger = logging.getLogger("pyrolora")
_logged: set[tuple[str, int]] = set()

DESCRIPTION = """\
Bayesian low-rank adapters. A recipe (YAML) states the model: base, adapters,
priors, task. A guide approximates its posterior.

A first session:
  pyrolora sites models/minilm-commonsense.yaml
  pyrolora estimate models/minilm-commonsense.yaml --guide MeanField
  pyrolora fit models/minilm-commonsense.yaml --guide MeanField --output runs/mf
  pyrolora evaluate runs/mf
  pyrolora diagnose runs/mf
  pyrolora predict runs/mf questions.jsonl --output predictions.csv
  pyrolora compare models/minilm-commonsense.yaml --guides MAP MeanField

More about each command, with examples: pyrolora COMMAND --help
"""
COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f
    for f in (
        *(sites, methods, estimate, fit, join, calibrate, evaluate),
        *(diagnose, compare, predict, generate, export, report),
    )
}
# Spelt as flags usually are: several names after one --guides, nothing after --resume.
FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "compare": {
        "recipes": {"nargs": "*", "type": Path, "default": [], "metavar": "RECIPE"},
        "--guides": {"nargs": "+", "default": [], "metavar": "GUIDE"},
        "--posteriors": {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"},
    },
    "diagnose": {
        f"--{name}": {"nargs": "+", "type": Path, "default": [], "metavar": "FOLDER"} for name in ("runs", "against")
    },
    "estimate": {"--batch-size": {"type": int, "metavar": "ROWS"}},
    "generate": {
        "--prompt": {"action": "append", "default": [], "metavar": "TEXT"},
        "--max-new-tokens": {"type": int, "default": 40, "metavar": "T"},
        "--chat": {"action": "store_true"},
        "--levels": {"nargs": 2, "type": float, "default": [0.1, 0.3], "metavar": "NATS"},
    },
    **{name: {"folders": {"nargs": "+", "type": Path, "metavar": "FOLDER"}} for name in ("join", "report")},
    "fit": {"--resume": {"action": "store_true"}},
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``pyrolora`` command; what the user can mend ends in one line on stderr."""
    _listen()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        chosen = build_parser().parse_args(arguments or ["--help"])
    except argparse.ArgumentError as error:
        _stop(f"{' '.join(str(error).split())}; see pyrolora --help", code=2)
    try:
        COMMANDS[chosen.subcommand](**vars(chosen[chosen.subcommand]))
    except (ValueError, OSError, NonFiniteError) as error:
        _stop(str(error), code=1)
    except KeyboardInterrupt:
        _stop("interrupted", code=130)


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    guides = "guides, with their options:\n" + "\n".join(_guides())
    epilogs = {name: guides for name in ("estimate", "fit", "compare")}
    return parser_of(COMMANDS, description=DESCRIPTION, flags=FLAGS, epilogs=epilogs)


def _guides() -> list[str]:
    """Each guide as one would construct it, with its defaults."""
    lines = []
    for name, guide in classes("guides").items():
        parameters = inspect.signature(guide).parameters.values()
        lines.append(f"  {name}({', '.join(f'{p.name}={p.default!r}' for p in parameters)})")
    return lines


def _listen() -> None:
    """Progress of this package on stderr, without what other libraries say of their own insides."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO if launched()[0] == 0 else logging.WARNING)  # one log of several processes
    logging.getLogger("transformers.modeling_utils").addFilter(_first_time)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _first_time(record: logging.LogRecord) -> bool:
    """Whether a place in the code logs for the first time: a comparison loads the same base many times."""
    place = (record.pathname, record.lineno)
    first = place not in _logged
    _logged.add(place)
    return first


def _stop(message: str, *, code: int) -> NoReturn:
    print(f"pyrolora: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
