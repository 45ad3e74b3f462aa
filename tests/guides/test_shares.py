"""Curvature by several processes: the parts of all, merged in the same order everywhere. Real processes fit Laplace in
tests/inference/test_processes.py and test_sharding.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyrolora.guides import shares
from pyrolora.guides.curvature import curvature
from pyrolora.guides.factors import Factors
from pyrolora.guides.shares import shared_curvature
from tests.guides.test_curvature import at_map, dense
from tests.programs import tiny_program


class Processes:
    """What `torch.distributed` says to process ``rank`` of ``count``, of which the others have run before."""

    def __init__(self, count: int):
        self.rank, self.count, self.sent = 0, count, {}

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.count

    def get_rank(self) -> int:
        return self.rank

    def all_gather_object(self, parts: list[Any], own: bytes) -> None:
        self.sent[self.rank] = own
        parts[:] = [self.sent.get(rank, own) for rank in range(self.count)]


def result(**options: Any) -> tuple[dict[str, Factors], torch.Tensor]:
    program = tiny_program()
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.train is not None
    return shared_curvature(program, at_map(program), sites, program.task.train, **options)


@pytest.mark.parametrize("count", [2, 5, 30])
@pytest.mark.parametrize("structure", ["dense", "diagonal", "low_rank"])
def test_all_processes_end_with_the_whole(count: int, structure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: every process ends with the same bits, which are the factors of all rows, though some have no row at all."""
    alone, total = result(structure=structure, rank=16)
    world = Processes(count)
    monkeypatch.setattr(shares, "distributed", world)
    for world.rank in range(count):
        result(structure=structure, rank=16)
    ends = []
    for world.rank in (0, count - 1):
        state = torch.get_rng_state()
        ends.append(result(structure=structure, rank=16))
        assert torch.equal(torch.get_rng_state(), state)
    (first, log_likelihood), (last, _) = ends
    assert torch.allclose(log_likelihood, total, rtol=1e-5)
    for name, expected in alone.items():
        for mine, other, its in zip(parts(first[name]), parts(last[name]), parts(expected), strict=True):
            assert torch.equal(mine, other)
            assert torch.allclose(mine, its, rtol=1e-3, atol=1e-4 * float(its.abs().max()))


def parts(factors: Any) -> list[torch.Tensor]:
    return [factors.total] if hasattr(factors, "total") else list(dense(factors))


def test_each_takes_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: process r of n takes the rows r, r + n, …; over a base in shards all take all rows, without a gathering."""
    seen: list[list[str]] = []

    def watched(program: Any, values: Any, sites: Any, data: Any, **options: Any) -> Any:
        seen.append(data["text"][:])
        return curvature(program, values, sites, data, **options)

    task = tiny_program().task
    assert task is not None and task.train is not None
    texts = task.train["text"][:]
    monkeypatch.setattr(shares, "curvature", watched)
    result()
    world = Processes(3)
    monkeypatch.setattr(shares, "distributed", world)
    for world.rank in range(3):
        result()
    monkeypatch.setattr(shares, "is_sharded", lambda model: True)
    monkeypatch.setattr(world, "all_gather_object", None)
    result()
    assert seen == [texts, texts[0::3], texts[1::3], texts[2::3], texts]
