"""What a guide with local latent variables says of each input by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor

from pyrolora.guides.base import Guide
from pyrolora.inference.predict import Runner
from pyrolora.program import PyroLoRA


@torch.no_grad()
def describe_inputs(program: PyroLoRA, guide: Guide, data: Dataset, *, batch_size: int = 32) -> dict[str, Tensor]:
    """`Guide.describe_inputs` of a whole data set: the α of every layer of `InputAdaptive`, for instance.

    Returns:
        ``{name: (n, layers)}`` in the order of the data; empty for guides without local latent variables.
    """
    if not guide.local_sites():
        return {}
    parts, order = [], []
    for rows, batch in Runner(program, {}, {}).batches(data, batch_size=batch_size):
        parts.append(guide.describe_inputs(batch))
        order += rows
    return in_order(parts, order)


def in_order(parts: Sequence[Mapping[str, Tensor]], order: Sequence[int]) -> dict[str, Tensor]:
    """Batches of ``{name: (b, ...)}`` as one, on the CPU, row ``order[i]`` being the i-th of them."""
    back = torch.argsort(torch.tensor(order))
    return {name: torch.cat([part[name].cpu() for part in parts])[back] for name in parts[0]}
