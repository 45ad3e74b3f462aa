"""A disk that is really full: each thing that is written ends in an error that names it, and what was there stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import contextlib, hashlib, io, os, sys
from pathlib import Path
import torch
from transformers import TrainingArguments
from pyrolora.cli import main
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import fit
from pyrolora.inference.stream import predict_to_parquet
from pyrolora.inference.checkpoints import last_checkpoint
from pyrolora.saved import load
from tests.programs import sentences, tiny_program, untrained
from tests.recipes import write_recipe, write_rows

torch.set_num_threads(1)
disk, other = Path(sys.argv[1]), Path(sys.argv[2])
recipe = str(write_recipe(other / "recipe"))
first, second = untrained(MAP()), untrained(MeanField(random="*"))
rows = str(write_rows(other / "rows.jsonl", list(sentences(80))))
table, compared, run = disk / "table.csv", disk / "compared", disk / "run"


def command(*arguments):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit:
            raise OSError(said.getvalue()) from None


def trained(steps, **options):
    chosen = dict(max_steps=steps, save_strategy="steps", save_steps=2, use_cpu=True, disable_tqdm=True,
                  report_to="none", seed=0)
    return fit(tiny_program(), MAP(), args=TrainingArguments(output_dir=str(run), **chosen), **options)


def compare(*guides):
    command("compare", recipe, "--guides", *guides, "--seeds", "1", "--output", compared)


class Action:
    def __init__(self, before, again, named, paths):
        self.before, self.again, self.named, self.paths = before, again, named, paths


command("fit", recipe, "--guide", "MAP", "--output", other / "fitted")
actions = {
    "save": Action(lambda: first.save_pretrained(disk / "saved"), lambda: second.save_pretrained(disk / "saved"),
                   f"{disk}/saved cannot be written", [disk / "saved"]),
    "export": Action(lambda: first.export_peft(disk / "peft"), lambda: second.export_peft(disk / "peft"),
                     f"{disk}/peft cannot be written", [disk / "peft"]),
    "export to a new folder": Action(lambda: None, lambda: second.export_peft(disk / "new"),
                                     f"{disk}/new cannot be written", [disk / "new"]),
    "predict to a folder": Action(lambda: predict_to_parquet(first, sentences(4), disk / "parts", 1),
                                  lambda: predict_to_parquet(second, sentences(8), disk / "parts", 2),
                                  f"{disk}/parts/part-00000.parquet cannot be written", [disk / "parts"]),
    "predict to a file": Action(lambda: command("predict", other / "fitted", rows, "--output", table),
                                lambda: command("predict", other / "fitted", rows, "--output", table, "--seed", "1"),
                                f"{table} cannot be written", [table]),
    "checkpoint": Action(lambda: trained(2), lambda: trained(4, resume=True),
                         f"step 4: the checkpoint cannot be written to {run}", [run / "checkpoint-2"]),
    "compare": Action(lambda: compare("MAP"), lambda: compare("MAP", "MeanField"),
                      "results.json cannot be written", [compared / "results.json", compared / "report.html"]),
    "report": Action(lambda: None, lambda: command("report", compared),
                     "report.html cannot be written", [compared / "report.html", compared / "reliability.png"]),
}


def contents(paths):
    files = [f for path in paths for f in ([path] if path.is_file() else sorted(path.rglob("*")))]
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


for action in actions.values():
    action.before()
for room in (0, 4096):
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(bytes(free - room))
    for name, action in actions.items():
        before = contents(action.paths)
        assert before or "new" in name, name
        try:
            action.again()
        except (OSError, ValueError) as error:
            assert action.named in str(error) and "make room" in str(error), f"{name}: {error!r}"
        else:
            raise AssertionError(f"{name} was written with {room} bytes to spare")
        assert contents(action.paths) == before, f"{name}: {contents(action.paths).keys() ^ before.keys()}"
    assert last_checkpoint(run) == run / "checkpoint-2"
    (disk / "filler").unlink()
for name, action in actions.items():
    action.again()
posterior, _ = load(compared / "MAP-seed0")
assert posterior.draw(1) and last_checkpoint(run) == run / "checkpoint-4"
print("every one was refused, and then written")
"""


def namespaces() -> bool:
    """Whether a process may mount a file system of its own here."""
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not namespaces(), reason="no user namespaces here")
def test_a_full_disk(tmp_path: Path) -> None:
    """Law: on a full file system saving, exporting, predicting, checkpoints, comparisons and reports end in an error
    that names the place and what to do; the files that were there keep their bytes; with room, all is written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=3m none {disk} && exec {sys.executable} -c "$SCRIPT" {disk} {tmp_path}'
    environment = {**os.environ, "SCRIPT": SCRIPT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "every one was refused, and then written" in done.stdout
