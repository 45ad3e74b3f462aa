from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

from pyrolora.inference.randomness import isolated, spawn


def states() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def consume() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("seed", [None, 0, 7, 2**32 + 5, 2**63 - 1])
def test_the_callers_generators_are_bitwise_as_before(seed):
    """Law: after the block, Python's, NumPy's and torch's generators are in the very state they were in before."""
    before = states()
    with isolated(seed):
        consume()
    assert states() == before


def test_also_when_the_block_raises():
    """Law: an exception passes through unchanged, and leaves the three generators as they were."""
    before = states()
    with pytest.raises(KeyError, match="mine"), isolated(3):
        consume()
        raise KeyError("mine")
    assert states() == before


def test_a_seed_decides_the_block():
    """Law: the same seed gives the same numbers of all three generators, another seed gives others."""
    out = []
    for seed in (5, 5, 6):
        random.seed(len(out)), np.random.seed(len(out)), torch.manual_seed(len(out))
        with isolated(seed):
            out.append(consume())
    assert out[0] == out[1] and all(a != b for a, b in zip(out[0], out[2], strict=True))


def test_without_a_seed_the_present_states_continue():
    """Law: seed=None runs the block from the caller's own states, and the caller draws the same again."""
    with isolated(None):
        inside = consume()
    assert consume() == inside


def test_blocks_nest():
    """Law: an inner block leaves the outer block's stream as it was."""
    with isolated(1):
        plain = consume(), consume()
    with isolated(1):
        first = consume()
        with isolated(2):
            consume()
        assert (first, consume()) == plain


def test_isolation_is_quiet():
    """Law: isolating warns of nothing, however many devices there are."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with isolated(0):
            pass


def test_seeds_of_a_family_are_distinct():
    """Law: spawn is injective over seeds and indices as far as one looks, and gives what every generator accepts."""
    seeds = [*range(40), 2**31, 2**32, 2**32 + 1, 2**63 - 1]
    children = {spawn(seed, index) for seed in seeds for index in range(50)}
    assert len(children) == len(seeds) * 50
    assert all(0 <= child < 2**63 for child in children)


def test_large_seeds_do_not_alias_indices():
    """Law: a seed above 2³² is not the child of a small seed: (s + 2³²i, 0) and (s, i) are two families."""
    assert all(spawn(5 + 2**32 * i, 0) != spawn(5, i) for i in range(1, 20))


def test_draw_s_does_not_depend_on_how_many_there_are():
    """Law: item s of a family is a function of (seed, s) alone: 4 draws are the first 4 of 16, in any order."""

    def draw(s: int) -> torch.Tensor:
        with isolated(spawn(11, s)):
            return torch.randn(3)

    torch.manual_seed(0)
    few = torch.stack([draw(s) for s in range(4)])
    torch.manual_seed(1)
    many = {s: draw(s) for s in reversed(range(16))}
    assert torch.equal(few, torch.stack([many[s] for s in range(4)]))


def test_families_are_uncorrelated():
    """Law: first numbers of 4000 spawned streams are independent uniforms: mean, variance, lag-1 correlation."""
    first = np.array([np.random.default_rng(spawn(3, s)).random() for s in range(4000)])
    assert abs(first.mean() - 0.5) < 5 * np.sqrt(1 / 12 / 4000)
    assert abs(first.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / 4000)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / np.sqrt(4000)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seeds_are_refused(seed, index):
    """Law: a negative seed or index is an error that shows both."""
    with pytest.raises(ValueError, match=f"not {seed} and {index}"):
        spawn(seed, index)
