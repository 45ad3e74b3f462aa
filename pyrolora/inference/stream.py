"""Predictions from disk to disk: any number of rows in constant memory, resumable, shared between processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from safetensors.torch import save
from tqdm.auto import tqdm

from pyrolora.adapters.shards import is_sharded
from pyrolora.inference import processes
from pyrolora.inference.archive import describe, replacing, writing
from pyrolora.inference.posterior import Posterior
from pyrolora.tasks.data import DataError

_KEY = b"pyrolora"


def predict_to_parquet(
    posterior: Posterior,
    rows: Dataset,
    folder: str | Path,
    num_draws: int = 16,
    *,
    seed: int = 0,
    block_size: int = 4096,
    batch_size: int = 32,
) -> list[Path]:
    """Predicts rows block by block into ``part-00000.parquet``, …: what `Prediction.to_pandas` gives of each.

    In memory is one block. All blocks see the same draws, so that the table is that of one `Posterior.predict`, up to
    rounding: a row's batch mates, and with them its padding, are those of its block. A part that is there already, of
    the same rows, posterior, draws and seed, is kept: called again after an interruption it goes on, and after more
    rows were appended it adds theirs. Launched as several processes (``torchrun``), each makes its share of the parts.

    Args:
        posterior: With the task whose columns the rows have.
        rows: As they are read, not tokenised; `datasets` leaves on disk what it reads from files.
        folder: Gets the parts, which ``pandas.read_parquet(folder)`` and ``datasets.load_dataset("parquet",
            data_dir=folder)`` read in order. Parts beyond the last block are removed.
        num_draws: S; 0 uses the posterior's mean weights.
        seed: Of the draws.
        block_size: Rows of a part.
        batch_size: Rows at once.

    Returns:
        The files of all parts.

    Raises:
        ValueError: No rows, a block of less than one row, a posterior without a task, or over a base in shards.
        DataError: A bad row; the parts before it are there.
        ArchiveError: The folder cannot be written to, or the disk is full; so too.
    """
    if posterior.program.task is None:
        raise ValueError("prediction needs the program's task for its columns: from_pretrained(..., task=task)")
    if is_sharded(posterior.program.model):
        raise ValueError("a base in shards runs in all processes together, and cannot predict other rows in each")
    if block_size < 1:
        raise ValueError(f"block_size is at least 1, not {block_size}")
    if len(rows) == 0:
        raise ValueError("the data set is empty")
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(rows), block_size)
    paths = [folder / f"part-{i:05d}.parquet" for i in range(len(starts))]
    rank, count = processes.launched()
    if rank == 0:
        for path in set(folder.glob("part-*.parquet")) - set(paths):
            path.unlink()
    same = _identity(posterior, num_draws, seed)
    own = list(zip(starts, paths, strict=True))[rank::count]
    for start, path in tqdm(own, desc="parts", delay=3, leave=False):
        block = rows.select(range(start, min(start + block_size, len(rows))))
        key = _digest(same, *_content(block))
        if _key_of(path) != key:
            _write(posterior, block, start, path, key, num_draws=num_draws, seed=seed, batch_size=batch_size)
    return paths


def _write(
    posterior: Posterior,
    block: Dataset,
    start: int,
    path: Path,
    key: bytes,
    *,
    num_draws: int,
    seed: int,
    batch_size: int,
) -> None:
    assert posterior.program.task is not None
    try:
        tokenised = posterior.program.task.tokenise(block)
    except DataError as error:
        place = f"rows {start + 1} to {start + len(block)}, of which the first is called row 1"
        raise DataError(f"{place}: {error}") from error
    found = posterior.predict(tokenised, num_draws, seed=seed, batch_size=batch_size).to_pandas()
    table = pa.Table.from_pandas(found, preserve_index=False)
    if "label" in table.column_names:
        # A block without labels would give the column a type that other parts do not have.
        place = table.column_names.index("label")
        table = table.set_column(place, "label", table["label"].cast(pa.string()))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: key})
    with replacing(path) as new:
        pq.write_table(table, new)


def _key_of(path: Path) -> bytes | None:
    """What a part was made from; None where there is none, or a damaged one."""
    try:
        return (pq.read_schema(path).metadata or {}).get(_KEY)
    except (OSError, pa.ArrowException):
        return None


def _identity(posterior: Posterior, num_draws: int, seed: int) -> bytes:
    """All that predictions depend on beside the rows."""
    program, guide = posterior.program, posterior.guide
    about = [describe(guide), describe(program.likelihood), list(getattr(program.task, "class_names", ()))]
    numbers = [posterior.scaling, posterior.seed, num_draws, seed]
    state = {name: value.detach().cpu().contiguous() for name, value in guide.state_dict().items()}
    return _digest(json.dumps([about, numbers, program.fingerprint], default=str).encode(), save(state))


def _content(block: Dataset) -> Iterator[bytes]:
    """The bytes of a block's rows."""
    table = block.with_format("arrow")[:]
    for batch in table.combine_chunks().to_batches():
        yield batch.serialize().to_pybytes()


def _digest(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest().encode()
