"""A posterior on disk: safetensors and JSON, nothing that executes."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyrolora.adapters.checkpoint import read_config
from pyrolora.adapters.sites import AdapterError
from pyrolora.guides.base import Guide
from pyrolora.likelihoods.base import Likelihood
from pyrolora.program import PyroLoRA

FORMAT = 2
READABLE = (1, 2)  # 1 has no checksums of posterior.json and adapter_config.json
_TENSORS, _META, _ADAPTER = "posterior.safetensors", "posterior.json", "adapter_config.json"
_NEW = ".new"  # the folder inside a folder in which new files are written before they are moved
_DEEPEST = 50  # levels of JSON: more than any ensemble of ensembles needs, far fewer than Python bears
_KINDS: dict[str, Any] = {"guides": Guide, "priors": Callable, "likelihoods": Likelihood}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "guide": dict,
    "priors": dict,
    "likelihood": dict,
    "num_data": int,
    "temperature": (int, float),
    "scaling": (int, float),
    "seed": int,
    "sites": dict,
    "fingerprint": str,
    "history": list,
    "sha256": str,
}


class ArchiveError(ValueError):
    """A posterior folder that cannot be read or written; the message names the file and the reason."""


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
    package, _, module = type(thing).__module__.partition(".")
    kind = module.partition(".")[0]
    if package != "pyrolora" or kind not in _KINDS:
        return {"custom": getattr(thing, "__name__", type(thing).__name__)}
    arguments = inspect.signature(type(thing)).parameters
    return {"class": f"{kind}.{type(thing).__name__}", "init": {n: describe(getattr(thing, n)) for n in arguments}}


def rebuild(description: Any, *, where: str) -> Any:
    """The inverse of `describe`; only public guides, priors and likelihoods of this package are ever constructed.

    Args:
        description: What JSON gave.
        where: The file, for messages.

    Raises:
        ArchiveError: An unknown class, arguments that its constructor refuses, or code that is not of this package.
    """
    if isinstance(description, list):
        return [rebuild(value, where=where) for value in description]
    if not isinstance(description, dict):
        return description
    if description.keys() == {"custom"}:
        raise ArchiveError(
            f"{where}: {description['custom']!r} is code of yours, which no file can hold. "
            "For a prior, give priors= again."
        )
    if "class" not in description:
        return {name: rebuild(value, where=f"{where}: {name}") for name, value in description.items()}
    found = _public_class(description["class"])
    init = description.get("init")
    if found is None or not isinstance(init, dict) or description.keys() != {"class", "init"}:
        raise ArchiveError(f"{where}: {description['class']!r} is not a class that a posterior may hold")
    arguments = {name: rebuild(value, where=f"{where}: {name}") for name, value in init.items()}
    with refusing(f"{where}: {description['class']} refuses its saved arguments"):
        return found(**arguments)


def _is_of_kind(description: Any, kind: str) -> bool:
    if not isinstance(description, dict):
        return False
    return description.keys() == {"custom"} or str(description.get("class")).startswith(f"{kind}.")


def _public_class(path: Any) -> type | None:
    """``"priors.Normal"`` → the class, if it is a guide, prior or likelihood that this package exports."""
    kind, _, name = path.partition(".") if isinstance(path, str) else ("", "", "")
    if kind not in _KINDS:
        return None
    package = import_module(f"pyrolora.{kind}")
    found = getattr(package, name) if name in package.__all__ else None
    # Beside the classes stand functions, aliases and errors: none of them is ever called because a file says so.
    return found if isinstance(found, type) and issubclass(found, _KINDS[kind]) else None


def write(folder: Path, *, state: Mapping[str, Tensor], meta: Mapping[str, Any], adapter: PeftConfig) -> None:
    """Writes ``posterior.safetensors``, ``adapter_config.json``, and ``posterior.json`` with the checksums of both.

    Where that fails, what was there before is untouched. After a kill at any moment the folder is read as the old
    posterior or as the new one: the new counts as soon as all its files are whole, moved to their places or not.

    Raises:
        ArchiveError: The folder cannot be written to, or the disk is full.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    if _is_pending(folder):
        with writing(folder):
            _move(folder / _NEW, folder, last=_META)
    with replacing_all(folder, last=_META) as new:
        save_file(tensors, str(new / _TENSORS))
        (new / _ADAPTER).write_text(_json(_plain(adapter.to_dict())), encoding="utf-8")
        sums = {"sha256": digest(new / _TENSORS), "adapter_sha256": digest(new / _ADAPTER)}
        for name in (_TENSORS, _ADAPTER):  # before there is a posterior.json by which they would be found
            _sync(new / name)
        (new / _META).write_text(_json(sealed({"format": FORMAT, **meta, **sums})), encoding="utf-8")


