"""Hostile descriptions under right checksums: refused at once, by what the tensors in the folder can be."""

from __future__ import annotations

import contextlib
import json
import pickle
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyrolora import guides
from pyrolora.guides.base import Guide
from pyrolora.inference import archive
from pyrolora.inference.archive import ArchiveError
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.restore import restored
from tests.adapters.test_limits import within
from tests.programs import lora, sentence_task, tiny_bert, tiny_program, untrained


def described(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class": f"guides.{name}", "init": arguments}


def nested(depth: int, size: int = 2) -> dict[str, Any]:
    guide = described("MAP")
    for _ in range(depth):
        guide = described("Ensemble", guide=guide, size=size)
    return guide


def forge(folder: Path, *, adapter: dict | None = None, **fields: Any) -> None:
    """Changes metadata and configuration as somebody does who knows the format."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(adapter or {})}))
    meta = {**json.loads((folder / "posterior.json").read_text()), **fields}
    sums = {"sha256": archive.digest(folder / "posterior.safetensors"), "adapter_sha256": archive.digest(path)}
    (folder / "posterior.json").write_text(json.dumps(sealed({**meta, **sums})))


def sealed(meta: dict) -> dict:
    try:
        return archive.sealed(meta)
    except RecursionError:  # deeper than a checksum can be made of: no reader gets as far as that
        return meta


def load(folder: Path) -> Posterior:
    return Posterior.from_pretrained(folder, tiny_bert(), task=sentence_task())


def refused(folder: Path, message: str) -> None:
    """Soon, and without a gigabyte more."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with within(30), pytest.raises(ArchiveError, match=message):
        load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000  # kilobytes


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (described("Ensemble", guide=described("MAP"), size=10**9), r"1000000000 members, of which 1 have tensors"),
        (nested(30), r"posterior\.json cannot be read: it is nested more than 50 levels"),
        (nested(300), r"posterior\.json cannot be read"),
        (nested(20), r"an ensemble of 2 members, of which 1"),
        (described("SWAG", rank=10**8), "do not account"),
        (described("SWAG", rank=10**15), "do not account"),
        (described("SGLD", size=10**8), "do not account"),
        (described("Checkpoints", size=10**8), "do not account"),
        (described("NUTS", size=10**8), "do not account"),
        (described("Inducing", posterior="ensemble", members=10**9), "do not account"),
        (described("Inducing", posterior="flow", depth=10**9), "do not account"),
        (described("Inducing", structure="rows", size=10**9), "do not account|refuses|does not fit"),
        (described("InputAdaptive", hidden=10**9), "do not account"),
        (described("Laplace", rank=10**9), "do not account|does not fit"),
        (described("Laplace", num_points=10**9), "refuses its saved arguments"),
    ],
    ids=lambda value: json.dumps(value)[:70] if isinstance(value, dict) else "",
)
def test_a_guide_is_no_larger_than_its_tensors(tmp_path: Path, guide: dict, message: str) -> None:
    """Law: sizes, numbers of members and depths for which there are no tensors are refused before they are made."""
    untrained(guides.MAP()).save_pretrained(tmp_path)
    forge(tmp_path, guide=guide)
    refused(tmp_path, message)


