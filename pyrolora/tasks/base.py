"""What a task is: data and a likelihood, with the tokenizer between them."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pyrolora.likelihoods.base import Likelihood
from pyrolora.tasks.data import DataError, Problem, Source, Table, carve, read, stop_at, subsample

logger = logging.getLogger("pyrolora")

MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class Task(ABC):
    """Data and a likelihood: what is to be learnt.

    A task owns the tokenizer, the tokenised splits and the collation. Every split keeps the column ``text`` (what a
    person would read) and all columns that came with the data, beside ``input_ids``, ``attention_mask``,
    (``token_type_ids``) and ``labels``.

    A label that is missing or that names no class is an error in train, validation and test. In out-of-distribution
    splits, and in whatever :meth:`tokenise` reads later, it becomes −1 (NaN for regression): nothing is known.

    Attributes:
        likelihood: how labels arise from the model's output.
        tokenizer: the tokenizer that the splits were made with.
        class_names: the K classes; () for regression and language modelling.
        num_labels: outputs of the model's head.
        max_length: the most tokens that a text may have.
        train, validation, test: the tokenised splits.
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has no padding token, so texts of different lengths "
                "cannot share a batch. Set tokenizer.pad_token = tokenizer.eos_token first: padding is masked, "
                "so that the end-of-text token may serve for it."
            )
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, not {max_length}.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated: dict[str, int] = {}

    # What a kind of task says about itself.

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
        """Tokenise a batch of checked rows: ``(new columns, how many texts were cut)``."""

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
        if cut:
            logger.warning(
                "%s: %d of %d texts were cut to max_length=%d tokens.", name, cut, len(rows), self.max_length
            )
        return done

    def tokens(
        self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> tuple[dict[str, list[Any]], list[int]]:
        """Tokenise texts or pairs of texts: ``(model inputs, which texts were cut to max_length)``."""
        second = None if pairs is None else list(pairs)
        out = tokenizer(list(texts), second, truncation=True, max_length=self.max_length)
        full = [i for i, ids in enumerate(out["input_ids"]) if len(ids) >= self.max_length]
        cut: list[int] = []
        if full:
            # Only a text that fills max_length can have been cut: look at those again, whole.
            rest = None if second is None else [second[i] for i in full]
            whole = tokenizer([texts[i] for i in full], rest, verbose=False)["input_ids"]
            cut = [i for i, ids in zip(full, whole, strict=True) if len(ids) > self.max_length]
        return {key: out[key] for key in MODEL_INPUTS if key in out}, cut

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of tensors, padded to its longest text on the tokenizer's padding side.

        Shape: input_ids, attention_mask (and token_type_ids) (b, T), labels (b,); no labels where the rows have none.
        """
        inputs = {key: [row[key] for row in rows] for key in MODEL_INPUTS if key in rows[0]}
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = self.label_tensor([row["labels"] for row in rows])
        return batch

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
        model = self.auto_class.from_pretrained(name_or_path, **options, **self.head_options())
        if model.config.get_text_config().pad_token_id is None:
            # Llama and GPT-2 classifiers find a text's last token by its padding, and refuse batches without this.
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model

    def with_positions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``position_ids`` (b, T) to a left-padded batch, so that each text's first real token is at 0.

        A causal model counts positions from the row's start: one with absolute positions (GPT-2) would read a text
        differently for every amount of padding before it. Right padding needs nothing of the kind.
        """
        if self.tokenizer.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch

    def head_options(self) -> dict[str, Any]:
        """What ``from_pretrained`` must be told about the head."""
        return {}
