"""Training checkpoints: which one is the last, and whether its files are those that were written."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

from pyrolora.inference.archive import ArchiveError, digest, refusing, write_json

# Without one of these the Trainer would go on from other weights or moments, and say nothing.
_NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt")
_SUMS = "checksums.json"


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill while writing leaves one that was not.

    The Trainer writes ``trainer_state.json`` last, so a checkpoint without a readable one is incomplete.
    """
    complete = []
    for checkpoint in Path(folder).glob("checkpoint-*"):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            complete.append((int(state["global_step"]), checkpoint))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(complete)[1] if complete else None


def seal(checkpoint: Path) -> None:
    """Writes the SHA-256 of its files, but for those that other processes write, beside them."""
    files = [path for path in sorted(checkpoint.iterdir()) if path.is_file() and not path.name.startswith("rng_state_")]
    write_json(checkpoint / _SUMS, {path.name: digest(path) for path in files if path.name != _SUMS})


def check(checkpoint: Path) -> None:
    """Refuses a checkpoint with files that are damaged, foreign or missing.

    One that a kill has left without checksums is whole, but not sealed: it has all that is needed, or is refused.

    Raises:
        ArchiveError: Names the file.
    """
    found = {path.name: path for path in checkpoint.iterdir() if path.is_file()}
    sums = {}
    if _SUMS in found:
        with refusing(f"{found[_SUMS]} is no list of checksums; {_instead(checkpoint)}"):
            sums = dict(json.loads(found[_SUMS].read_text()))
    for name in (*_NEEDED, *sums):
        if name not in found:
            raise ArchiveError(f"{checkpoint}: {name} is missing; {_instead(checkpoint)}")
    for name, path in found.items():
        if name in sums and digest(path) != sums[name]:
            raise ArchiveError(
                f"{path} is damaged, or of another run (its SHA-256 is not the one in {_SUMS}); {_instead(checkpoint)}"
            )


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever a block raises on a checkpoint's file becomes an `ArchiveError`.

    The Trainer keeps moments and random states in pickles, and reads them by torch's own reader of tensors and numbers,
    which runs nothing that they name. Its advice to read them without that is left out.
    """
    with refusing(what):
        try:
            yield
        except pickle.UnpicklingError:
            raise ArchiveError("it is damaged, or holds more than tensors and numbers, none of which was run") from None


def _instead(checkpoint: Path) -> str:
    return f"delete {checkpoint}, and the run is resumed from the checkpoint before it, or started again"
