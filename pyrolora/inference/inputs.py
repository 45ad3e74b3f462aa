"""What a guide with local latent variables says of each input by itself."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from pyrolora.guides.base import Guide
from pyrolora.inference.predict import Runner
from pyrolora.program import Batch, PyroLoRA


@torch.no_grad()
def describe_inputs(program: PyroLoRA, guide: Guide, data: Dataset, *, batch_size: int = 32) -> dict[str, Tensor]:
    """`Guide.describe_inputs` of a whole data set: the α of every layer of `InputAdaptive`, for instance.

    Returns:
        ``{name: (n, layers)}`` in the order of the data; empty for guides without local latent variables.
    """
    widths: dict[str, int] = {}

    def joined(_: Any, batch: Batch) -> Tensor:
        found = guide.describe_inputs(batch)
        widths.update({name: value.shape[-1] for name, value in found.items()})
        size = len(next(iter(batch.values())))
        return torch.cat([torch.zeros(size, 0, device=program.device), *found.values()], -1)

    if not guide.local_sites():
        return {}
    parts, order = [], []
    for rows, values in Runner(program, {}, {}).run(joined, data, batch_size=batch_size):
        parts.append(values[0].cpu())
        order += rows
    sorted_ = torch.cat(parts)[torch.argsort(torch.tensor(order))]
    return dict(zip(widths, sorted_.split(list(widths.values()), -1), strict=True))
