from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pyrolora.adapters.sites import SiteGroup

DIMS = {"A": ("rank", "in_feature"), "B": ("out_feature", "rank"), "head": ("out_feature", "in_feature")}


@pytest.fixture
def group() -> Callable[..., SiteGroup]:
    """Makes a site group without a model: ``group("A", layers, rows, columns)``; a head with one size is a bias."""

    def make(role: str, *shape: int) -> SiteGroup:
        dims = DIMS[role] if len(shape) == 3 else ("feature",)
        return SiteGroup(
            name=f"lora.query.{role}" if role != "head" else "head.classifier.weight",
            role=role,
            holders=tuple((f"encoder.{i}", "weight") for i in range(shape[0])),
            layers=tuple(f"encoder.{i}" for i in range(shape[0])),
            shape=torch.Size(shape),
            dims=("layer", *dims),
            scaling=(1.0,) * shape[0],
            dtype=torch.float32,
        )

    return make
