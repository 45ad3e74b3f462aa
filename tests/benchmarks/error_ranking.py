"""Whose uncertainty ranks errors better: AUROC of errors by saved posteriors of `guides_table.py`, two by two.

Run: python tests/benchmarks/guides_table.py --tasks commonsense sst2 cola clinc150 --data DATA --output runs/table
     python tests/benchmarks/error_ranking.py runs/table --methods flat-InputAdaptive flat-Ensemble
Each posterior's errors are its own. The interval is that of `pyrolora.diagnostics.differences`: over test rows, which
the seeds of a task share, and over seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pyrolora.diagnostics.bootstrap import Resampled, resamples
from pyrolora.diagnostics.differences import difference
from pyrolora.diagnostics.ood import auroc
from pyrolora.saved import load


def ranking(doubt: np.ndarray, wrong: np.ndarray, *, num_bootstrap: int = 1000) -> Resampled:
    """How often an error has more doubt than a right answer: on the rows, and on resamples that all methods share."""

    def of(rows: np.ndarray) -> float:
        return auroc(doubt[rows][~wrong[rows]], doubt[rows][wrong[rows]])

    chosen = np.concatenate([rows for (rows,) in resamples([len(doubt)], num_bootstrap=num_bootstrap, seed=0)])
    return Resampled(of(np.arange(len(doubt))), np.array([of(rows) for rows in chosen]))


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
    ours, theirs = args.methods
    for task in args.tasks:
        for name in ("confidence", "mutual information"):
            by = {
                method: {seed: ranking(*found[task, method, seed][name]) for seed in args.seeds}
                for method in args.methods
            }
            means = " and ".join(f"{np.mean([each.value for each in by[method].values()]):.3f}" for method in by)
            gap = difference(by[ours], by[theirs])
            print(f"{task}, {name}: {means}, {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]")
        for name in found[task, ours, args.seeds[0]].keys() - {"confidence", "mutual information"}:
            own = [ranking(*found[task, ours, seed][name], num_bootstrap=1).value for seed in args.seeds]
            print(f"{task}, {name}: {', '.join(f'{value:.3f}' for value in own)}")


if __name__ == "__main__":
    main()
