"""Real kills at random moments: what is resumed ends as what was never interrupted."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from tqdm import std
from transformers import TrainingArguments

from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.checkpoints import last_checkpoint
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.stream import predict_to_parquet
from tests.programs import sentences, tiny_program, untrained


def killed(action: Callable[[], object], progress: Callable[[], object], delay: float) -> bool:
    """Runs an action in another process, and kills it some time after it began to leave something on disk."""
    start, child = progress(), os.fork()
    if child == 0:
        # That of the bars is shared with the parent, which would wait for ever for one that was killed with it.
        for bar in _bars(std.tqdm):
            bar.set_lock(threading.RLock())
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    begun = time.monotonic()
    while progress() == start and time.monotonic() - begun < 60 and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return False


def _bars(kind: type[std.tqdm]) -> Iterator[type[std.tqdm]]:
    """A class of bars and those made of it: each may have a lock of its own, by which of them came first."""
    yield kind
    for each in kind.__subclasses__():
        yield from _bars(each)


@pytest.mark.slow
def test_killed_while_checkpoints_are_written(tmp_path: Path) -> None:
    """Law: a run that writes a checkpoint at every step, killed again and again and resumed, ends with the bits and
    the log of the run that was not."""

    def run(folder: Path) -> Posterior:
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=60,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            disable_tqdm=True,
            report_to="none",
            save_strategy="steps",
            save_steps=1,
            save_total_limit=2,
            logging_steps=1,
            seed=3,
            use_cpu=True,
        )
        return fit(tiny_program(dropout=0.1), MeanField(random="*"), args=args, resume=True)

    whole, dice, folder = run(tmp_path / "whole"), random.Random(1), tmp_path / "killed"
    kills = [killed(lambda: run(folder), lambda: last_checkpoint(folder), 0.15 * dice.random()) for _ in range(9)]
    assert sum(kills) >= 4
    resumed = run(folder)
    mine, its = whole.guide.state_dict(), resumed.guide.state_dict()
    assert all(torch.equal(its[name], value) for name, value in mine.items())
    assert [row["loss"] for row in resumed.history if "loss" in row] == [
        row["loss"] for row in whole.history if "loss" in row
    ]


def test_killed_while_predictions_are_written(tmp_path: Path) -> None:
    """Law: after kills at random moments every part there is whole, and going on gives the table of one run."""
    posterior, rows, dice = untrained(MeanField(random="*")), sentences(60, seed=5), random.Random(2)
    folder = tmp_path / "killed"

    def run(folder: Path) -> list[Path]:
        return predict_to_parquet(posterior, rows, folder, 2, block_size=2)

    parts: Callable[[], int] = lambda: len([*folder.glob("part-*.parquet")])  # noqa: E731
    kills = []
    for _ in range(15):
        kills.append(killed(lambda: run(folder), parts, 0.03 * dice.random()))
        assert sum(len(pd.read_parquet(part)) for part in folder.glob("part-*.parquet")) == 2 * parts()
        assert len(pd.read_parquet(folder)) == 2 * parts()  # whatever a kill left beside them
    assert sum(kills) >= 5
    run(folder)
    run(tmp_path / "whole")
    pd.testing.assert_frame_equal(pd.read_parquet(folder), pd.read_parquet(tmp_path / "whole"))
    assert [path.name for path in sorted(folder.glob("[!.]*"))] == [f"part-{i:05d}.parquet" for i in range(30)]
