from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from pyrolora import guides, likelihoods, priors
from pyrolora.inference import archive
from pyrolora.inference.archive import (
    ArchiveError,
    describe,
    read_adapter,
    read_meta,
    read_state,
    rebuild,
    replacing_all,
    sealed,
    write,
    write_json,
)

META = {
    "guide": {"class": "guides.MAP", "init": {}},
    "priors": {"*": {"class": "priors.Flat", "init": {}}},
    "likelihood": {"class": "likelihoods.Categorical", "init": {"num_classes": 3}},
    "num_data": 10,
    "temperature": 1.0,
    "seed": 0,
    "sites": {"lora.query.A": [2, 3, 4]},
    "fingerprint": "ab" * 32,
    "history": [{"loss": 1.5}],
}
ADAPTER = LoraConfig(r=3, lora_alpha=7, target_modules=["query", "value"], task_type="SEQ_CLS")
FILES = ("posterior.json", "posterior.safetensors", "adapter_config.json")
STATE = {"points.a": torch.arange(6.0).reshape(2, 3), "points.b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, state=STATE, meta=META, adapter=ADAPTER)
    return tmp_path


def change(folder: Path, **fields: object) -> None:
    """Other metadata under a checksum of its own: what somebody writes who knows the format."""
    meta = {**json.loads((folder / "posterior.json").read_text()), **fields}
    write_json(folder / "posterior.json", sealed({name: value for name, value in meta.items() if value is not ...}))


def arguments(thing: object) -> dict:
    return {name: getattr(thing, name) for name in inspect.signature(type(thing)).parameters}


def my_prior(site):
    return None


# -- describe and rebuild --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "thing",
    [
        guides.MAP(),
        guides.MeanField(random="*.B", init_scale=0.3, noise="example"),
        guides.MeanField(random=["*.A", "head.*"]),
        priors.Normal("fan_in"),
        priors.Normal(0.25),
        priors.Flat(),
        priors.MatrixNormal(0.1, [[1.0, 0.5], [0.5, 1.0]]),
        priors.Hierarchical(0.1, 2.0),
        priors.ARD(0.1),
        priors.Horseshoe(0.01, slab_scale=0.3, slab_df=5.0),
        likelihoods.Categorical(4),
        likelihoods.AnswerTokens([4, 7, 9]),
        likelihoods.Normal(prior_loc=1.5, prior_scale=0.5),
        likelihoods.Normal(0.1),
    ],
    ids=lambda thing: f"{type(thing).__module__.split('.')[1]}.{type(thing).__name__}",
)
def test_objects_come_back_through_json(thing):
    """Law: rebuild(JSON(describe(x))) is of x's class and has x's constructor arguments."""
    back = rebuild(json.loads(json.dumps(describe(thing), allow_nan=False)), where="file")
    assert type(back) is type(thing)
    expected, found = arguments(thing), arguments(back)
    assert {n: list(v) if isinstance(v, tuple) else v for n, v in found.items()} == {
        n: list(v) if isinstance(v, tuple) else v for n, v in expected.items()
    }


def test_mappings_keep_their_order():
    """Law: patterns come back in the order in which they were declared, since the first match wins."""
    declared = {"lora.z.*": priors.Normal(1.0), "*.A": priors.ARD(), "*": priors.Flat()}
    back = rebuild(json.loads(json.dumps(describe(declared))), where="file")
    assert [(n, type(p)) for n, p in back.items()] == [(n, type(p)) for n, p in declared.items()]


def test_somebodys_own_code_is_named_not_stored():
    """Law: a function or class from elsewhere becomes its name, and loading it is an error that says what to do."""

    class Mine(priors.Normal):
        """A subclass that this package does not export."""

    assert describe({"*": my_prior}) == {"*": {"custom": "my_prior"}}
    assert describe(Mine(1.0)) == {"custom": "Mine"}
    with pytest.raises(ArchiveError, match=r"file: \*: 'my_prior' is code of yours.*give priors= again"):
        rebuild({"*": {"custom": "my_prior"}}, where="file")


