"""Every reader of files on damaged and arbitrary content: what was written, or an error of this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import load_file

from pyrolora.adapters.checkpoint import load_adapter
from pyrolora.adapters.sites import AdapterError
from pyrolora.construct import RecipeError
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.archive import ArchiveError, digest, read_adapter, read_meta, read_state, sealed, write_json
from pyrolora.inference.posterior import Posterior
from pyrolora.recipe import Recipe
from pyrolora.tasks import data
from pyrolora.tasks.data import DataError
from tests.programs import lora, sentences, tiny_bert, untrained
from tests.recipes import write_recipe

OURS = (ArchiveError, AdapterError, RecipeError, DataError)
# Of one test; a reader that hangs is stopped by whoever runs the tests.
FEW = settings(derandomize=True, max_examples=60, deadline=None, database=None)
SLOWER = settings(FEW, max_examples=20)

Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "delete"]), st.floats(0, 1), st.binary(min_size=1, max_size=40)
    ),
    min_size=1,
    max_size=3,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Bytes flipped, the end cut off, and bytes put in or taken out, each at a place from 0 to 1."""
    found = bytearray(content)
    for kind, where, new in edits:
        place = min(int(where * len(found)), max(len(found) - 1, 0))
        if kind == "cut":
            del found[place:]
        elif kind == "insert":
            found[place:place] = new
        elif kind == "delete":
            del found[place : place + len(new)]
        elif found:
            found[place] ^= 1 << new[0] % 8
    return bytes(found)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    if path:
        yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def replaced(content: Any, where: float, value: Any) -> Any:
    """A document with another value at one of its places, counted from 0 to 1."""
    every = list(places(content))
    *outer, last = every[min(int(where * len(every)), len(every) - 1)]
    new = here = copy.deepcopy(content)
    for key in outer:
        here = here[key]
    here[last] = value
    return new


def refused(read: Callable[[], Any]) -> bool:
    """Whether a reader stops with an error of this package; any other error is the test's."""
    try:
        read()
    except OURS as error:
        assert str(error)
        return True
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A posterior, a PEFT adapter, a recipe and data files, each in a folder. Restored by whoever damages them."""
    root = tmp_path_factory.mktemp("whole")
    untrained(MeanField()).save_pretrained(root / "posterior")
    get_peft_model(tiny_bert(), lora()).save_pretrained(str(root / "adapter"))
    write_recipe(root / "recipe")
    (root / "data").mkdir()
    rows = sentences(6)
    rows.to_json(str(root / "data" / "rows.jsonl"))
    rows.to_csv(str(root / "data" / "rows.csv"))
    rows.to_parquet(str(root / "data" / "rows.parquet"))
    (root / "data" / "rows.json").write_text(json.dumps(rows.to_list()))
    (root / "data" / "rows.txt").write_text("\n".join(rows["text"]))
    return root


class Damaged:
    """A file with other content for the duration of a block."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content, self.original = path, content, path.read_bytes()

    def __enter__(self) -> bool:
        self.path.write_bytes(self.content)
        return self.content == self.original

    def __exit__(self, *error: object) -> None:
        self.path.write_bytes(self.original)


# -- edited bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["posterior.json", "posterior.safetensors", "adapter_config.json"])
@FEW
@given(edits=EDITS)
def test_an_edited_posterior_is_read_as_written_or_refused(whole: Path, name: str, edits: list[Edit]) -> None:
    """Law: whatever bytes of a posterior's files change, its readers give what was written, or an ArchiveError."""
    folder = whole / "posterior"
    meta, state, config = read_meta(folder), read_state(folder), read_adapter(folder).to_dict()

    def read() -> None:
        assert read_meta(folder) == meta
        again = read_state(folder)
        assert again.keys() == state.keys() and all(torch.equal(again[key], value) for key, value in state.items())
        assert read_adapter(folder).to_dict() == config

    with Damaged(folder / name, edited((folder / name).read_bytes(), edits)) as same:
        stopped = refused(read)
    assert not (same and stopped)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@SLOWER
@given(edits=EDITS)
def test_an_edited_adapter_is_loaded_or_refused(whole: Path, name: str, edits: list[Edit]) -> None:
    """Law: whatever bytes of a PEFT adapter change, it loads or is an AdapterError; it has no checksum to tell more."""
    path = whole / "adapter" / name
    with Damaged(path, edited(path.read_bytes(), edits)) as same:
        stopped = refused(lambda: load_adapter(tiny_bert(), path.parent))
    assert not (same and stopped)


@FEW
@given(edits=EDITS)
def test_an_edited_recipe_is_read_or_refused(whole: Path, edits: list[Edit]) -> None:
    """Law: whatever bytes of a recipe change, it is read, and its parts are built, or a RecipeError names the file."""
    path = whole / "recipe" / "tiny.yaml"

    def read() -> None:
        recipe = Recipe.read(path)
        recipe.build_priors()
        recipe.build_adapter()
        recipe.build_guide("MeanField")

    with Damaged(path, edited(path.read_bytes(), edits)) as same:
        stopped = refused(read)
    assert not (same and stopped)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "txt"])
