"""Whether a base model's weights are in shards over several processes, so that all must run it together."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    """Whether any module gathers its weights while it runs (``fully_shard``): no vmap, and no run of one process."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