HOSTILE = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "torch.load",
    "torch.nn.Linear",
    "pyrolora.priors.Normal",
    "tasks.SequenceClassification",
    "inference.archive.write",
    "priors.__import__",
    "priors.__all__",
    "priors.__loader__",
    "priors.by_site",  # exported, but a function
    "priors.Prior",  # exported, but an alias
    "priors.PriorError",  # exported, but an error
    "priors.base.positive",
    "priors.normal.Normal",
    "priors.normal",
    "priors.math",
    "priors.",
    "priors",
    ".Normal",
    "",
    "guides.MAP.bind",
    "guides.Posterior",
    "likelihoods.Likelihood",  # abstract
    "../priors.Normal",
    "priors/Normal",
    "/etc/passwd",
    "priors.Normal\n",
    "priors.Normal; import os",
    None,
    7,
    ["priors", "Normal"],
    {"class": "priors.Flat", "init": {}},
]


@pytest.mark.parametrize("path", HOSTILE, ids=repr)
def test_nothing_but_exported_classes_is_constructed(path, monkeypatch, tmp_path):
    """Law: a class path that is not an exported guide, prior or likelihood is an error, and nothing is run."""
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    monkeypatch.setattr(priors, "by_site", lambda **arguments: ran.append(arguments))
    for init in ({}, {"priors": {}, "sites": []}, {"command": f"touch {tmp_path}/ran"}):
        with pytest.raises(ArchiveError, match="file"):
            rebuild({"class": path, "init": init}, where="file")
    assert ran == [] and list(tmp_path.iterdir()) == []


def test_a_class_that_is_not_exported_is_not_constructed(monkeypatch):
    """Law: a prior's class that stands in the package but not in its __all__ is refused."""
    monkeypatch.setattr(priors, "Hidden", type("Hidden", (priors.Flat,), {}), raising=False)
    with pytest.raises(ArchiveError, match=r"'priors\.Hidden' is not a class that a posterior may hold"):
        rebuild({"class": "priors.Hidden", "init": {}}, where="file")


def test_other_spellings_stay_data():
    """Law: what is not this package's own description is data: a foreign "class_path" is returned, never followed."""
    foreign = {"class_path": "os.system", "init_args": {"command": "true"}}
    assert rebuild(foreign, where="file") == foreign
    assert rebuild("os.system", where="file") == "os.system"


@pytest.mark.parametrize(
    "description",
    [
        {"class": "priors.Normal", "init": {"scale": -1.0}},
        {"class": "priors.Normal", "init": {"scale": 1.0, "more": 2}},
        {"class": "priors.Normal", "init": {"scale": {"class": "priors.Flat", "init": {}}}},
        {"class": "priors.Normal", "init": {}},
        {"class": "priors.Normal", "init": {"scale": "import os"}},
        {"class": "priors.ARD", "init": {"scale": "wide"}},
        {"class": "likelihoods.Categorical", "init": {"num_classes": float("inf")}},
        {"class": "likelihoods.AnswerTokens", "init": {"token_ids": 3}},
        {"class": "guides.MeanField", "init": {"__class__": "x"}},
    ],
    ids=str,
)
def test_arguments_that_a_constructor_refuses(description):
    """Law: whatever a constructor raises on a file's arguments is an ArchiveError with the file and the class."""
    with pytest.raises(ArchiveError, match=rf"file: {description['class']} refuses its saved arguments"):
        rebuild(description, where="file")


@pytest.mark.parametrize(
    "description",
    [
        {"class": "priors.Flat"},
        {"class": "priors.Flat", "init": []},
        {"class": "priors.Flat", "init": None},
        {"class": "priors.Flat", "init": {}, "and": 1},
    ],
    ids=str,
)
def test_descriptions_have_one_form(description):
    """Law: a description is a class and its arguments, no less and no more."""
    with pytest.raises(ArchiveError, match="not a class that a posterior may hold"):
        rebuild(description, where="file")