@FEW
@given(edits=EDITS)
@example(edits=[("insert", 0.0, b"\0")])
def test_edited_data_are_read_or_refused(whole: Path, ending: str, edits: list[Edit]) -> None:
    """Law: whatever bytes of a data file change, it is a table of rows, or a DataError."""
    path = whole / "data" / f"rows.{ending}"

    def read() -> None:
        table = data.read(str(path), split="train", text_columns=("text",))
        assert len(table) == len(table.dataset()) > 0

    with Damaged(path, edited(path.read_bytes(), edits)) as same:
        stopped = refused(read)
    assert not (same and stopped)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@settings(FEW, max_examples=8)
@given(edits=EDITS)
@example(edits=[("cut", 0.0, b"\0")])
@example(edits=[("insert", 0.75, b"\x80")])
def test_edited_data_are_streamed_or_refused(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, ending: str, edits: list[Edit]
) -> None:
    """Law: the reader of files of any size gives rows, or a DataError."""
    path = whole / "data" / f"rows.{ending}"
    with Damaged(path, edited(path.read_bytes(), edits)) as same, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        stopped = refused(lambda: data.on_disk(path, text_columns=("text",))[:])
    assert not (same and stopped)


# -- arbitrary values --------------------------------------------------------------------------------------------------


@FEW
@given(where=st.floats(0, 1), value=JSON)
def test_arbitrary_metadata_are_refused_or_harmless(whole: Path, where: float, value: Any) -> None:
    """Law: with any JSON value anywhere in a posterior's metadata and the checksum renewed, as by somebody who knows
    the format, the posterior loads and draws, or is refused with an error of ours; without, it is refused."""
    folder, path = whole / "posterior", whole / "posterior" / "posterior.json"
    meta = json.loads(path.read_text())
    changed = replaced(meta, where, value)

    def read() -> None:
        Posterior.from_pretrained(folder, tiny_bert()).draw(1)

    with Damaged(path, b""):
        path.write_text(json.dumps(changed))
        unsealed = refused(lambda: read_meta(folder))
        write_json(path, sealed({name: each for name, each in changed.items() if name != "checksum"}))
        refused(read)
    assert unsealed or json.dumps(changed, sort_keys=True) == json.dumps(meta, sort_keys=True)


@SLOWER
@given(where=st.floats(0, 1), value=JSON)
def test_an_arbitrary_adapter_configuration(whole: Path, where: float, value: Any) -> None:
    """Law: with any JSON value anywhere in ``adapter_config.json`` an adapter, and a posterior whose checksums were
    renewed, load or are refused with an error of ours."""
    folder = whole / "adapter"
    path = folder / "adapter_config.json"
    with Damaged(path, json.dumps(replaced(json.loads(path.read_text()), where, value)).encode()):
        refused(lambda: load_adapter(tiny_bert(), folder))
    posterior = whole / "posterior"
    path, meta = posterior / "adapter_config.json", json.loads((posterior / "posterior.json").read_text())
    with (
        Damaged(path, json.dumps(replaced(json.loads(path.read_text()), where, value)).encode()),
        Damaged(posterior / "posterior.json", b""),
    ):
        write_json(posterior / "posterior.json", sealed({**meta, "adapter_sha256": digest(path)}))
        refused(lambda: Posterior.from_pretrained(posterior, tiny_bert()).draw(1))


@FEW
@given(where=st.floats(0, 1), value=JSON)
@example(where=0.5, value=[])
def test_an_arbitrary_recipe(whole: Path, where: float, value: Any) -> None:
    """Law: with any JSON value anywhere in a recipe, which YAML reads too, it is read and built or a RecipeError."""
    path = whole / "recipe" / "tiny.yaml"

    def read() -> None:
        recipe = Recipe.read(path)
        recipe.build_priors()
        recipe.build_adapter()
        recipe.arguments(None, seed=0)
        recipe.build_guide("MeanField")
        assert isinstance(recipe.temperature_of("MeanField"), int | float)

    with Damaged(path, json.dumps(replaced(yaml.safe_load(path.read_text()), where, value)).encode()):
        refused(read)


@FEW
@given(rows=st.lists(st.dictionaries(st.sampled_from(["text", "label"]), JSON) | JSON, max_size=4))
def test_arbitrary_rows(whole: Path, rows: list[Any]) -> None:
    """Law: a file of any JSON values is a table, or a DataError."""
    path = whole / "data" / "rows.jsonl"

    def read() -> None:
        data.read(str(path), split="train").dataset()

    with Damaged(path, "\n".join(json.dumps(row) for row in rows).encode()):
        refused(read)


def test_the_files_are_as_before(whole: Path) -> None:
    """Law: what the tests above damaged they have restored, and it is read to the bit."""
    folder = whole / "posterior"
    state = Posterior.from_pretrained(folder, tiny_bert()).guide.state_dict()
    saved = load_file(folder / "posterior.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(state[name], value) for name, value in saved.items())
