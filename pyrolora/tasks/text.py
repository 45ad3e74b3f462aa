"""Tasks whose inputs are texts: a tokenizer, its padding, and how much of a text is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pyrolora.tasks.base import Task

logger = logging.getLogger("pyrolora")

# What the tables of absolute positions are called; rotary positions have no end.
_POSITIONS = ("position_embeddings", "embed_positions", "wpe")

MODEL_INPUTS = ("input_ids", "token_type_ids", "attention_mask")


class TextTask(Task):
    """A task that owns a tokenizer: splits have ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``.

    Attributes:
        tokenizer: the tokenizer that the splits were made with.
        max_length: the most tokens that a text may have.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has no padding token, so texts of different lengths "
                "cannot share a batch. Set tokenizer.pad_token = tokenizer.eos_token first: padding is masked, "
                "so that the end-of-text token may serve for it."
            )
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, not {max_length}.")
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._longest = 0

    @classmethod
    def load_processor(cls, name_or_path: str) -> PreTrainedTokenizerBase:
        """The tokenizer, with padding where it has none (the end-of-text token, which is masked)."""
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

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

    def _tokenised(self, rows: datasets.Dataset, name: str) -> datasets.Dataset:
        done = super()._tokenised(rows, name)
        ids = done.data.column("input_ids")
        if pa.types.is_nested(ids.type.value_type):  # several choices a row
            ids = pc.list_flatten(ids)
        self._longest = max(self._longest, pc.max(pc.list_value_length(ids)).as_py() or 0)
        if cut := self.truncated[name]:
            logger.warning(
                "%s: %d of %d texts were cut to max_length=%d tokens.", name, cut, len(rows), self.max_length
            )
        return done

    def load_base_model(
        self, name_or_path: str, *, dtype: str | torch.dtype | None = None, quantization: Any = None
    ) -> PreTrainedModel:
        """The base model with the head that the task needs; its arguments are those of `Task.load_base_model`."""
        model = super().load_base_model(name_or_path, dtype=dtype, quantization=quantization)
        if model.config.get_text_config().pad_token_id is None:
            # Llama and GPT-2 classifiers find a text's last token by its padding, and refuse batches without this.
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model

    def check_model(self, model: nn.Module) -> None:
        """Stops before any training where a base model has too few positions for the texts that were tokenised.

        Raises:
            ValueError: the longest text has more tokens than a table of absolute positions has rows.
        """
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
                # RoBERTa and its kin count from after the padding token's index.
                most = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
                if self._longest > most:
                    raise ValueError(
                        f"there are texts of {self._longest} tokens, and the base model ({type(model).__name__}) has "
                        f"positions for {most}: give the task max_length={most} or less"
                    )

    def with_positions(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``position_ids`` (b, T) to a left-padded batch, so that each text's first real token is at 0.

        A causal model counts positions from the row's start: one with absolute positions (GPT-2) would read a text
        differently for every amount of padding before it. Right padding needs nothing of the kind.
        """
        if self.tokenizer.padding_side == "left":
            batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return batch
