"""What a task is: data and a likelihood, with what makes the model's inputs between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pyrolora.likelihoods.base import Likelihood
from pyrolora.tasks.data import DataError, Problem, Source, Table, carve, read, stop_at, subsample


class Task(ABC):
    """Data and a likelihood: what is to be learnt.

    A task owns the encoded splits and the collation. Every split keeps the column ``text`` (what a person would read)
    and all columns that came with the data, beside ``labels`` and the model's inputs.

    A label that is missing or that names no class is an error in train, validation and test. In out-of-distribution
    splits, and in whatever :meth:`tokenise` reads later, it becomes −1 (NaN for regression): nothing is known.

    Attributes:
        likelihood: how labels arise from the model's output.
        class_names: the K classes; () for regression and language modelling.
        num_labels: outputs of the model's head.
        train, validation, test: the encoded splits.
        ood: named out-of-distribution splits.
        truncated: how many texts of each split were cut to ``max_length``.
    """

    auto_class: ClassVar[Any]
    row_by_row: ClassVar[bool] = True  # one row in, one out; otherwise `encode` sees a whole split at once

    likelihood: Likelihood
    class_names: tuple[str, ...] = ()
    num_labels: int = 1
    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    ood: dict[str, datasets.Dataset]

    def __init__(self) -> None:
        self.truncated: dict[str, int] = {}

    # What a kind of task says about itself.

    @classmethod
    @abstractmethod
    def load_processor(cls, name_or_path: str) -> Any:
        """What turns rows into the base model's inputs, from its folder or hub name: a tokenizer, say."""

    @property
    @abstractmethod
    def text_columns(self) -> tuple[str, ...]:
        """The columns of the data that are text."""

    @abstractmethod
    def learn(self, table: Table) -> None:
        """Take from the checked texts of the training split what the task needs to know: classes, answers."""

    @abstractmethod
    def content_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose texts (or choices) cannot be used."""

    @abstractmethod
    def label_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose label cannot be used."""

    @abstractmethod
    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """The columns that a batch of checked rows needs beside its own, and how many texts were cut."""

    # What all tasks share.

    def read_splits(
        self,
        train: Source,
        *,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        """Read, check and tokenise every split; see the tasks' constructors for the arguments.

        Raises:
            DataError: a split is empty, or a row cannot be used.
            ValueError: the arguments contradict each other.
        """
        named = {"train": train, "validation": validation, "test": test}
        clash = set(named) & set(ood or {})
        if clash:
            raise ValueError(f"out-of-distribution splits cannot be called {sorted(clash)}; give them other names.")
        if validation is not None and validation_fraction is not None:
            raise ValueError("give either a validation split or validation_fraction, not both.")
        if validation_fraction is not None and not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must be between 0 and 1, not {validation_fraction}.")
        if max_train is not None and max_train < 1:
            raise ValueError(f"max_train must be at least 1, not {max_train}.")

        parts: dict[str, datasets.Dataset | None] = {}
        for name, source in named.items():
            parts[name] = None if source is None else self._checked(source, name)
        rows = parts["train"]
        if rows is None:
            raise ValueError("a task needs a training split.")
        if validation_fraction is not None:
            rows, parts["validation"] = carve(rows, validation_fraction, data_seed)
        if max_train is not None:
            rows = subsample(rows, max_train, data_seed)

        self.train = self._tokenised(rows, "train")
        for name in ("validation", "test"):
            part = parts[name]
            setattr(self, name, None if part is None else self._tokenised(part, name))
        self.ood = {name: self.tokenise(source, name=name) for name, source in (ood or {}).items()}

    def tokenise(self, source: Source, *, name: str = "new") -> datasets.Dataset:
        """Read and tokenise further data for prediction; labels may be missing or unknown.

        Args:
            source: what :class:`pyrolora.tasks.data.DataSource` describes, or a data set.
            name: what to call it in messages and in ``truncated``; for a hub name, the hub split.
        """
        table = read(source, split=name, text_columns=self.text_columns)
        stop_at(table, self.content_problems(table))
        return self._tokenised(table.dataset(), name)

    def _checked(self, source: Source, name: str) -> datasets.Dataset:
        table = read(source, split=name, text_columns=self.text_columns)
        stop_at(table, self.content_problems(table))
        if name == "train":
            self.learn(table)
        stop_at(table, self.label_problems(table))
        return table.dataset()

    def _tokenised(self, rows: datasets.Dataset, name: str) -> datasets.Dataset:
        cut = 0

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            nonlocal cut
            columns, more = self.encode(batch)
            cut += more
            return columns

        # A given fingerprint keeps `datasets` from pickling the task to name a cache that is not used.
        try:
            done = rows.map(
                encode,
                batched=True,
                batch_size=1000 if self.row_by_row else None,
                remove_columns=None if self.row_by_row else rows.column_names,
                load_from_cache_file=False,
                keep_in_memory=True,
                new_fingerprint=datasets.fingerprint.generate_fingerprint(rows),
                desc=f"tokenising {name}",
            )
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        self.truncated[name] = cut
        return done

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors of encoded rows: the model's inputs, labels (b,); no labels where the rows have none."""

    def label_tensor(self, labels: list[Any]) -> Tensor:
        """The batch's labels as one tensor; int64 class indices unless a task says otherwise; shape (b,)."""
        return torch.tensor(labels, dtype=torch.int64)

    def load_base_model(
        self, name_or_path: str, *, dtype: str | torch.dtype | None = None, quantization: Any = None
    ) -> PreTrainedModel:
        """The base model with the head that the task needs.

        Args:
            name_or_path: a folder or a hub name.
            dtype: "float32", "bfloat16", ...; by default the checkpoint's own.
            quantization: a ``transformers.BitsAndBytesConfig``, or another quantisation that PEFT can adapt.
        """
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        if quantization is not None:
            options["quantization_config"] = quantization
        return self.auto_class.from_pretrained(name_or_path, **options, **self.head_options())

    def head_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` must be told about the head."""
        return {}
