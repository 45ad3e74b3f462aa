from __future__ import annotations

import logging
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer

from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.sequence_classification import SequenceClassification
from tests.tasks.test_base import ROWS, words


def test_a_tokenizer_is_loaded_with_padding(tmp_path: Path) -> None:
    """Law: a tokenizer on disk without a padding token gets its end-of-text token for it; another keeps its own."""
    words(None).save_pretrained(tmp_path / "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "none").pad_token is None
    assert SequenceClassification.load_processor(str(tmp_path / "none")).pad_token == "<eos>"
    words("<unk>").save_pretrained(tmp_path / "own")
    assert LanguageModeling.load_processor(str(tmp_path / "own")).pad_token == "<unk>"


def test_cut_texts_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Law: texts over max_length are cut to it, counted by split, and a warning says how many."""
    rows = datasets.Dataset.from_list([*ROWS, {"text": "c b a", "label": 0}])
    with caplog.at_level(logging.WARNING, "pyrolora"):
        task = SequenceClassification(words("<eos>"), train=rows, test=ROWS, max_length=2)
    assert task.truncated == {"train": 2, "test": 1}
    assert task.train["input_ids"][:] == [[2, 3], [3], [4, 3]]
    assert "train: 2 of 3 texts were cut to max_length=2 tokens" in caplog.text


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_begin_at_the_first_real_token(side: str) -> None:
    """Law: a left-padded batch of a causal task counts positions from each text's first token."""
    tokenizer = words("<eos>")
    tokenizer.padding_side = side
    task = LanguageModeling(tokenizer, train=datasets.Dataset.from_dict({"text": ["a b c a b c a"]}), max_length=4)
    batch = task.collate(list(task.train))
    assert ("position_ids" in batch) == (side == "left")
    if side == "left":
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * (len(batch["labels"]) - 1) + [
            (batch["attention_mask"][-1].cumsum(-1) - 1).clamp(min=0).tolist()
        ]
