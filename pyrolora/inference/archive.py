"""A posterior on disk: safetensors and JSON, nothing that executes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
_KINDS = ("guides", "priors", "likelihoods")


class ArchiveError(ValueError):
    """A posterior folder that cannot be read; the message names the file and the reason."""


def describe(thing: Any) -> Any:
    """What rebuilds an object of this package: its class name and constructor arguments, as JSON.

    A prior that is somebody's own function cannot be rebuilt from a file; it becomes ``{"custom": name}``, and must be
    given again on loading.
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Mapping):
        return {name: describe(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value) for value in thing]
    kind = type(thing).__module__.split(".")
    if kind[0] != "pyrolora" or kind[1] not in _KINDS:
        return {"custom": getattr(thing, "__name__", type(thing).__name__)}
    arguments = [name for name in inspect.signature(type(thing)).parameters]
    return {"class": f"{kind[1]}.{type(thing).__name__}", "init": {n: describe(getattr(thing, n)) for n in arguments}}


def rebuild(description: Any, *, where: str) -> Any:
    """The inverse of `describe`; only public classes of this package are ever constructed.

    Raises:
        ArchiveError: An unknown class, or arguments that its constructor refuses.
    """
    if isinstance(description, list):
        return [rebuild(value, where=where) for value in description]
    if not isinstance(description, dict):
        return description
    if "class" not in description:
        return {name: rebuild(value, where=where) for name, value in description.items()}
    kind, _, name = str(description["class"]).partition(".")
    known = import_module(f"pyrolora.{kind}").__all__ if kind in _KINDS else []
    if name not in known:
        raise ArchiveError(f"{where}: {description['class']!r} is not a class that a posterior may hold")
    arguments = {n: rebuild(v, where=where) for n, v in description.get("init", {}).items()}
    try:
        return getattr(import_module(f"pyrolora.{kind}"), name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ArchiveError(f"{where}: {description['class']} refuses its saved arguments: {error}") from error


def write(folder: Path, *, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Writes ``posterior.safetensors`` and ``posterior.json``; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, new = folder / "posterior.safetensors", folder / "posterior.safetensors.new"
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, str(new))
    os.replace(new, tensors)
    write_json(folder / "posterior.json", {"format": FORMAT, **meta})


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(new, path)


def read_meta(folder: Path) -> dict[str, Any]:
    """``posterior.json``, checked.

    Raises:
        ArchiveError: Missing, truncated, foreign, or of a newer format.
    """
    path = folder / "posterior.json"
    try:
        meta = json.loads(path.read_text())
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist: {folder} is not a folder that Posterior.save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict) or not {"format", "guide", "sites", "fingerprint"} <= meta.keys():
        raise ArchiveError(f"{path} is not a posterior of this package")
    if meta["format"] != FORMAT:
        raise ArchiveError(f"{path} has format {meta['format']}, this version reads {FORMAT}: update pyrolora")
    return meta


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``posterior.safetensors``.

    Raises:
        ArchiveError: Missing or damaged.
    """
    path = folder / "posterior.safetensors"
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist") from None
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"{path} is damaged or not a safetensors file: {error}") from error
