"""A base model in shards: half of it in each of two processes, and the fit, predictions and files of a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from pyrolora.guides.base import Guide
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference import processes
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.sharding import shard
from tests.inference.test_processes import arguments
from tests.programs import sentence_task, tiny_bert, tiny_program

ROOT = Path(__file__).parents[2]
GUIDES: tuple[Guide, ...] = (MAP(), MeanField(), Laplace(precision=1.0, structure="diagonal"))
NAMES = [type(guide).__name__ for guide in GUIDES]


def work(out: Path) -> None:
    """What each of two processes does: the same fits over a whole base and over one in shards."""
    record: dict[str, Any] = {}
    tensors = {}
    for whole in (True, False):
        for name, guide in zip(NAMES, GUIDES, strict=True):
            program = tiny_program() if whole else shard(tiny_program())
            posterior = fit(program, guide, args=arguments(out / "run", 4))
            where = out / ("whole" if whole else "shards") / name
            tensors[f"{whole}/{name}/prediction"] = posterior.predict(sentence_task().test, 3).log_mean
            tensors |= {f"{whole}/{name}/{key}": value.clone() for key, value in posterior.guide.state_dict().items()}
            posterior.save_pretrained(where)
        base = program.model.get_base_model().bert.encoder
        parts = {n: p for n, p in base.named_parameters() if isinstance(p, DTensor)}
        record[str(whole)] = {
            "sharded": sorted(parts),
            "adapters": [n for n, _ in base.named_parameters() if "lora_" in n],
            "local": sum(p.to_local().numel() for p in parts.values()),
            "numel": sum(p.numel() for p in parts.values()),
        }
    save_file(tensors, out / f"rank{processes.rank()}.safetensors")
    (out / f"rank{processes.rank()}.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("shards")
    script = folder / "script.py"
    script.write_text("import sys, pathlib, tests.inference.test_sharding as t; t.work(pathlib.Path(sys.argv[1]))")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The Trainer's `use_cpu` comes too late: the processes talk before it.
    environment |= {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
def test_the_layers_are_sharded_and_the_adapters_are_not(fitted) -> None:
    """Law: after a fit each process holds half of the layers' frozen weights, and every adapter matrix whole."""
    folder, _ = fitted
    for rank in range(2):
        record = json.loads((folder / f"rank{rank}.json").read_text())
        assert record["True"]["sharded"] == []
        found = record["False"]
        assert len(found["sharded"]) == 2 * 16 and found["local"] == found["numel"] // 2
        assert len(found["adapters"]) == 8 and not set(found["adapters"]) & set(found["sharded"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_base_changes_nothing(fitted, name: str) -> None:
    """Law: guide and predictions over a base in shards are those over a whole one, in both processes."""
    for tensors in fitted[1]:
        keys = [key for key in tensors if key.startswith(f"True/{name}/")]
        assert len(keys) > 2
        for key in keys:
            torch.testing.assert_close(tensors[key.replace("True", "False")], tensors[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_was_saved_loads_on_a_whole_base(fitted, name: str) -> None:
    """Law: the fingerprint is that of the whole base, and the loaded posterior predicts what the sharded one did."""
    folder, (tensors, _) = fitted
    posterior = Posterior.from_pretrained(folder / "shards" / name, tiny_bert(), task=sentence_task())
    found = posterior.predict(sentence_task().test, 3).log_mean
    torch.testing.assert_close(found, tensors[f"False/{name}/prediction"], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: one process, quantised weights, and an architecture without named layers are refused with what to do."""
    program = tiny_program()
    with pytest.raises(ValueError, match="start several, with torchrun"):
        shard(program)
    monkeypatch.setenv("WORLD_SIZE", "2")
    base = program.model.get_base_model()
    monkeypatch.setattr(base, "_no_split_modules", None)
    with pytest.raises(ValueError, match="BertForSequenceClassification does not name its layers"):
        shard(program)
    monkeypatch.setattr(base, "is_quantized", True, raising=False)
    with pytest.raises(ValueError, match="device_map='auto'"):
        shard(program)
