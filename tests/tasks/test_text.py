from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from peft import LoraConfig
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
)

from pyrolora.priors.flat import Flat
from pyrolora.program import PyroLoRA
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


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_texts_longer_than_the_positions(kind: str) -> None:
    """Law: a text that an absolute-position model has no position for stops before training, with the length that would
    fit, which does fit; rotary positions have no end."""
    common = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    common |= {"intermediate_size": 8, "num_labels": 2, "pad_token_id": 1, "max_position_embeddings": 10}
    configurations: dict[str, Any] = {
        "bert": lambda: BertConfig(**common),
        "roberta": lambda: RobertaConfig(**common),
        "gpt2": lambda: GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=10, pad_token_id=1),
        "llama": lambda: LlamaConfig(**common),
    }
    model = AutoModelForSequenceClassification.from_config(configurations[kind]()).eval()
    rows = [{"text": " ".join("abc"[i % 3] for i in range(size)), "label": size % 2} for size in (3, 14)]

    def build(length: int) -> tuple[SequenceClassification, PyroLoRA]:
        data = datasets.Dataset.from_list(rows)
        task = SequenceClassification(words("<eos>"), train=data, class_names=["0", "1"], max_length=length)
        targets = {"gpt2": ["c_attn"], "llama": ["q_proj"]}.get(kind, ["query"])
        config = LoraConfig(r=1, target_modules=targets, task_type="SEQ_CLS")
        return task, PyroLoRA(copy.deepcopy(model), config, priors={"*": Flat()}, task=task)

    if kind == "llama":
        build(20)
        return
    most = 8 if kind == "roberta" else 10
    with pytest.raises(ValueError, match=f"texts of 14 tokens, .* positions for {most}: give .* max_length={most} or"):
        build(20)
    task, program = build(most)
    batch = task.collate([row for row in task.train.remove_columns("text")])
    assert program.logits({}, batch).shape == (2, 2)
