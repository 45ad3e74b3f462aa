"""Checkpoints: which is the last whole one, and what is refused of one whose files are not those that were written."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.archive import ArchiveError, digest
from pyrolora.inference.checkpoints import check, last_checkpoint
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from tests.programs import tiny_program

READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES = ("model.safetensors", *READ, "training_args.bin")


def run(folder: Path, *, resume: bool = False) -> Posterior:
    chosen: dict = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    chosen |= {"report_to": "none", "save_strategy": "steps", "save_steps": 2, "use_cpu": True}
    return fit(tiny_program(), MeanField(), args=TrainingArguments(output_dir=str(folder), **chosen), resume=resume)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Posterior]:
    """A run's folder, with checkpoints in the middle and at the end, and its posterior."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


@pytest.fixture
def middle(written: tuple[Path, Posterior], tmp_path: Path) -> Path:
    """A copy of the checkpoint in the middle, where a run can be resumed."""
    return Path(shutil.copytree(written[0] / "checkpoint-2", tmp_path / "checkpoint-2"))


def checkpoint(folder: Path, step: int, state: str | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def whole(step: int) -> str:
    return json.dumps({"global_step": step, "epoch": 1.0, "log_history": []})


def test_the_newest_checkpoint_is_by_step(tmp_path: Path) -> None:
    """Law: the newest is that of the highest step, by number and not by name."""
    for step in (9, 100, 20):
        checkpoint(tmp_path, step, whole(step))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert last_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, "", whole(30)[:20], "[]", "null", '{"epoch": 1.0}', '{"global_step": null}'])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path, state: str | None) -> None:
    """Law: without a whole trainer_state.json a checkpoint was not written to its end: the one before it counts."""
    checkpoint(tmp_path, 20, whole(20))
    checkpoint(tmp_path, 30, state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-20"


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    """Law: an empty folder, one without a whole checkpoint, and a missing one have none."""
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path, 1, None)
    (tmp_path / "checkpoint-2").write_text("a file")
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_the_trainer_writes_what_is_found(written: tuple[Path, Posterior], tmp_path: Path) -> None:
    """Law: checkpoints of a real run are found, hold the guide alone, and stop counting once truncated."""
    shutil.copytree(written[0], tmp_path / "run")
    last = last_checkpoint(tmp_path / "run")
    assert last == tmp_path / "run" / "checkpoint-4"
    assert sum(file.stat().st_size for file in last.glob("model*")) < 30_000
    state = last / "trainer_state.json"
    state.write_text(state.read_text()[:-5])
    assert last_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.parametrize("sealed", [True, False])
def test_a_whole_checkpoint_is_resumed_to_the_bit(written: tuple[Path, Posterior], middle: Path, sealed: bool) -> None:
    """Law: the second half ends with the bits of the whole run, also where a kill came before the checksums."""
    if not sealed:
        (middle / "checksums.json").unlink()
    state, expected = run(middle.parent, resume=True).guide.state_dict(), written[1].guide.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("change", ["flip", "cut", "other", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_by_name(written: tuple[Path, Posterior], middle: Path, name: str, change: str) -> None:
    """Law: a file with one other bit, cut, of another step, or gone is an error that names it and says what to do."""
    content = bytearray((middle / name).read_bytes())
    content[len(content) // 2] ^= 1
    other = written[0] / "checkpoint-4" / ("model.safetensors" if name == "training_args.bin" else name)
    new = {"flip": bytes(content), "cut": bytes(content[:-9]), "other": other.read_bytes()}.get(change)
    (middle / name).unlink() if new is None else (middle / name).write_bytes(new)
    with pytest.raises(ArchiveError, match=f"{name}.*delete .*checkpoint-2, and the run is resumed"):
        run(middle.parent, resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt"])
def test_what_is_needed_is_missed_without_checksums(middle: Path, name: str) -> None:
    """Law: a checkpoint without its moments or schedule is no start, though the Trainer would take it as one."""
    (middle / "checksums.json").unlink()
    (middle / name).unlink()
    with pytest.raises(ArchiveError, match=f"{name} is missing"):
        run(middle.parent, resume=True)


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("renewed", [True, False])
@pytest.mark.parametrize("name", READ)
def test_a_hostile_pickle_is_not_run(middle: Path, name: str, renewed: bool) -> None:
    """Law: a pickle that names a function is refused and not executed, though its checksum is right, or there is
    none."""
    trace = middle.parent / "executed"
    assert pickle.loads(pickle.dumps(Hostile(trace))).close() is None and trace.exists()
    trace.unlink()
    torch.save({"state": Hostile(trace)}, middle / name)
    sums = json.loads((middle / "checksums.json").read_text())
    (middle / "checksums.json").write_text(json.dumps({**sums, name: digest(middle / name)} if renewed else {}))
    with pytest.raises(ArchiveError, match=r"checkpoint-2: .*cannot be read: it .* holds more than tensors"):
        run(middle.parent, resume=True)
    assert not trace.exists()


@pytest.mark.parametrize("content", ["", "[1]", "3", '{"../checkpoint-4/optimizer.pt": "0"}', '{"optimizer.pt": null}'])
def test_foreign_checksums_are_refused(middle: Path, content: str) -> None:
    """Law: what is no list of checksums, or names files elsewhere, is refused."""
    (middle / "checksums.json").write_text(content)
    with pytest.raises(ArchiveError, match=r"checksums|missing"):
        check(middle)


def test_a_foreign_state_of_the_trainer_is_refused(middle: Path) -> None:
    """Law: a trainer_state.json with other fields is refused by name, sealed or not, and is no bare TypeError."""
    path = middle / "trainer_state.json"
    path.write_text(path.read_text().replace("num_train_epochs", "num_train_epoch"))
    with pytest.raises(ArchiveError, match=r"trainer_state.json is damaged, or of another run"):
        run(middle.parent, resume=True)
    (middle / "checksums.json").unlink()
    with pytest.raises(ArchiveError, match=r"trainer_state.json cannot be read: .*num_train_epoch"):
        run(middle.parent, resume=True)
