from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from pyrolora.diagnostics import bootstrap


def rows(sizes: list[int], num_bootstrap: int = 7, **options: int) -> list[np.ndarray]:
    found = bootstrap.resamples(sizes, num_bootstrap=num_bootstrap, seed=3, **options)
    return [np.concatenate(group) for group in zip(*found, strict=True)]


def test_resamples_do_not_depend_on_chunks_and_groups_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same rows come however many are drawn at once; each group keeps its size and has rows of its own."""
    whole = rows([9, 9, 4])
    monkeypatch.setattr(bootstrap, "_CHUNK", 50)
    for options in ({}, {"columns": 2}):
        for first, second in zip(whole, rows([9, 9, 4], **options), strict=True):
            np.testing.assert_array_equal(first, second)
    assert [group.shape for group in whole] == [(7, 9), (7, 9), (7, 4)]
    assert [group.max() for group in whole] == [8, 8, 3]
    assert (whole[0] != whole[1]).any()
    np.testing.assert_array_equal(whole[0], rows([9])[0])


def test_columns_bound_what_is_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: rows × columns of a piece stay below the limit, one resample at least."""
    monkeypatch.setattr(bootstrap, "_CHUNK", 60)
    for columns, size in ((1, 6), (3, 2), (100, 1)):
        pieces = [piece for (piece,) in bootstrap.resamples([10], num_bootstrap=6, seed=0, columns=columns)]
        assert {len(piece) for piece in pieces} == {size}


@pytest.mark.parametrize("kind", ["percentile", "basic"])
def test_intervals_agree_with_scipy(kind: str) -> None:
    """Law: both kinds of interval are scipy's on the same resampled values, up to its interpolation."""
    data = np.random.default_rng(1).gamma(2.0, 1.0, 200)
    theirs = scipy_bootstrap((data,), np.mean, n_resamples=4000, method=kind, random_state=0)
    ours = getattr(bootstrap, f"{kind}_estimate")(data.mean(), theirs.bootstrap_distribution)
    assert ours.value == data.mean()
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=2e-3)


def test_intervals_of_infinite_and_vanishing_values() -> None:
    """Law: infinity stays infinity and makes no NaN; a basic interval ends at 0; a single resample is a point."""
    mixed = [0.5] * 90 + [math.inf] * 10
    assert bootstrap.percentile_estimate(math.inf, mixed) == bootstrap.Estimate(math.inf, 0.5, math.inf)
    assert bootstrap.basic_estimate(0.1, [0.3] * 9) == bootstrap.Estimate(0.1, 0.0, 0.0)
    assert bootstrap.percentile_estimate(0.2, [0.3]) == bootstrap.Estimate(0.2, 0.3, 0.3)
    assert bootstrap.Estimate(1.0, 0.5, 2.0).to_dict() == {"value": 1.0, "low": 0.5, "high": 2.0}


def test_no_resamples_are_refused() -> None:
    """Law: an interval needs at least one resample."""
    with pytest.raises(ValueError, match="num_bootstrap"):
        rows([3], 0)