def sealed(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata with ``checksum``, the SHA-256 of all the rest of it."""
    rest = _finite({name: value for name, value in meta.items() if name != "checksum"})
    content = json.dumps(rest, sort_keys=True, allow_nan=False)
    return {**rest, "checksum": hashlib.sha256(content.encode()).hexdigest()}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all; numbers that are not finite become null."""
    with replacing(path) as new:
        new.write_text(_json(content), encoding="utf-8")


def read_meta(folder: Path) -> dict[str, Any]:
    """``posterior.json``, checked.

    Raises:
        ArchiveError: Missing, truncated, foreign, or of a newer format.
    """
    path = _place(folder, _META)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if _is_deep(meta):
            raise ValueError(f"it is nested more than {_DEEPEST} levels deep, which no posterior is")
    except FileNotFoundError:
        raise ArchiveError(
            f"{path} does not exist: {folder} is not a folder that Posterior.save_pretrained wrote{_instead(folder)}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} cannot be read: {error}") from error
    if not isinstance(meta, dict) or "format" not in meta:
        raise ArchiveError(f"{path} is not a posterior of this package")
    if meta["format"] not in READABLE:
        raise ArchiveError(f"{path} has format {meta['format']}, this version reads up to {FORMAT}: update pyrolora")
    if meta["format"] != 1 and sealed(meta)["checksum"] != meta.get("checksum"):
        raise ArchiveError(f"{path} is damaged, or was changed by hand: its content is not that of its checksum")
    meta.setdefault("scaling", 1.0)  # of files from before it could be stored
    fields = _FIELDS if meta["format"] == 1 else {**_FIELDS, "adapter_sha256": str}
    if wrong := [name for name, kind in fields.items() if not isinstance(meta.get(name), kind)]:
        raise ArchiveError(f"{path} is not a whole posterior: {', '.join(wrong)} missing or of another type")
    if not meta["scaling"] > 0:
        raise ArchiveError(f"{path}: the temperature of a predictive is positive, not {meta['scaling']}")
    if not (meta["num_data"] >= 1 and meta["temperature"] >= 0 and meta["seed"] >= 0):
        raise ArchiveError(f"{path}: num_data is at least 1, temperature and seed are at least 0")
    described = {"guide": (meta["guide"], "guides"), "likelihood": (meta["likelihood"], "likelihoods")}
    described |= {f"the prior for {name!r}": (prior, "priors") for name, prior in meta["priors"].items()}
    if foreign := [name for name, (description, kind) in described.items() if not _is_of_kind(description, kind)]:
        raise ArchiveError(f"{path}: {', '.join(foreign)}: another kind of thing stands there")
    return meta


def read_state(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``posterior.safetensors``, which must be those that ``posterior.json`` was written for.

    Raises:
        ArchiveError: Missing, damaged, or another posterior's.
    """
    path, expected = _place(folder, _TENSORS), read_meta(folder)["sha256"]
    try:
        if digest(path) != expected:
            raise ArchiveError(f"{path} is damaged, or not the file that {_META} belongs to (their SHA-256 differ)")
        with safe_open(str(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist{_instead(folder)}") from None
    except (OSError, SafetensorError) as error:
        raise ArchiveError(f"{path} is damaged or not a safetensors file: {error}") from error
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise ArchiveError(f"{path} holds NaN or infinity in {', '.join(bad[:5])}; fit the posterior again")
    return state


def read_adapter(folder: Path) -> LoraConfig:
    """The `peft.LoraConfig` of a posterior, which must be the one that ``posterior.json`` was written for.

    Raises:
        ArchiveError: Missing, damaged, or no configuration of LoRA.
    """
    path, meta = _place(folder, _ADAPTER), read_meta(folder)
    try:
        if meta["format"] != 1 and digest(path) != meta["adapter_sha256"]:
            raise ArchiveError(f"{path} is damaged, or not the file that {_META} belongs to (their SHA-256 differ)")
        return read_config(path.parent)
    except FileNotFoundError:
        raise ArchiveError(f"{path} does not exist{_instead(folder)}") from None
    except (OSError, AdapterError) as error:
        raise ArchiveError(f"{path} cannot be read: {error}") from error


def check_fits(program: PyroLoRA, meta: Mapping[str, Any], folder: Path) -> None:
    """Refuses a program that is not the one that a posterior was fitted with.

    Raises:
        ArchiveError: Other sites, or a base model with other weights.
    """
    sites = {name: list(site.shape) for name, site in program.sites.items()}
    if sites != meta["sites"]:
        raise ArchiveError(f"{folder}: made for sites {meta['sites']}, this base model has {sites}")
    if program.fingerprint != meta["fingerprint"]:
        raise ArchiveError(
            f"{folder}: the base model's weights are not those that the posterior was fitted on (their fingerprints "
            "differ). Load the same checkpoint; a head that is not in modules_to_save is initialised at random and "
            "cannot be the same twice."
        )


@contextlib.contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a block raises on content that this package did not write becomes an `ArchiveError`."""
    try:
        yield
    except Exception as error:
        raise ArchiveError(f"{what}: {str(error) or repr(error)}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever keeps a block from writing to a file or folder becomes an `ArchiveError` that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ArchiveError(
            f"{path} cannot be written: {error}. What was there before is untouched; make room, or choose another "
            "folder"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes its place at the end of a block that did not raise.

    Raises:
        ArchiveError: The file cannot be written, or the disk is full.
    """
    new = path.with_name(f".{path.name}.new")  # what a kill leaves is not taken for one of the files
    with writing(path):
        try:
            yield new
            _sync(new)
            os.replace(new, path)
        finally:
            new.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_all(folder: Path, *, last: str) -> Iterator[Path]:
    """A folder to write files to, which take their places in ``folder`` at the end of a block that did not raise.

    Args:
        folder: Made where there is none.
        last: The file that is moved last.

    Raises:
        ArchiveError: The folder cannot be written to, or the disk is full.
    """
    new = folder / _NEW
    files: list[Path] = []
    with writing(folder):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            yield new
            files = list(new.iterdir())
            for file in files:
                _sync(file)
            _move(new, folder, last=last)
        except BaseException:
            if all(file.exists() for file in files):  # else the old ones are no longer whole, and the new are needed
                shutil.rmtree(new, ignore_errors=True)
            raise


def _move(new: Path, folder: Path, *, last: str) -> None:
    for file in sorted(new.iterdir(), key=lambda file: file.name == last):
        os.replace(file, folder / file.name)
    new.rmdir()


def _sync(file: Path) -> None:
    """What is moved into its place must be on the disk before."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _is_pending(folder: Path) -> bool:
    """Whether a write was killed when all its files were whole, but not all of them in their places."""
    try:
        meta = json.loads((folder / _NEW / _META).read_text(encoding="utf-8"))
        if _is_deep(meta) or sealed(meta)["checksum"] != meta["checksum"]:
            return False
        sums = {_TENSORS: meta["sha256"], _ADAPTER: meta["adapter_sha256"]}
        places = {name: folder / _NEW if (folder / _NEW / name).is_file() else folder for name in sums}
        return all(digest(places[name] / name) == expected for name, expected in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _place(folder: Path, name: str) -> Path:
    """Where a file of a posterior is: in its place, or still where a write that was killed has left it whole."""
    new = folder / _NEW / name
    return new if new.is_file() and _is_pending(folder) else folder / name


def _instead(folder: Path) -> str:
    """What a folder holds, for who renamed a file."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    more = ", ..." if len(names) > 8 else ""
    return f"; files keep the names that they were given, and there are {', '.join(names[:8])}{more}" if names else ""


def _is_deep(content: Any) -> bool:
    """Whether JSON is nested deeper than is read; without recursion."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [v for c in level if isinstance(c, dict | list) for v in (c.values() if isinstance(c, dict) else c)]
    return bool(level)


def _json(content: Any) -> str:
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's own form of a configuration in JSON; in a fixed order, which its sets do not have."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in sorted(config.items())}


def _finite(content: Any) -> Any:
    """JSON has no NaN: a log may hold one, and must not keep a posterior from being saved."""
    if isinstance(content, Mapping):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