def test_members_are_not_bought_with_empty_tensors(tmp_path: Path) -> None:
    """Law: a thousand members, each with an empty tensor, are refused at the first that is not whole."""
    untrained(guides.MAP()).save_pretrained(tmp_path)
    save_file({f"members.{i}.x": torch.zeros(0) for i in range(1000)}, tmp_path / "posterior.safetensors")
    forge(tmp_path, guide=described("Ensemble", guide=described("MAP"), size=1000))
    refused(tmp_path, "does not fit its posterior.json: Error.* in loading state_dict for MAP")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"r": 10**7}, "do not account"),
        ({"rank_pattern": {"query": 10**7}}, "do not account"),
        ({"rank_pattern": {f"layer{i}": 2 for i in range(10**4)}}, "rank_pattern has 10000 entries"),
        ({"target_modules": "(.*)*(.*)*(.*)*x"}, "target_modules: matching .* takes longer than"),
        ({"exclude_modules": "(.*)*(.*)*(.*)*x"}, "exclude_modules: matching .* takes longer than"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_adapter_is_no_larger_than_its_tensors(tmp_path: Path, adapter: dict, message: str) -> None:
    """Law: ranks and patterns that are beyond the tensors are refused before PEFT makes or matches anything."""
    untrained(guides.MAP()).save_pretrained(tmp_path)
    forge(tmp_path, adapter=adapter)
    refused(tmp_path, message)


def test_sites_are_no_larger_than_the_tensors(tmp_path: Path) -> None:
    """Law: sites that are stated to be huge, to make room for a huge rank, are refused by the tensors."""
    untrained(guides.MAP()).save_pretrained(tmp_path)
    forge(tmp_path, adapter={"r": 10**9}, sites={"lora.query.A": [2, 10**9, 16]})
    refused(tmp_path, r"its sites have 32,000,000,000 weights, its tensors \d+ numbers|its sites have")


@pytest.mark.parametrize("modules", [r".*\.(query|value)", r"(\w+\.)*query", "all-linear"])
def test_patterns_of_ones_own_load_again(tmp_path: Path, modules: str) -> None:
    """Law: whatever pattern a posterior was fitted with, the folder that it was saved to can be read."""
    program = tiny_program(adapter=lora(target_modules=modules))
    guide = guides.MAP()
    guide.bind(program)
    posterior = Posterior(program, guide)
    posterior.save_pretrained(tmp_path)
    mine, its = posterior.mean(), load(tmp_path).mean()
    assert mine.keys() == its.keys() and all(torch.equal(its[name], value) for name, value in mine.items())


@pytest.mark.parametrize(
    "guide",
    [
        guides.Ensemble(guides.MeanField(), 3),
        guides.Ensemble([guides.MAP(), guides.Ensemble(guides.MAP(), 2)]),
        guides.Inducing(),
    ],
    ids=["of one", "of several", "inducing"],
)
def test_restored_is_what_was_saved(tmp_path: Path, guide: Guide) -> None:
    """Law: members one after another give the guide that binding and loading the whole gives."""
    posterior = untrained(guide)
    posterior.save_pretrained(tmp_path)
    state = load_file(tmp_path / "posterior.safetensors")
    loaded = load(tmp_path)
    assert loaded.guide.state_dict().keys() == state.keys()
    mine, its = posterior.draw(4, seed=2), loaded.draw(4, seed=2)
    assert all(torch.equal(its[name], value) for name, value in mine.items())
    with pytest.raises(RuntimeError, match=r"members, of which|loading state_dict"):
        restored(archive.rebuild(archive.describe(guide), where="file"), posterior.program, dict([*state.items()][:1]))


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


EVENTS: list[str] | None = None  # recorded where it is a list: an audit hook cannot be taken off again
WATCHED = ("open", "os.listdir", "os.scandir", "os.system", "subprocess.Popen", "pickle.find_class")


def watch(event: str, arguments: tuple) -> None:
    if EVENTS is not None and event in WATCHED:
        EVENTS.append(f"{event} {arguments[0]}")


def test_no_field_of_a_saved_folder_is_followed_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: whatever field names a file or folder elsewhere, loading is refused or goes on without it: nothing there is
    opened, listed or unpickled, and no program is run but the one in which patterns are matched."""
    folder, away = tmp_path / "posterior", tmp_path / "away"
    away.mkdir()
    (away / "secret.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    untrained(guides.MAP()).save_pretrained(folder)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    adapter, meta = (json.loads(files[folder / name]) for name in ("adapter_config.json", "posterior.json"))
    sys.addaudithook(watch)
    ways = [str(away), "../away/secret.pkl"]
    outcomes = []
    for fields in ("adapter", "meta"):
        for field in adapter if fields == "adapter" else meta:
            for way in ways:
                for value in (way, {way: way}):
                    change = {"adapter": {field: value}} if fields == "adapter" else {field: value}
                    forge(folder, **change)
                    events: list[str] = []
                    with monkeypatch.context() as recording, contextlib.suppress(ArchiveError):
                        recording.setattr(sys.modules[__name__], "EVENTS", events)
                        load(folder)
                        outcomes.append(field)
                    own = f"subprocess.Popen {sys.executable}"
                    foreign = [e for e in events if "away" in e or not (e.startswith("open ") or e == own)]
                    assert not foreign, field
                    for path, content in files.items():
                        path.write_bytes(content)
    assert not (tmp_path / "ran").exists() and outcomes
    assert any(event.startswith(f"open {folder}") for event in events)  # the hook does see what is opened
