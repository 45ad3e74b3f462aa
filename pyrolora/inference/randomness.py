"""Randomness that stays inside: the library never leaves the caller's generators changed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


@contextlib.contextmanager
def isolated(seed: int | None = None) -> Iterator[None]:
    """Runs a block with its own random state; Python's, NumPy's and torch's generators are as before afterwards.

    Args:
        seed: Seeds all three inside the block; None keeps their present states.
    """
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def spawn(seed: int, index: int) -> int:
    """The seed of item ``index`` of a family, independent of how many items there are.

    Draw 3 of 4 is therefore draw 3 of 16: common random numbers for all inputs and sizes.
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)