def test_hostile_descriptions_inside_arguments():
    """Law: an argument is checked as strictly as the object that it is for."""
    nested = {"class": "guides.MeanField", "init": {"random": [{"class": "os.system", "init": {}}]}}
    with pytest.raises(ArchiveError, match=r"file: random: 'os\.system'"):
        rebuild(nested, where="file")


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(folder):
    """Law: tensors come back bitwise with their types, metadata as it was, and no other file stays behind."""
    state, meta = read_state(folder), read_meta(folder)
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
    assert {name: meta[name] for name in META} == META
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert load_file(folder / "posterior.safetensors").keys() == STATE.keys()  # an ordinary safetensors file


def test_any_tensor_can_be_written(tmp_path):
    """Law: parameters, transposed and expanded tensors, scalars and an empty state are written as their values."""
    state = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.zeros(()).expand(3),
        "scalar": torch.tensor(3),
    }
    write(tmp_path, state=state, meta=META, adapter=ADAPTER)
    assert all(torch.equal(value, state[name]) for name, value in read_state(tmp_path).items())
    write(tmp_path, state={}, meta=META, adapter=ADAPTER)
    assert read_state(tmp_path) == {}


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """Law: a log with NaN or infinity does not keep a posterior from being saved; strict JSON has null there."""
    history = [{"loss": float("nan"), "grad_norm": (float("inf"), 1.0)}]
    write(tmp_path, state=STATE, meta={**META, "history": history}, adapter=ADAPTER)
    assert read_meta(tmp_path)["history"] == [{"loss": None, "grad_norm": [None, 1.0]}]
    assert "NaN" not in (tmp_path / "posterior.json").read_text()


@pytest.mark.parametrize("step", ["tensors", "json", "replace"])
def test_a_failed_write_leaves_the_old_posterior(folder, monkeypatch, step):
    """Law: where tensors, JSON or the final move fail, the old posterior is still there and no piece of the new."""
    meta = META

    def fail(*arguments, **options):
        raise OSError("no space left on device")

    if step == "tensors":
        monkeypatch.setattr(archive, "save_file", fail)
    elif step == "json":
        meta = {**META, "history": [object()]}
    else:
        monkeypatch.setattr(os, "replace", fail)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises((ArchiveError, TypeError), match=r"no space left on device. What was there|not JSON"):
        write(folder, state={"other": torch.zeros(3)}, meta=meta, adapter=ADAPTER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file may grow beyond ``room`` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 500])
def test_a_full_disk_leaves_the_old_posterior(folder, room):
    """Law: without room for the tensors, the JSON or anything, the error says so and the old files keep their bytes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with full_disk(room), pytest.raises(ArchiveError, match=r"cannot be written.*untouched; make room"):
        write(folder, state={"other": torch.zeros(20)}, meta=META, adapter=ADAPTER)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with full_disk(room), pytest.raises(ArchiveError, match="cannot be written"):
        write(folder / "new", state={"other": torch.zeros(20)}, meta=META, adapter=ADAPTER)
    assert not list((folder / "new").iterdir())


def in_a_child(action: Callable[[], object]) -> int:
    """Starts an action in another process, which ends with it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    return child


def write_seed(folder: Path, seed: int, size: int = 50_000) -> None:
    """A posterior whose every number is its seed."""
    state = {name: torch.full((size,), float(seed)) for name in "abc"}
    write(folder, state=state, meta={**META, "seed": seed}, adapter=LoraConfig(r=seed + 1, target_modules=["query"]))


def whole_seed(folder: Path) -> int:
    """The seed of the one posterior that a folder is read as; nothing of another is in it."""
    meta, state, adapter = read_meta(folder), read_state(folder), read_adapter(folder)
    values = torch.cat([value.double().flatten() for value in state.values()])
    assert torch.equal(values, torch.full_like(values, meta["seed"])) and adapter.r == meta["seed"] + 1
    return meta["seed"]


