"""Commands that put a posterior to use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyrolora.construct import RecipeError
from pyrolora.inference.archive import replacing, writing
from pyrolora.inference.processes import launched, refuse
from pyrolora.inference.stream import predict_to_parquet
from pyrolora.saved import load
from pyrolora.tasks.data import on_disk

TABLES: dict[str, Callable[[Any, Path], Any]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda table, path: table.to_parquet(path),
}


def predict(folder: Path, file: Path, *, draws: int = 16, seed: int = 0, output: Path | None = None) -> None:
    """Predicts new rows with uncertainty: a table on screen, a file, or a folder.

    A folder takes any number of rows: they stay on disk, and each 4,096 of
    them become one Parquet file. Called again it goes on where it stopped,
    and several processes share the work.

    Examples:
      pyrolora predict runs/mf questions.jsonl
      pyrolora predict runs/mf questions.csv --output predictions.parquet
      torchrun --nproc-per-node 8 -m pyrolora.cli predict runs/mf all.parquet --output parts

    Args:
        folder: What `pyrolora fit` wrote.
        file: Rows with the columns of the recipe's data (.jsonl, .csv, .parquet, ...); labels are not needed.
        draws: Number of draws; 0 uses the posterior's mean weights.
        seed: Of the draws.
        output: A .csv, .jsonl or .parquet file, or a folder; without it a table is printed.
    """
    if output is not None and output.suffix and output.suffix not in TABLES:
        raise RecipeError(f"--output {output}: the ending is one of {', '.join(TABLES)}, or none, for a folder")
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist")
    if output is not None and not output.suffix:
        posterior, task = load(folder)
        rows = on_disk(file, text_columns=task.text_columns)
        parts = predict_to_parquet(posterior, rows, output, draws, seed=seed)
        rank, count = launched()
        share = f"process {rank} of {count}: its share of " if count > 1 else ""
        print(f"{share}{len(rows)} predictions in {len(parts)} file{'s' if len(parts) > 1 else ''} in {output}")
        return
    refuse("a prediction into one table", "give --output a folder, and each process writes its share of the parts")
    posterior, task = load(folder)
    table = posterior.predict(task.tokenise(str(file)), draws, seed=seed).to_pandas()
    if output is None:
        print(table.dropna(axis=1, how="all").to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    else:
        with writing(output.parent):
            output.parent.mkdir(parents=True, exist_ok=True)
        with replacing(output) as new:
            TABLES[output.suffix](table, new)
        print(f"{len(table)} predictions in {output}")


def export(folder: Path, *, draws: int = 0, seed: int = 0, output: Path | None = None) -> None:
    """Writes ordinary PEFT adapters: the posterior's mean, and draws on request.

    Each loads with peft.PeftModel.from_pretrained, or in a server that takes
    several adapters, where draws make an ensemble.

    Example:
      pyrolora export runs/mf --draws 8 --output adapters

    Args:
        folder: What `pyrolora fit` wrote.
        draws: Number of draws beside the mean.
        seed: Of the draws.
        output: Gets mean/, draw-0/, draw-1/, ...; without it, adapters/ in the posterior's folder.
    """
    posterior, _ = load(folder)
    output = output or folder / "adapters"
    print(posterior.export_peft(output / "mean"))
    for i in range(draws):
        print(posterior.export_peft(output / f"draw-{i}", draw=i, seed=seed))
