"""The most memory that a block of code takes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """The peak of a block; None until it ends, and where the system does not tell."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory() -> Iterator[Peak]:
    """Measures a block: on an accelerator what torch allocated there, else the resident memory of the whole process.

    The latter counts what was there before the block, too (the interpreter, the libraries, the data), and is known on
    Linux only.
    """
    peak = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated()
        return
    try:
        _RESET.write_text("5", encoding="ascii")  # the kernel's high-water mark starts anew
        known = True
    except OSError:
        known = False
    yield peak
    found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE) if known else None
    peak.bytes = int(found[1]) * 1024 if found else None