def test_killed_while_writing(folder):
    """Law: after a SIGKILL at any moment of overwriting, every time the folder reads as the old or the new posterior,
    which never goes back; writing again leaves those three files and nothing of the killed."""
    dice, last = random.Random(0), 0
    write_seed(folder, 0)
    for _ in range(20):
        child = in_a_child(lambda: [write_seed(folder, seed) for seed in range(last + 1, 10**9)])  # noqa: B023
        begun = time.monotonic()
        while whole_seed_of_meta(folder) == last and time.monotonic() - begun < 60:
            time.sleep(0.001)
        time.sleep(0.05 * dice.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert whole_seed(folder) >= last
        last = whole_seed(folder)
    assert last >= 10
    write(folder, state=STATE, meta=META, adapter=ADAPTER)
    assert {path.name for path in folder.iterdir()} == set(FILES)


def whole_seed_of_meta(folder: Path) -> int:
    """As of what stands in its place, while another process writes."""
    return json.loads((folder / "posterior.json").read_text())["seed"]


def test_killed_between_any_two_steps(tmp_path):
    """Law: killed before the n-th call of open, mkdir, rename, unlink or fsync, for all n, a write leaves the old
    posterior or the new one; and so does the write after it, killed in the same way while it goes on from there."""
    before, after = [], []
    for n in itertools.count():
        folder = tmp_path / str(n)
        write_seed(folder, 1, 10)
        status = killed_at(n, lambda: write_seed(folder, 2, 10))  # noqa: B023 - called at once
        before.append(whole_seed(folder))
        if os.WIFEXITED(status):
            break
        killed_at(7 * n % 31, lambda: write_seed(folder, 3, 10))  # noqa: B023 - called at once
        assert whole_seed(folder) in (before[-1], 3)
        after.append(whole_seed(folder))
    assert before == sorted(before) and set(before) == {1, 2} and set(after) == {1, 2, 3}


def killed_at(step: int, action: Callable[[], object]) -> int:
    """The exit status of a process that is killed before one of its calls that change files, counted from 0."""

    def count(event: str, arguments: tuple) -> None:
        nonlocal step
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            if step == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            step -= 1

    child = in_a_child(lambda: (sys.addaudithook(count), action()))
    return os.waitpid(child, 0)[1]


def test_an_unfinished_stage_is_not_read(folder):
    """Law: new files that are not whole, or not those of their posterior.json, change nothing that is read."""
    stage = folder / ".new"
    write(folder.parent / "other", state={"x": torch.ones(3)}, meta={**META, "seed": 7}, adapter=ADAPTER)
    shutil.copytree(folder.parent / "other", stage)
    assert read_meta(folder)["seed"] == 7  # whole: the write was killed before its first move
    for name in FILES:
        content = (stage / name).read_bytes()
        (stage / name).write_bytes(content[:-9])
        assert read_meta(folder)["seed"] == 0 and read_state(folder).keys() == STATE.keys()
        (stage / name).write_bytes(content)
    (stage / "posterior.json").unlink()
    assert read_meta(folder)["seed"] == 0 and read_adapter(folder).r == 3


@pytest.mark.parametrize("name", FILES)
def test_a_renamed_file_is_shown(folder, name):
    """Law: where a file has another name, the error says which is missing and which are there."""
    (folder / name).rename(folder / f"my-{name}")
    with pytest.raises(ArchiveError, match=rf"{name} does not exist.*names that they were given.*my-{name}"):
        (read_meta(folder), read_state(folder), read_adapter(folder))


def test_files_of_a_folder_are_replaced_together(tmp_path):
    """Law: what a block writes takes its place when the block ends, last the file that was named; where it raises,
    the folder is as it was."""
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_all(tmp_path, last="a") as new:
        (new / "a").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    with replacing_all(tmp_path, last="a") as new:
        (new / "a").write_text("new")
        (new / "b").write_text("new")
    assert (tmp_path / "b").stat().st_ctime_ns <= (tmp_path / "a").stat().st_ctime_ns
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"] and (tmp_path / "a").read_text() == "new"


def test_nesting_without_bottom_is_refused(folder):
    """Law: JSON that Python can read, but that is deeper than any posterior, is an error that says so."""
    deep: object = 1
    for _ in range(300):
        deep = {"class": "guides.Ensemble", "init": {"guide": deep}}
    meta = json.loads((folder / "posterior.json").read_text())
    (folder / "posterior.json").write_text(json.dumps({**meta, "guide": deep}))
    with pytest.raises(ArchiveError, match=r"posterior\.json cannot be read: it is nested more than 50 levels"):
        read_meta(folder)


@pytest.mark.parametrize("header", [2**63 - 1, 2**32, 0, 2**20])
def test_an_impossible_header_is_refused(folder, header):
    """Law: a tensor file whose header claims to be larger than any memory is refused at once, checksum or not."""
    path = folder / "posterior.safetensors"
    path.write_bytes(header.to_bytes(8, "little") + path.read_bytes()[8:])
    change(folder, sha256=archive.digest(path))
    with pytest.raises(ArchiveError, match="not a safetensors file"):
        read_state(folder)


@pytest.mark.parametrize("field", [{"num_data": 0}, {"temperature": -0.5}, {"seed": -1}, {"scaling": -1.0}], ids=str)
def test_numbers_out_of_range_are_refused(folder, field):
    """Law: sizes, temperatures and seeds that no fit can have are an error before anything is built from them."""
    change(folder, **field)
    with pytest.raises(ArchiveError, match=r"posterior\.json: .*(at least|positive)"):
        read_meta(folder)


def test_write_json_is_whole_or_not_at_all(tmp_path):
    """Law: JSON that cannot be written leaves the old file, and nothing beside it."""
    path = tmp_path / "report.json"
    write_json(path, {"a": 1, "name": "Ångström"})
    assert json.loads(path.read_text()) == {"a": 1, "name": "Ångström"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1 and [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_every_truncation_of_the_tensors_is_noticed(folder):
    """Law: a tensor file cut anywhere is an error that names the file."""
    path = folder / "posterior.safetensors"
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArchiveError, match=r"posterior\.safetensors is damaged"):
            read_state(folder)


def test_every_flipped_bit_of_the_tensors_is_noticed(folder):
    """Law: one bit flipped anywhere, in the header or in a weight, is an error that names the file."""
    path = folder / "posterior.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        with pytest.raises(ArchiveError, match=r"posterior\.safetensors is damaged"):
            read_state(folder)


@pytest.mark.parametrize("name", ["posterior.json", "adapter_config.json"])
def test_every_flipped_bit_of_the_json_is_noticed(folder, name):
    """Law: one bit flipped in a number, a name or a bracket is an error that names the file, or changes no value."""
    path = folder / name
    whole, meta, adapter = path.read_bytes(), read_meta(folder), read_adapter(folder)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 7)
        path.write_bytes(bytes(flipped))
        try:
            assert (read_meta(folder), read_adapter(folder)) == (meta, adapter)  # a space that became another
        except ArchiveError as error:
            assert name in str(error)


def test_folders_of_the_first_format_are_read(folder):
    """Law: format 1, which had no checksums of its JSON files, is read without them."""
    change(folder, format=1, adapter_sha256=..., scaling=...)
    meta = json.loads((folder / "posterior.json").read_text())
    write_json(folder / "posterior.json", {name: value for name, value in meta.items() if name != "checksum"})
    assert read_meta(folder)["num_data"] == 10 and read_meta(folder)["scaling"] == 1.0
    assert read_adapter(folder).r == 3 and read_state(folder).keys() == STATE.keys()


def test_the_configuration_is_the_one_that_peft_writes(folder, tmp_path):
    """Law: adapter_config.json has the content that PEFT's own save_pretrained gives it."""
    ADAPTER.save_pretrained(str(tmp_path / "peft"))
    mine, theirs = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "peft"))
    for content in (mine, theirs):
        content["target_modules"] = sorted(content["target_modules"])
    assert mine == theirs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(tmp_path, value):
    """Law: NaN or infinity in a saved tensor is an error that names it, though every checksum is right."""
    write(tmp_path, state={**STATE, "loc.x": torch.tensor([1.0, value])}, meta=META, adapter=ADAPTER)
    with pytest.raises(ArchiveError, match=r"NaN or infinity in loc\.x"):
        read_state(tmp_path)


