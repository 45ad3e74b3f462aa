"""Classification of, or regression on, a text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from pyrolora.likelihoods.base import Likelihood
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal
from pyrolora.tasks.data import Problem, Source, Table, missing, text_problems
from pyrolora.tasks.labels import LabelIndex, classes_of
from pyrolora.tasks.text import TextTask


class SequenceClassification(TextTask):
    """A class, or a number, for each text or pair of texts; the head is the model's sequence classification head.

    Class indices follow ``class_names`` where given, else the names that the data set declares (``ClassLabel``), else
    the distinct labels of the whole training split in sorted order. Labels may be indices or class names.

    Args:
        tokenizer: the base model's tokenizer; it must have a padding token.
        train: the training split: a hub name, a local file, a ``DataSource`` or a ``datasets.Dataset``.
        validation: the validation split.
        test: the test split.
        ood: named out-of-distribution splits; their labels need not be classes of this task.
        text: the column of the text.
        text_pair: the column of the second text, for pairs.
        label: the column of the label.
        class_names: the classes in the order of their indices.
        regression: whether the label is a number; the likelihood is then Normal, else Categorical.
        max_length: the most tokens that a text (or pair) may have; longer ones are cut and counted.
        max_train: train on this many rows only, drawn at random.
        validation_fraction: carve this fraction off train at random for validation; this comes before ``max_train``,
            so that the validation split is the same whatever the size of the training set.
        data_seed: the seed of both random choices.

    Raises:
        DataError: a split cannot be read, is empty, or has rows that cannot be used.
    """

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        class_names: Sequence[str] | None = None,
        regression: bool = False,
        max_length: int = 128,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if regression and class_names is not None:
            raise ValueError("class_names are for classification; leave them out for regression.")
        self.text, self.text_pair, self.label = text, text_pair, label
        self.regression = regression
        self._index = None if class_names is None else LabelIndex(class_names)
        self.read_splits(
            train,
            validation=validation,
            test=test,
            ood=ood,
            max_train=max_train,
            validation_fraction=validation_fraction,
            data_seed=data_seed,
        )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text, and the second text of a pair."""
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)

    def learn(self, table: Table) -> None:
        """Fix the classes and the likelihood."""
        likelihood: Likelihood
        if self.regression:
            likelihood = Normal()
        else:
            if self._index is None:
                self._index = classes_of(table, self.label)
            self.class_names = self._index.names
            self.num_labels = len(self.class_names)
            likelihood = Categorical(self.num_labels)
        self.likelihood = likelihood

    def content_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose texts are missing, empty, or not text."""
        for name in self.text_columns:
            yield from text_problems(name, table.column(name))

    def label_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose label is missing, or neither a number (regression) nor one of the classes."""
        for row, value in enumerate(table.column(self.label)):
            if missing(value):
                yield row, f"no '{self.label}'"
            elif self._index is None:
                if not math.isfinite(_number(value)):
                    yield row, f"'{self.label}' {value!r} is not a number"
            elif self._index.get(value) < 0:
                yield row, f"'{self.label}' {value!r} is not one of the classes {self._index.describe()}"

    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """Tokenise texts (or pairs, with token types where the tokenizer has them)."""
        texts = rows[self.text]
        pairs = None if self.text_pair is None else rows[self.text_pair]
        columns, cut = self.tokens(self.tokenizer, texts, pairs)
        columns["text"] = (
            texts if pairs is None else [f"{first}\n{second}" for first, second in zip(texts, pairs, strict=True)]
        )
        labels = rows.get(self.label, [None] * len(texts))
        index = self._index
        columns["labels"] = [_number(value) if index is None else index.get(value) for value in labels]
        return columns, len(cut)

    def label_tensor(self, labels: list[Any]) -> Tensor:
        """Class indices (int64), or numbers (float32) for regression; shape (b,)."""
        return torch.tensor(labels, dtype=torch.float32 if self.regression else torch.int64)

    def head_options(self) -> dict[str, Any]:
        """The number of outputs, and the names of the classes for whoever reads the configuration."""
        if self.regression:
            return {"num_labels": 1}
        return {
            "id2label": dict(enumerate(self.class_names)),
            "label2id": {name: i for i, name in enumerate(self.class_names)},
        }


def _number(value: Any) -> float:
    """A label as a number; NaN where it is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan
