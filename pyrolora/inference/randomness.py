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

    Args:
        seed: Of the family, an integer ≥ 0.
        index: Of the item, an integer ≥ 0.

    Returns:
        An integer in [0, 2⁶³).
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index are integers ≥ 0, not {seed} and {index}")
    # A spawn key, not a second word of entropy: SeedSequence([s, i]) is the same for (s + 2³²i, 0).
    return int(np.random.SeedSequence(seed, spawn_key=(index,)).generate_state(1, np.uint64)[0] >> 1)