def test_tensors_of_another_posterior_are_noticed(folder):
    """Law: a valid tensor file that the JSON was not written for is an error, not another posterior's weights."""
    save_file({name: value + 1 for name, value in STATE.items()}, str(folder / "posterior.safetensors"))
    with pytest.raises(ArchiveError, match=r"not the file that posterior\.json belongs to"):
        read_state(folder)


def test_a_file_that_is_no_safetensors_file(folder):
    """Law: a foreign file is an error also where its digest is the one that the JSON states."""
    path = folder / "posterior.safetensors"
    path.write_bytes(b"\x80\x04pickle, perhaps")
    change(folder, sha256=archive.digest(path))
    with pytest.raises(ArchiveError, match="not a safetensors file"):
        read_state(folder)


def test_missing_files(folder):
    """Law: each missing file is named, and a folder that holds no posterior is said to be none."""
    (folder / "posterior.safetensors").unlink()
    with pytest.raises(ArchiveError, match=r"posterior\.safetensors does not exist"):
        read_state(folder)
    (folder / "posterior.json").unlink()
    with pytest.raises(ArchiveError, match=r"posterior\.json does not exist.*save_pretrained"):
        read_meta(folder)
    with pytest.raises(ArchiveError, match="does not exist"):
        read_meta(folder / "nowhere")


