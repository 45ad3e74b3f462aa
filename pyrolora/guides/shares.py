"""Curvature in shares: each of several processes takes some of the rows, and all end with the sum over all rows."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, distributed

from pyrolora.adapters.shards import is_sharded
from pyrolora.adapters.sites import SiteGroup
from pyrolora.guides.curvature import curvature
from pyrolora.guides.factors import Factors
from pyrolora.program import PyroLoRA


def shared_curvature(
    program: PyroLoRA, values: Mapping[str, Tensor], sites: Sequence[SiteGroup], data: Dataset, **options: Any
) -> tuple[dict[str, Factors], Tensor]:
    """`curvature` of all rows, of which each of n processes that fit together takes every n-th.

    Every process merges all parts in the same order, so that all hold the same bits; their random states move on
    alike. Factors of low rank are truncated once more than by one process. A base in shards runs in all processes
    together: there each takes all rows.

    Args:
        program, values, sites, data, options: As of `curvature`.
    """
    count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if count == 1 or is_sharded(program.model):
        return curvature(program, values, sites, data, **options)
    own = data.select(range(distributed.get_rank(), len(data), count))
    devices = [program.device] if program.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        part = curvature(program, values, sites, own, **options)
    buffer = io.BytesIO()
    torch.save(part, buffer)
    parts: list[Any] = [None] * count
    distributed.all_gather_object(parts, buffer.getvalue())
    loaded = [torch.load(io.BytesIO(p), map_location=program.device, weights_only=False) for p in parts]
    (found, total), *others = loaded
    for more, further in others:
        found = {name: factors.merge(more[name]) for name, factors in found.items()}
        total = total + further
    return found, total
