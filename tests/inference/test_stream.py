"""Predictions in parts: the same table as at once, what is there stays, and processes share the work."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch

from pyrolora.guides.mean_field import MeanField
from pyrolora.inference import stream
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.stream import predict_to_parquet
from pyrolora.tasks.data import DataError
from tests.programs import sentences, untrained


@pytest.fixture
def posterior() -> Posterior:
    """Whose draws differ."""
    made = untrained(MeanField(random="*", init_scale=0.5))
    made.scaling = 1.3
    return made


def parts_of(folder: Path) -> dict[str, int]:
    """Name → when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def test_the_parts_are_the_table(posterior: Posterior, tmp_path: Path) -> None:
    """Law: parts in the order of their names are the table of one prediction, columns and rows; also with datasets."""
    rows = sentences(13, seed=5)
    paths = predict_to_parquet(posterior, rows, tmp_path, 3, seed=4, block_size=5, batch_size=2)
    assert [path.name for path in paths] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    task = posterior.program.task
    assert task is not None
    expected = posterior.predict(task.tokenise(rows), 3, seed=4).to_pandas()
    found = pd.read_parquet(tmp_path)
    assert list(found.columns) == list(expected.columns) and list(found["text"]) == rows["text"]
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, atol=1e-5)
    loaded: Any = datasets.load_dataset("parquet", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    assert loaded["text"][:] == rows["text"][:]


def test_it_goes_on(posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: after an interruption, and after rows were appended, whole parts are kept; a damaged one is made again."""
    rows = sentences(15, seed=5)
    predict, calls = Posterior.predict, []

    def stopping(self: Posterior, *args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, *args, **options)

    monkeypatch.setattr(Posterior, "predict", stopping)
    with pytest.raises(KeyboardInterrupt):
        predict_to_parquet(posterior, rows.select(range(10)), tmp_path, 2, block_size=5)
    first = parts_of(tmp_path)
    assert list(first) == ["part-00000.parquet"]
    predict_to_parquet(posterior, rows.select(range(10)), tmp_path, 2, block_size=5)
    second = parts_of(tmp_path)
    assert len(second) == 2 and second["part-00000.parquet"] == first["part-00000.parquet"]
    predict_to_parquet(posterior, rows, tmp_path, 2, block_size=5)
    third = parts_of(tmp_path)
    assert len(third) == 3 and third.items() >= second.items() and len(calls) == 4
    damaged = tmp_path / "part-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    predict_to_parquet(posterior, rows, tmp_path, 2, block_size=5)
    assert len(calls) == 5 and list(pd.read_parquet(tmp_path)["text"]) == rows["text"]


def test_what_a_part_depends_on(posterior: Posterior, tmp_path: Path) -> None:
    """Law: parts of other draws, another seed, temperature or posterior, or of other rows, are made again."""
    rows = sentences(6, seed=5)

    def made(rows: datasets.Dataset = rows, draws: int = 2, seed: int = 0) -> dict[str, int]:
        predict_to_parquet(posterior, rows, tmp_path, draws, seed=seed, block_size=3)
        return parts_of(tmp_path)

    before = made()
    assert made() == before
    changed = datasets.Dataset.from_list([*rows.select(range(5)), {**rows[5], "text": "another cold stone"}])
    after = made(changed)
    assert after["part-00000.parquet"] == before["part-00000.parquet"]
    assert after["part-00001.parquet"] > before["part-00001.parquet"]
    for again in (lambda: made(draws=3), lambda: made(seed=1), made):
        before, after = after, again()
        assert all(after[name] > before[name] for name in before)
    posterior.scaling = 2.0
    before, after = after, made()
    assert all(after[name] > before[name] for name in before)
    with torch.no_grad():
        next(iter(posterior.guide.parameters())).add_(0.1)
    before, after = after, made()
    assert all(after[name] > before[name] for name in before)


def test_no_part_is_left_over(posterior: Posterior, tmp_path: Path) -> None:
    """Law: of fewer rows, or larger blocks, the folder holds those parts alone; other files stay."""
    (tmp_path / "notes.txt").write_text("mine")
    predict_to_parquet(posterior, sentences(9, seed=5), tmp_path, 1, block_size=3)
    predict_to_parquet(posterior, sentences(9, seed=5), tmp_path, 1, block_size=5)
    assert list(parts_of(tmp_path)) == ["notes.txt", "part-00000.parquet", "part-00001.parquet"]


def peak_growth(folder: Path) -> None:
    """Prints by how many MB the process's largest memory grows from 2 blocks' predictions to 20 blocks'."""
    rows = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))
    assert isinstance(rows, datasets.Dataset)
    made = untrained(MeanField())
    peaks = []
    for blocks in (2, 20):
        predict_to_parquet(made, rows.select(range(blocks * 10)), folder / str(blocks), 1, block_size=10)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(peaks[1] - peaks[0])


@pytest.mark.slow
def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    """Law: ten times the rows in blocks of one size, each row 30 kB, take a process of its own at most 10 MB more at
    its peak, most of it the file of the rows, which is mapped; in one block they take 50 MB more."""
    texts = [f"{text} {'x' * 30_000}" for text in sentences(200, seed=5)["text"]]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "rows.parquet"))
    script = f"import pathlib, tests.inference.test_stream as t; t.peak_growth(pathlib.Path({str(tmp_path)!r}))"
    root = Path(__file__).parents[2]
    # One arena that gives back what is freed, so that the peak is what was in use and not how it was cut up.
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "20").iterdir())) == 20
    assert float(done.stdout.split()[-1]) < 10


def test_processes_share_the_parts(posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: process r of n makes the parts r, r + n, …; together they are what one process makes."""
    rows = sentences(9, seed=5)
    predict_to_parquet(posterior, rows, tmp_path / "one", 2, block_size=2)
    for rank in ("1", "0"):
        monkeypatch.setitem(os.environ, "RANK", rank)
        monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
        predict_to_parquet(posterior, rows, tmp_path / "two", 2, block_size=2)
        if rank == "1":
            assert list(parts_of(tmp_path / "two")) == ["part-00001.parquet", "part-00003.parquet"]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "one"), pd.read_parquet(tmp_path / "two"))


def test_bad_rows(posterior: Posterior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a row without text stops with its place; the parts before it are there."""
    rows = datasets.Dataset.from_dict({"text": ["a house", "a stone", "the river", ""]})
    with pytest.raises(
        DataError, match=r"rows 3 to 4, of which the first is called row 1: [\s\S]*row 2: 'text' is empty"
    ):
        predict_to_parquet(posterior, rows, tmp_path, 1, block_size=2)
    assert list(parts_of(tmp_path)) == ["part-00000.parquet"]
    with pytest.raises(ValueError, match="empty"):
        predict_to_parquet(posterior, rows.select([]), tmp_path, 1)
    with pytest.raises(ValueError, match="block_size is at least 1"):
        predict_to_parquet(posterior, rows, tmp_path, 1, block_size=0)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="in all processes together"):
        patch.setattr(stream, "is_sharded", lambda model: True)
        predict_to_parquet(posterior, rows, tmp_path, 1)
    posterior.program.task = None
    with pytest.raises(ValueError, match="task"):
        predict_to_parquet(posterior, rows, tmp_path, 1)
