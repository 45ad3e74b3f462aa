"""Saved posteriors back on their base models; what their files describe cannot be much larger than the files."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyrolora.adapters.limits import check_patterns, limited
from pyrolora.guides.base import Guide
from pyrolora.guides.ensemble import Ensemble
from pyrolora.inference import archive
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.program import PyroLoRA

# An inducing matrix stands for many more weights than it has: at most for a layer's width, a hundred thousand.
_WIDEST = 2**17


def restore(
    folder: Path, base_model: nn.Module, priors: Mapping[str, Prior] | None = None
) -> tuple[PyroLoRA, Guide, dict[str, Any]]:
    """A saved posterior's program on its base model, its guide, and the rest of ``posterior.json``.

    Raises:
        ArchiveError: See `Posterior.from_pretrained`.
    """
    meta, state = archive.read_meta(folder), archive.read_state(folder)
    where = str(folder / "posterior.json")
    if priors is None:
        priors = archive.rebuild(meta["priors"], where=where)
    config = archive.read_adapter(folder)
    likelihood = archive.rebuild(meta["likelihood"], where=where)
    with archive.refusing(f"{folder} does not fit this base model"), isolated(0):
        check_patterns(config, base_model)
        with limited(_weights(meta["sites"], state)):
            program = PyroLoRA(base_model, config, priors=priors, likelihood=likelihood, num_data=meta["num_data"])
    archive.check_fits(program, meta, folder)
    guide = archive.rebuild(meta["guide"], where=where)
    with archive.refusing(f"{folder / 'posterior.safetensors'} does not fit its posterior.json"):
        restored(guide, program, state)
    return program, guide.to(program.device).eval(), meta


def restored(guide: Guide, program: PyroLoRA, state: Mapping[str, Tensor]) -> Guide:
    """Binds a guide to a program and gives it its tensors, the members of an ensemble one after another.

    Args:
        guide: As constructed from a file; changed and returned.
        program: That it was fitted to.
        state: Its ``state_dict``.

    Raises:
        AdapterError: The guide would be far larger than its tensors are.
        RuntimeError: Other tensors than it needs.
    """
    if isinstance(guide, Ensemble):
        own = _by_member(guide, state)
        templates = guide.guide if isinstance(guide.guide, list) else itertools.repeat(guide.guide)
        guide.latents = dict(program.latents)
        # zip ends with the members in the file, of which there are as many as the guide says.
        guide.members = nn.ModuleList(restored(copy.deepcopy(t), program, s) for s, t in zip(own, templates))  # noqa: B905
        return guide
    with limited(_numbers(state) + sum(latent.shape.numel() for latent in program.latents.values())):
        guide.bind(program)
    guide.load_state_dict(state)
    return guide


def _by_member(guide: Ensemble, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """``members.3.points.x`` → ``points.x`` of member 3."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        root, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        found.setdefault(index if root == "members" else "", {})[inner] = value
    if len(found) != guide.size or any(str(i) not in found for i in range(len(found))):
        raise RuntimeError(f"an ensemble of {guide.size} members, of which {len(found)} have tensors")
    return [found[str(i)] for i in range(guide.size)]


def _numbers(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in state.values())


def _weights(sites: Mapping[str, Any], state: Mapping[str, Tensor]) -> int:
    """How many weights the sites of a saved posterior have, unless tensors of this size cannot describe so many."""
    weights = sum(math.prod(map(int, shape)) for shape in sites.values())
    if weights > max(10**8, _WIDEST * _numbers(state)):
        raise ValueError(f"its sites have {weights:,} weights, its tensors {_numbers(state):,} numbers")
    return weights
