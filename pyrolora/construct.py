"""Objects that a file names: public classes of this package alone, so that reading a file never runs anything else."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

from pyrolora.guides.base import Guide
from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataSource


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is allowed there."""


def classes(package: str) -> dict[str, type]:
    """The public classes of ``guides``, ``priors`` or ``tasks`` that a recipe can name."""
    module = import_module(f"pyrolora.{package}")
    found = {name: getattr(module, name) for name in module.__all__}
    aside = (Guide, Task, DataSource)
    return {
        name: thing
        for name, thing in found.items()
        if inspect.isclass(thing) and thing not in aside and not issubclass(thing, Exception)
    }


def described(spec: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    """Class name and arguments from ``NAME`` or ``{class_path: NAME, init_args: {...}}``."""
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or "class_path" not in spec or not spec.keys() <= {"class_path", "init_args"}:
        raise RecipeError(f"{where}: give a class name, or a mapping with class_path and init_args; not {spec!r}")
    name, arguments = spec["class_path"], spec.get("init_args") or {}
    if not isinstance(name, str):
        raise RecipeError(f"{where}: class_path is the name of a class, not {name!r}")
    if not isinstance(arguments, Mapping):
        raise RecipeError(f"{where}: {name}: arguments are a mapping, not {arguments!r}")
    return name, arguments


def construct(name: str, arguments: Mapping[str, Any], package: str, *, where: str, first: tuple[Any, ...] = ()) -> Any:
    """Builds an object of one of the public classes of a package.

    Args:
        name: Of the class.
        arguments: By name.
        package: ``guides``, ``priors`` or ``tasks``.
        where: File and key, for messages.
        first: Arguments by position, which no file can give.

    Raises:
        RecipeError: An unknown class or argument, or a value that the class refuses.
    """
    names = classes(package)
    if name not in names:
        raise RecipeError(f"{where}: unknown class {name!r}{nearest(name, names)}")
    return call(names[name], arguments, where=f"{where}: {name}", first=first)


def call(factory: Callable[..., Any], arguments: Any, *, where: str, first: tuple[Any, ...] = ()) -> Any:
    """Calls a factory with arguments from a file, checked against its signature; its own refusals name the file."""
    if not isinstance(arguments, Mapping):
        raise RecipeError(f"{where}: arguments are a mapping, not {arguments!r}")
    parameters = list(inspect.signature(factory).parameters)[len(first) :]
    check_names(arguments, parameters, f"{where}: unknown argument")
    try:
        return factory(*first, **arguments)
    except (TypeError, ValueError, OSError) as error:
        raise RecipeError(f"{where}: {error}") from error


def check_names(given: Iterable[Any], known: Iterable[str], what: str) -> None:
    """Refuses the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            raise RecipeError(f"{what} {name!r}{nearest(name, known)}")


def nearest(name: Any, known: Iterable[str]) -> str:
    """``; did you mean ...?``, and the list of what there is where it is short."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return hint if len(known) > 40 else f"{hint} There are {', '.join(known)}." if known else f"{hint} There are none."
