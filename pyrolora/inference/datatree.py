"""From a posterior to ArviZ: draws with named dimensions, log-likelihood, predictive, prior and observed data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from arviz_base import from_dict
from pyro import poutine
from torch import Tensor
from xarray import DataTree

from pyrolora.adapters.sites import SiteGroup
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.program import Latent, PyroLoRA

MAX_ELEMENTS = 20_000_000


def select(sites: Mapping[str, Latent], var_names: str | Sequence[str] | None) -> list[Latent]:
    """The sites whose names match the patterns, all of them for None.

    Raises:
        ValueError: A pattern without a match.
    """
    patterns = ["*"] if var_names is None else [var_names] if isinstance(var_names, str) else list(var_names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in sites):
            raise ValueError(f"var_names: {pattern!r} matches no site; the sites are {', '.join(sites)}")
    return [x for x in sites.values() if any(fnmatchcase(x.name, p) for p in patterns)]


def check_size(latents: Iterable[Latent], num_draws: int) -> None:
    """Refuses a tree that would not fit.

    Raises:
        ValueError: More than 20 million numbers a group; says which sites are the largest.
    """
    sizes = {latent.name: latent.shape.numel() * num_draws for latent in latents}
    if sum(sizes.values()) > MAX_ELEMENTS:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ValueError(
            f"{sum(sizes.values()):,} numbers in one group are too many for a DataTree (at most {MAX_ELEMENTS:,}). "
            f"Choose sites with var_names or fewer draws; the largest are {', '.join(largest)}."
        )


def prior_draws(
    prior: Callable[[], Any], latents: Sequence[Latent], *, num_draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Draws of the sites from their priors, ``(1, S, *shape)``; sites with a flat prior have none.

    ``prior`` is the sampling part of the program: it draws every site.
    """
    proper = [latent.name for latent in latents if not latent.flat]
    rows = []
    for s in range(num_draws if proper else 0):
        with torch.no_grad(), poutine.block(), isolated(spawn(seed, s)):
            nodes: Any = poutine.trace(prior).get_trace().nodes
        rows.append({name: nodes[name]["value"] for name in proper})
    return {name: as_chain(torch.stack([row[name] for row in rows])) for name in proper}


def build(
    program: PyroLoRA,
    latents: Sequence[Latent],
    groups: Mapping[str, Mapping[str, np.ndarray]],
    attributes: Mapping[str, Any],
) -> DataTree:
    """Assembles the tree with named dimensions and layer coordinates."""
    # Numbers of each input are of the layers of a site, whose name theirs begins with.
    inputs = {name: program.latents[name.rpartition(".")[0]] for name in groups.get("constant_data", {})}
    rows = [replace(owner, name=name, shape=owner.shape[:1]) for name, owner in inputs.items()]
    dims, coords = _dimensions([*latents, *rows])
    data_dims = {program.likelihood.site: ["example"], **{name: ["example", *dims[name]] for name in inputs}}
    filled = {name: dict(group) for name, group in groups.items() if group}
    return from_dict(filled, dims={**dims, **data_dims}, coords=coords, attrs={"/": dict(attributes)})


def as_chain(draws: Tensor) -> np.ndarray:
    """Adds ArviZ's chain dimension: draws of a guide are independent, so they are one chain."""
    return draws.detach().cpu().numpy()[None]


def _dimensions(latents: Sequence[Latent]) -> tuple[dict[str, list[str]], dict[str, list[int]]]:
    """Names of the dimensions of each site; a name that would need two sizes is qualified by its site."""
    plain = {latent.name: _own_dims(latent) for latent in latents}
    meanings: dict[str, set[tuple[int, ...]]] = {}
    for latent in latents:
        for dim, size in zip(plain[latent.name], latent.shape, strict=True):
            meanings.setdefault(dim, set()).add(_coordinate(latent, dim, size))
    dims: dict[str, list[str]] = {}
    coords: dict[str, list[int]] = {}
    for latent in latents:
        names = []
        for dim, size in zip(plain[latent.name], latent.shape, strict=True):
            name = dim if len(meanings[dim]) == 1 else f"{latent.name}.{dim}"
            coords[name] = list(_coordinate(latent, dim, size))
            names.append(name)
        dims[latent.name] = names
    return dims, coords


def _own_dims(latent: Latent) -> tuple[str, ...]:
    if latent.group is not None:
        if latent.shape == latent.group.shape:
            return latent.group.dims
        return [("layer",), ("layer", "rank"), ("layer", "row", "column")][len(latent.shape) - 1]
    names = ("layer", "rank") if latent.name.startswith("lora.") else ()
    return names[: len(latent.shape)] or tuple(f"{latent.name}.dim_{i}" for i in range(len(latent.shape)))


def layer_numbers(group: SiteGroup) -> tuple[int, ...]:
    """The numbers that the base model gives a site's layers; 0, 1, ... where it has none, or the same for two."""
    numbers = [re.findall(r"\.(\d+)\.", f".{layer}.") for layer in group.layers]
    found = tuple(int(n[0]) if n else -1 for n in numbers)
    return found if group.role != "head" and len(set(found)) == len(found) else tuple(range(len(found)))


def _coordinate(latent: Latent, dim: str, size: int) -> tuple[int, ...]:
    if dim == "layer" and latent.group is not None and latent.group.num_layers == size:
        return layer_numbers(latent.group)
    return tuple(range(size))
