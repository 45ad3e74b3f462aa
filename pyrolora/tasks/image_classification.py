"""Classes of images, for vision models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor

from pyrolora.likelihoods.categorical import Categorical
from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataError, Problem, Source, Table, missing
from pyrolora.tasks.labels import LabelIndex, classes_of


class ImageClassification(Task):
    """A class for each image; the head is the model's image classification head.

    Images are a column of type ``datasets.Image``, as the hub, ``Dataset.cast_column`` and ``imagefolder`` give it;
    they are decoded and resized batch by batch, when they are needed. The column ``text`` has an image's size and a
    digest of its contents. Classes are found as in `SequenceClassification`.

    Shapes: pixel_values (b, channels, height, width), logits (b, K), labels (b,).

    Args:
        processor: the base model's image processor.
        train: the training split: a hub name, a ``.parquet`` file, a ``DataSource`` or a ``datasets.Dataset``.
        validation: the validation split.
        test: the test split.
        ood: named out-of-distribution splits; their labels need not be classes of this task.
        image: the column of the image.
        label: the column of the label.
        class_names: the classes in the order of their indices.
        max_train: train on this many rows only, drawn at random.
        validation_fraction: carve this fraction off train at random for validation, before ``max_train`` applies.
        data_seed: the seed of both random choices.

    Raises:
        DataError: a split cannot be read, is empty, or has rows that cannot be used.
    """

    auto_class: ClassVar[Any] = AutoModelForImageClassification

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        image: str = "image",
        label: str = "label",
        class_names: Sequence[str] | None = None,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__()
        self.processor = processor
        self.image, self.label = image, label
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

    @classmethod
    def load_processor(cls, name_or_path: str) -> BaseImageProcessor:
        """The image processor."""
        return AutoImageProcessor.from_pretrained(name_or_path)

    @property
    def text_columns(self) -> tuple[str, ...]:
        """None."""
        return ()

    @property
    def index(self) -> LabelIndex:
        """From labels to classes."""
        assert self._index is not None
        return self._index

    def learn(self, table: Table) -> None:
        """Fix the classes and the likelihood."""
        if self._index is None:
            self._index = classes_of(table, self.label)
        self.class_names = self.index.names
        self.num_labels = len(self.class_names)
        self.likelihood = Categorical(self.num_labels)

    def content_problems(self, table: Table) -> Iterable[Problem]:
        """Rows without an image; nothing is decoded."""
        rows = table.rows
        if self.image not in table.names:
            table.column(self.image)  # says which columns there are
        if not isinstance(rows, datasets.Dataset) or not isinstance(rows.features[self.image], datasets.Image):
            raise DataError(
                f"{table.origin}: column '{self.image}' holds no images; dataset.cast_column('{self.image}', "
                "datasets.Image()) makes images of paths."
            )
        found = rows.select_columns([self.image]).cast_column(self.image, datasets.Image(decode=False))
        yield from ((row, f"no '{self.image}'") for row, value in enumerate(found[self.image]) if value is None)

    def label_problems(self, table: Table) -> Iterable[Problem]:
        """Rows whose label is missing or none of the classes."""
        for row, value in enumerate(table.column(self.label)):
            if missing(value):
                yield row, f"no '{self.label}'"
            elif self.index.get(value) < 0:
                yield row, f"'{self.label}' {value!r} is not one of the classes {self.index.describe()}"

    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """What each image is called, and its label."""
        images = rows[self.image]
        labels = rows.get(self.label, [None] * len(images))
        text = [f"{i.width} × {i.height} image {hashlib.sha1(i.tobytes()).hexdigest()[:12]}" for i in images]
        return {"text": text, "labels": [self.index.get(value) for value in labels]}, 0

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of images, resized and normalised as the base model has it: pixel_values, labels (b,)."""
        images = [row[self.image].convert("RGB") for row in rows]
        batch = {"pixel_values": self.processor(images=images, return_tensors="pt")["pixel_values"]}
        if "labels" in rows[0]:
            batch["labels"] = self.label_tensor([row["labels"] for row in rows])
        return batch

    def head_options(self) -> dict[str, Any]:
        """The names of the classes, in place of those that the checkpoint's head was trained on."""
        names = dict(enumerate(self.class_names))
        return {"id2label": names, "label2id": {n: i for i, n in names.items()}, "ignore_mismatched_sizes": True}
