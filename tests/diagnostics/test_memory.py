from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from pyrolora.diagnostics import memory
from pyrolora.diagnostics.memory import peak_memory

MEGABYTE = 2**20


@pytest.mark.skipif(platform.system() != "Linux" or torch.cuda.is_available(), reason="resident memory, Linux only")
def test_each_block_has_its_own_peak() -> None:
    """Law: memory that a block takes and gives back is in its peak, and not in the next block's."""
    with peak_memory() as large:
        block = bytearray(200 * MEGABYTE)
        block[:: 2**12] = bytes([1]) * len(block[:: 2**12])
        del block
    with peak_memory() as small:
        pass
    if large.bytes is None or small.bytes is None:
        pytest.skip("this system does not let a process reset its peak")
    assert large.bytes - small.bytes > 150 * MEGABYTE


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator tells by other means")
def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: where the peak cannot be reset, or has another name, it is unknown, and the block runs all the same."""
    monkeypatch.setattr(memory, "_RESET", tmp_path / "none" / "clear_refs")
    with peak_memory() as peak:
        ran = True
    assert ran and peak.bytes is None
    monkeypatch.setattr(memory, "_RESET", tmp_path / "clear_refs")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "status").write_text("Name: x\n")
    with peak_memory() as peak:
        pass
    assert peak.bytes is None
