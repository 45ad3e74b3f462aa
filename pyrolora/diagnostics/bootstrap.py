"""The bootstrap over examples: resamples that all statistics share, and 95 % intervals from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TAILS = (0.025, 0.975)
_CHUNK = 1_000_000  # numbers gathered at once: 8 MB an array


@dataclass(frozen=True)
class Estimate:
    """A statistic on the given examples and its 95 % bootstrap interval, in the units of the statistic."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """The three numbers by name, ready for JSON (which Python writes with `Infinity` where the NLL is infinite)."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Resampled:
    """A statistic on the given examples, and on each resample of them: `samples` (B,), in the order of `resamples`."""

    value: float
    samples: FloatArray


def resamples(sizes: Sequence[int], *, num_bootstrap: int, seed: int, columns: int = 1) -> Iterator[list[IntArray]]:
    """Row numbers drawn with replacement within each group, some resamples at a time.

    Yields for each group g an array (b, sizes[g]), `num_bootstrap` rows in all. Groups are resampled independently and
    keep their sizes. The same seed gives the same rows for the same size of the first group, whoever asks: statistics
    of different predictors on the same examples are therefore paired.

    Args:
        sizes: of the groups.
        num_bootstrap: resamples.
        seed: of the rows.
        columns: how many numbers are gathered for a row; bounds memory, changes nothing else.

    Raises:
        ValueError: num_bootstrap < 1.
    """
    if num_bootstrap < 1:
        raise ValueError(f"num_bootstrap must be at least 1; got {num_bootstrap}.")
    first = np.random.default_rng(seed)
    generators = [first, *first.spawn(len(sizes) - 1)]
    chunk = max(1, _CHUNK // (sum(sizes) * columns))
    for start in range(0, num_bootstrap, chunk):
        count = min(chunk, num_bootstrap - start)
        yield [
            generator.integers(0, size, size=(count, size)) for generator, size in zip(generators, sizes, strict=True)
        ]


def percentile_estimate(value: float, resampled: ArrayLike) -> Estimate:
    """A statistic and its 95 % percentile interval, [q.025, q.975] of its resampled values (B,).

    Source: Davison & Hinkley 1997, sec. 5.3.
    """
    low, high = _tails(resampled)
    return Estimate(value, low, high)


def basic_estimate(value: float, resampled: ArrayLike) -> Estimate:
    """A statistic v ≥ 0 and its 95 % basic interval, [2v − q.975, 2v − q.025] cut at 0, of resampled values (B,).

    It corrects for a bias that resampling adds once more to the one that the statistic has already, and may therefore
    lie partly or wholly below v.

    Source: Davison & Hinkley 1997, sec. 5.2.
    """
    low, high = _tails(resampled)
    return Estimate(value, max(0.0, 2 * value - high), max(0.0, 2 * value - low))


def _tails(resampled: ArrayLike) -> tuple[float, float]:
    # Order statistics, no interpolation: between inf and inf there is only NaN.
    low, high = np.quantile(np.asarray(resampled, dtype=np.float64), TAILS, method="inverted_cdf")
    return float(low), float(high)