def test_every_truncation_of_the_json_is_noticed(folder):
    """Law: a JSON file cut anywhere before its last brace is an error that names the file."""
    path = folder / "posterior.json"
    whole = path.read_text()
    for length in range(0, whole.rindex("}"), 5):
        path.write_text(whole[:length])
        with pytest.raises(ArchiveError, match=r"posterior\.json cannot be read"):
            read_meta(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00", b"[" * 200_000, b"[1]", b'"x"', b"null", b"{}", b'{"guide": {}}'],
    ids=lambda c: str(c[:9]),
)
def test_foreign_json(folder, content):
    """Law: bytes that are no text, bottomless nesting, and JSON of something else are errors that name the file."""
    (folder / "posterior.json").write_bytes(content)
    with pytest.raises(ArchiveError, match=r"posterior\.json (cannot be read|is not a posterior)"):
        read_meta(folder)


@pytest.mark.parametrize("version", [3, 0, "1", None])
def test_other_formats(folder, version):
    """Law: another format is an error that shows both versions, whatever else the file holds."""
    write_json(folder / "posterior.json", {"format": version, "new_field": 1})
    with pytest.raises(ArchiveError, match=rf"format {version}, this version reads up to 2"):
        read_meta(folder)


@pytest.mark.parametrize("field", [*META, "sha256", "adapter_sha256"])
@pytest.mark.parametrize("value", [None, object])
def test_missing_and_mistyped_fields(folder, field, value):
    """Law: a field that is missing or of another type is named before anything is built from the file."""
    other = 3.5 if isinstance(read_meta(folder)[field], str) else "text"
    change(folder, **{field: ... if value is None else other})
    with pytest.raises(ArchiveError, match=rf"not a whole posterior: {field} missing or of another type"):
        read_meta(folder)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"guide": {"class": "priors.Flat", "init": {}}}, "guide"),
        ({"guide": {"class_path": "os.system", "init_args": {"command": "true"}}}, "guide"),
        ({"guide": {}}, "guide"),
        ({"likelihood": {"class": "guides.MAP", "init": {}}}, "likelihood"),
        ({"likelihood": {"class": ["likelihoods.Normal"], "init": {}}}, "likelihood"),
        ({"priors": {"*.A": META["priors"]["*"], "*": {"class": "guides.MAP", "init": {}}}}, r"the prior for '\*'"),
        ({"priors": {"*": "Flat"}}, r"the prior for '\*'"),
        ({"priors": {"*": {"custom": "f", "class": "os.system"}}}, r"the prior for '\*'"),
    ],
    ids=str,
)
def test_each_place_holds_its_own_kind(folder, other, named):
    """Law: where a guide belongs stands a guide, likewise likelihood and priors; else the place is named."""
    change(folder, **other)
    with pytest.raises(ArchiveError, match=rf"posterior\.json: {named}: another kind of thing"):
        read_meta(folder)


def test_somebodys_own_code_may_stand_anywhere(folder):
    """Law: reading the metadata does not refuse what can only be given again; building it does."""
    own = {"custom": "mine"}
    change(folder, guide=own, likelihood=own, priors={"*": own})
    assert read_meta(folder)["guide"] == own
