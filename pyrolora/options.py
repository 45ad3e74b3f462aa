"""How functions become commands: signatures are the options, docstrings the help."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser


def build_parser(
    commands: Mapping[str, Callable[..., None]],
    *,
    description: str,
    flags: Mapping[str, Mapping[str, Mapping[str, Any]]],
    epilogs: Mapping[str, str],
) -> ArgumentParser:
    """A parser with one command for each function.

    Args:
        commands: Name to function. Arguments without a default are positional.
        description: Of the program.
        flags: Command to the arguments that are spelt otherwise than their signature says: ``--name`` (or ``name``,
            positional) to the arguments of `argparse.ArgumentParser.add_argument`.
        epilogs: Command to what its help ends with.
    """
    common: dict[str, Any] = {"formatter_class": _Help, "exit_on_error": False, "print_config": None}
    parser = ArgumentParser(prog="pyrolora", description=description, version=version("pyrolora"), **common)
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND", description=argparse.SUPPRESS)
    for name, function in commands.items():
        text = inspect.cleandoc(function.__doc__ or "").partition("\nArgs:")[0]
        command = ArgumentParser(description=text, **common)
        own = flags.get(name, {})
        skip: set[str | int] = {_argument(flag) for flag in own}
        command.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
        for flag, spelling in own.items():
            command.add_argument(flag, **spelling, help=_help(function, _argument(flag)))
        command.epilog = epilogs.get(name)
        subcommands.add_subcommand(name, command, help=text.partition("\n")[0])
        command.prog = f"pyrolora {name}"
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help that keeps the lines of examples, and names defaults that say something."""

    def add_argument(self, action: argparse.Action) -> None:
        before = self._action_max_length
        super().add_argument(action)
        if self._action_max_length > before:
            # argparse forgets the second indent of commands, so that the longest would break its line.
            self._action_max_length += 2

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        return text if silent or not action.option_strings else f"{text} (default: %(default)s)"


def _argument(flag: str) -> str:
    """The argument that a flag is of: ``--max-new-tokens`` of ``max_new_tokens``."""
    return flag.lstrip("-").replace("-", "_")


def _help(function: Callable[..., None], name: str) -> str:
    """What the docstring says of an argument."""
    lines = inspect.cleandoc(function.__doc__ or "").splitlines()
    return next(line.partition(": ")[2] for line in lines if line.strip().startswith(f"{name}: "))
