from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyrolora.likelihoods.next_token import NextToken
from pyrolora.tasks.data import DataError
from pyrolora.tasks.language_modeling import LanguageModeling

WORDS = ["<bos>", "<eos>", *(f"w{i}" for i in range(18))]


def words(*, bos: bool = False, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token a word; puts <bos> before each text where asked to."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        padding_side=padding_side,
    )


def documents(*lengths: int) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [" ".join(WORDS[2 : 2 + n]) for n in lengths], "n": list(lengths)})


def test_blocks_are_the_joined_documents():
    """Law: blocks in order are the documents, each followed by the end-of-text token, and nothing else."""
    task = LanguageModeling(words(), train=documents(5, 3, 8), max_length=4)
    stream = [*range(2, 7), 1, *range(2, 5), 1, *range(2, 10), 1]
    assert [token for block in task.train["input_ids"] for token in block] == stream
    assert [len(block) for block in task.train["input_ids"]] == [4, 4, 4, 4, 3]
    assert task.train["labels"][:] == task.train["input_ids"][:]
    assert set(task.train.column_names) == {"text", "input_ids", "attention_mask", "labels"}
    assert task.train[0]["text"] == "w0 w1 w2 w3" and task.truncated == {"train": 0}
    assert isinstance(task.likelihood, NextToken) and task.class_names == ()


def test_the_tokenizers_own_special_tokens_separate():
    """Law: a tokenizer that puts <bos> before a text separates documents by it, and no end is added."""
    task = LanguageModeling(words(bos=True), train=documents(2, 3), max_length=16)
    assert task.train["input_ids"][:] == [[0, 2, 3, 0, 2, 3, 4]]


def test_a_last_block_of_one_token_is_left_out():
    """Law: a block without a next token is no example."""
    task = LanguageModeling(words(), train=documents(4), max_length=4)
    assert [len(block) for block in task.train["input_ids"]] == [4]
    with pytest.raises(DataError, match="train: a text of 1 token has no next token"):
        tokenizer = words()
        tokenizer.eos_token = None
        LanguageModeling(tokenizer, train=documents(1))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 7, 12])
def test_overlapping_blocks_score_each_token_once(stride, length):
    """Law: with a stride each token but the very first is scored in exactly one block, in its right place."""
    task = LanguageModeling(words(), train=documents(length), max_length=4, stride=stride)
    stream = [*range(2, 2 + length), 1]
    scored: list[int] = []
    for row in task.train:
        start = stream.index(row["input_ids"][0])
        assert row["input_ids"] == stream[start : start + 4]
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
        scored += [start + t for t, label in enumerate(row["labels"]) if t > 0 and label != -100]
    assert sorted(scored) == list(range(1, len(stream)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_score_like_single_blocks(side):
    """Law: a padded batch's log probabilities are those of each block alone, on either side of padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, num_key_value_heads=1, **sizes)).eval()
    task = LanguageModeling(words(padding_side=side), train=documents(13), max_length=5)
    rows = list(task.train)
    assert [len(row["input_ids"]) for row in rows] == [5, 5, 4]
    batch = task.collate(rows)
    assert bool(((batch["labels"] == -100) == (batch["attention_mask"] == 0)).all())
    with torch.no_grad():
        logits = task.likelihood.logits(model(**task.likelihood.forward_inputs(batch)), batch)
        together = task.likelihood.log_prob(logits, {}, batch)
        for n, row in enumerate(rows):
            ids = torch.tensor([row["input_ids"]])
            loss = model(input_ids=ids, labels=ids).loss
            torch.testing.assert_close(together[n], -loss * (ids.shape[1] - 1), atol=1e-4, rtol=0)


def test_lines_of_text_files_are_documents(tmp_path):
    """Law: each line with words is a document; a bad document of a .jsonl file is named by its line."""
    (tmp_path / "a.txt").write_text("w0 w1\n\n w2 \n")
    task = LanguageModeling(words(), train=str(tmp_path / "a.txt"))
    assert task.train["input_ids"][:] == [[2, 3, 1, 4, 1]]
    (tmp_path / "a.jsonl").write_text('{"text": "w0"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: 1 bad row of 2:\n  line 2: no 'text'"):
        LanguageModeling(words(), train=str(tmp_path / "a.jsonl"))


def test_documents_are_sampled_and_carved():
    """Law: max_train and validation_fraction count documents, and no document is in both splits."""
    rows = datasets.Dataset.from_dict({"text": [f"w{i} w{i}" for i in range(10)]})
    task = LanguageModeling(words(), train=rows, max_length=3, max_train=4, validation_fraction=0.3, data_seed=1)
    assert len(task.train) == 4 and len(task.validation) == 3
    assert not set(task.train["text"]) & set(task.validation["text"])


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_must_fit(stride):
    """Law: a stride of nothing, or one that would skip tokens, is an error."""
    with pytest.raises(ValueError, match="from 1 to max_length=8"):
        LanguageModeling(words(), train=documents(5), max_length=8, stride=stride)


def test_blank_rows_are_no_documents():
    """Law: blank rows change nothing; rows that are no text are refused, and so is a split of blank rows alone."""
    plain = documents(5, 3)
    spaced = datasets.Dataset.from_dict({"text": ["", *plain["text"][:1], " \n", *plain["text"][1:], ""]})
    tasks = [LanguageModeling(words(), train=rows, max_length=4) for rows in (plain, spaced)]
    assert tasks[0].train["input_ids"][:] == tasks[1].train["input_ids"][:]
    with pytest.raises(DataError, match="row 2: no 'text'"):
        LanguageModeling(words(), train=datasets.Dataset.from_dict({"text": ["", None]}))
    with pytest.raises(DataError, match="a text of 0 tokens"):
        LanguageModeling(words(), train=datasets.Dataset.from_dict({"text": ["", " "]}))
