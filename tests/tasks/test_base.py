from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from pyrolora.tasks.sequence_classification import SequenceClassification

ROWS = datasets.Dataset.from_list([{"text": "a b c", "label": 0}, {"text": "b", "label": 1}])


def words(pad_token: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token=pad_token
    )


def test_a_tokenizer_without_padding_says_what_to_do():
    """Law: no padding token is an error with the line that mends it."""
    with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
        SequenceClassification(words(None), train=ROWS)


def test_further_data_need_no_labels():
    """Law: tokenise reads unlabelled rows with the task's tokenizer, labels −1; bad texts still stop."""
    task = SequenceClassification(words("<eos>"), train=ROWS)
    new = task.tokenise(datasets.Dataset.from_dict({"text": ["c a"]}))
    assert new[0]["input_ids"] == [4, 2] and new[0]["labels"] == -1
    with pytest.raises(ValueError, match="row 1: 'text' is empty"):
        task.tokenise(datasets.Dataset.from_dict({"text": [""]}))


def test_rows_without_labels_make_a_batch_without_labels():
    """Law: collate leaves labels out where the rows have none."""
    task = SequenceClassification(words("<eos>"), train=ROWS)
    rows = [{"input_ids": [2, 3], "attention_mask": [1, 1]}]
    assert set(task.collate(rows)) == {"input_ids", "attention_mask"}


def test_a_data_sets_format_does_not_matter():
    """Law: data with a torch format read like the same data without."""
    plain, formatted = (
        SequenceClassification(words("<eos>"), train=rows) for rows in (ROWS, ROWS.with_format("torch"))
    )
    assert list(plain.train) == list(formatted.train)


def test_base_models_know_the_padding_token(tmp_path):
    """Law: a checkpoint without a padding token gets the tokenizer's, and classifies padded texts as it does alone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=5, num_key_value_heads=1, num_labels=2, eos_token_id=1, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    task = SequenceClassification(words("<eos>"), train=ROWS)
    model = task.load_base_model(str(tmp_path), dtype="float32").eval()
    assert model.config.pad_token_id == 1 and model.dtype == torch.float32
    batch = task.collate([task.train[0], task.train[1]])
    with torch.no_grad():
        together = model(**task.likelihood.forward_inputs(batch)).logits
        alone = model(input_ids=torch.tensor([[3]])).logits
    torch.testing.assert_close(together[1:], alone)
