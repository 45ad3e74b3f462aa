"""Whose uncertainty ranks errors better: AUROC of errors by saved posteriors of `guides_table.py`, two by two.

Run: python tests/benchmarks/guides_table.py --tasks commonsense sst2 cola clinc150 --data DATA --output runs/table
     python tests/benchmarks/error_ranking.py runs/table --methods flat-InputAdaptive flat-Ensemble
Each posterior's errors are its own. The interval is a 95 % bootstrap over test rows, which the seeds of a task share.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import rankdata
from tqdm.auto import tqdm

from pyrolora.saved import load


def auroc(score: np.ndarray, wrong: np.ndarray) -> float:
    """That errors score higher than right answers; NaN where there are none of either."""
    errors = wrong.sum()
    pairs = errors * (len(wrong) - errors)
    return float((rankdata(score)[wrong].sum() - errors * (errors + 1) / 2) / pairs) if pairs else float("nan")


def difference(
    ours: list[tuple[np.ndarray, np.ndarray]], others: list[tuple[np.ndarray, np.ndarray]], num_bootstrap: int = 2000
) -> tuple[float, float, float, float, float]:
    """Means of AUROC over seeds, their difference and its interval.

    Args:
        ours: Of each seed the scores and whether each row is wrong, ``(n,)`` both; rows are the same in all.
        others: The same of another method.
    """
    generator = np.random.default_rng(0)
    n = len(ours[0][0])

    def means(rows: np.ndarray) -> list[float]:
        return [float(np.nanmean([auroc(s[rows], w[rows]) for s, w in method])) for method in (ours, others)]

    first, second = means(np.arange(n))
    resampled = np.array([means(generator.integers(0, n, n)) for _ in range(num_bootstrap)])
    low, high = np.percentile(resampled[:, 0] - resampled[:, 1], [2.5, 97.5])
    return first, second, first - second, float(low), float(high)


def scores(folder: Path, num_draws: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Scores of one saved posterior: doubt by confidence and by mutual information, and the mean α of each site."""
    posterior, task = load(folder)
    prediction = posterior.predict(task.test, num_draws)
    wrong = prediction.log_mean.argmax(-1).numpy() != np.asarray(prediction.labels)
    found = {"confidence": -prediction.log_mean.amax(-1), "mutual information": prediction.mutual_information}
    found |= {name: value.mean(-1) for name, value in prediction.inputs.items()}
    return {name: (value.double().numpy(), wrong) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with a folder for each task, fits/<method>-seed<k> in each")
    parser.add_argument("--methods", nargs=2, default=["flat-InputAdaptive", "flat-Ensemble"])
    parser.add_argument("--tasks", nargs="+", default=["commonsense", "sst2", "cola", "clinc150"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-draws", type=int, default=10, help="an ensemble takes one of each member")
    args = parser.parse_args()
    places = {
        (task, method, seed): args.folder / task / "fits" / f"{method}-seed{seed}"
        for task in args.tasks
        for method in args.methods
        for seed in args.seeds
    }
    if missing := [str(place) for place in places.values() if not place.is_dir()]:
        parser.error(f"no posterior in {', '.join(missing[:3])}: run guides_table.py first")
    found = {key: scores(place, args.num_draws) for key, place in tqdm(places.items(), desc="posteriors")}
    for task in args.tasks:
        ours, others = ([found[task, method, seed] for seed in args.seeds] for method in args.methods)
        for name in ("confidence", "mutual information"):
            first, second, *rest = difference([seed[name] for seed in ours], [seed[name] for seed in others])
            print(f"{task}, {name}: {first:.3f} and {second:.3f}, {rest[0]:+.3f} [{rest[1]:+.3f}, {rest[2]:+.3f}]")
        for name in ours[0].keys() - {"confidence", "mutual information"}:
            print(f"{task}, {name}: {', '.join(f'{auroc(*seed[name]):.3f}' for seed in ours)}")


if __name__ == "__main__":
    main()
