"""Language modelling: text, cut into blocks of equal length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pyrolora.likelihoods.next_token import IGNORED, NextToken
from pyrolora.tasks.data import DataError, Problem, Source, Table, text_problems
from pyrolora.tasks.text import TextTask


class LanguageModeling(TextTask):
    """The next token of running text, for causal language models.

    Documents are tokenised, joined (separated by the special tokens that the tokenizer puts round a text, or else by
    its end-of-text token) and cut into blocks; one block is one example of N. Each row that is not blank (each line of
    a .txt file) is a document. A block's ``text`` is its tokens, decoded; other columns end here, since a block can
    span documents.

    With ``stride`` < ``max_length`` blocks overlap, and what an earlier block has scored serves as context only
    (label −100): every token but the very first is scored exactly once. Without it each block starts afresh and its
    first token is not scored.

    Shapes: input_ids, attention_mask, labels (b, T). A left-padded batch carries ``position_ids``.

    Args:
        tokenizer: the base model's tokenizer; it must have a padding token (the end-of-text token may serve).
        train: the training split: a hub name, a local file, a ``DataSource`` or a ``datasets.Dataset``.
        validation: the validation split.
        test: the test split.
        ood: named out-of-distribution splits.
        text: the column of the text.
        max_length: tokens in a block; the last block of a split may be shorter.
        stride: tokens from one block's start to the next one's; by default ``max_length``, no overlap.
        max_train: train on this many documents only, drawn at random.
        validation_fraction: carve this fraction of documents off train for validation, before ``max_train`` applies.
        data_seed: the seed of both random choices.

    Raises:
        DataError: a split cannot be read, is empty, or has rows that cannot be used.
    """

    auto_class: ClassVar[Any] = AutoModelForCausalLM
    row_by_row: ClassVar[bool] = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train: Source,
        validation: Source | None = None,
        test: Source | None = None,
        ood: Mapping[str, Source] | None = None,
        text: str = "text",
        max_length: int = 128,
        stride: int | None = None,
        max_train: int | None = None,
        validation_fraction: float | None = None,
        data_seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length=max_length)
        if stride is not None and not 1 <= stride <= max_length:
            raise ValueError(f"stride must be from 1 to max_length={max_length} tokens, not {stride}.")
        self.text = text
        self.stride = stride
        self.num_labels = 0
        self.likelihood = NextToken()
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
        """The text."""
        return (self.text,)

    def learn(self, table: Table) -> None:
        """Nothing: text has no classes."""

    def content_problems(self, table: Table) -> Iterable[Problem]:
        """Documents that are missing or not text; blank ones, as between the paragraphs of a book, are left out."""
        values = table.column(self.text)
        blank = {row for row, value in enumerate(values) if isinstance(value, str) and not value.strip()}
        yield from (problem for problem in text_problems(self.text, values) if problem[0] not in blank)

    def label_problems(self, table: Table) -> Iterable[Problem]:
        """None: the text is its own label."""
        return ()

    def encode(self, rows: Mapping[str, list[Any]]) -> tuple[dict[str, list[Any]], int]:
        """Join a split's documents and cut the blocks; nothing is lost, so that nothing counts as cut."""
        documents = [text for text in rows[self.text] if text.strip()]
        stream = self._stream(documents) if documents else np.empty(0, dtype=np.int64)
        if len(stream) < 2:
            raise DataError(f"a text of {len(stream)} token{'s' * (len(stream) != 1)} has no next token to predict.")
        stride = self.stride or self.max_length
        ids, labels = [], []
        scored = 0  # tokens of the stream that some block has scored already
        for start in range(0, len(stream), stride):
            block = stream[start : start + self.max_length]
            target = block.copy()
            target[: max(scored - start, 0)] = IGNORED
            if (target[1:] != IGNORED).any():
                ids.append(block.tolist())
                labels.append(target.tolist())
            scored = max(scored, start + len(block))
        columns = {
            "text": self.tokenizer.batch_decode(ids),
            "input_ids": ids,
            "attention_mask": [[1] * len(block) for block in ids],
            "labels": labels,
        }
        return columns, 0

    def _stream(self, texts: list[str]) -> np.ndarray:
        """All tokens of a split, in order; shape (tokens,)."""
        documents: list[list[int]] = self.tokenizer(texts, verbose=False)["input_ids"]
        bare: list[int] = self.tokenizer(texts[0], add_special_tokens=False, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        separator = [end] if documents[0] == bare and end is not None else []
        return np.concatenate([np.asarray([*ids, *separator], dtype=np.int64) for ids in documents])

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of blocks, padded to its longest; labels are −100 where a token is padding or context only."""
        labels = [torch.tensor(row["labels"], dtype=torch.int64) for row in rows if "labels" in row]
        batch = super().collate([{key: value for key, value in row.items() if key != "labels"} for row in rows])
        if labels:
            side = self.tokenizer.padding_side
            batch["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORED, padding_side=side)
        return self.with_positions(batch)
