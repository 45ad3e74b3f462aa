"""Whether a base is in shards; that a sharded one says so is in tests/inference/test_sharding.py."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

from pyrolora.adapters.shards import is_sharded
from tests.programs import tiny_program


class Gathering(FSDPModule, nn.Linear):
    """What `fully_shard` makes of a linear map's class."""

    def __new__(cls, *args: object, **kwargs: object) -> Gathering:
        return nn.Linear.__new__(cls)


def test_one_sharded_module_is_enough() -> None:
    """Law: a model is in shards as soon as one of its modules is."""
    model = tiny_program().model
    assert not is_sharded(model)
    model.get_base_model().bert.pooler.dense = Gathering(16, 16)
    assert is_sharded(model)
