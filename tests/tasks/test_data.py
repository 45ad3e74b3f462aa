from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pyrolora.tasks.data import (
    DataError,
    DataSource,
    Table,
    carve,
    missing,
    on_disk,
    read,
    stop_at,
    subsample,
    text_problems,
)

ROWS = [{"text": "good film", "label": 1}, {"text": "NA", "label": 0}, {"text": "007", "label": 1}]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the file's name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_reads_the_same_rows(tmp_path, name):
    """Law: whatever the file format, the rows come back equal ("NA" and "007" are texts)."""
    table = read(str(write(tmp_path / name, ROWS)), split="train", text_columns=["text"])
    assert list(table.dataset()) == ROWS
    assert table.origin == str(tmp_path / name)


def test_data_sources_and_paths_are_accepted(tmp_path):
    """Law: a path, its text and a DataSource of it name the same data; a data set stands for itself."""
    path = write(tmp_path / "a.jsonl", ROWS)
    for source in (path, str(path), DataSource(str(path)), datasets.Dataset.from_list(ROWS)):
        assert list(read(source, split="train").dataset()) == ROWS


def test_plain_text_has_a_row_for_each_line_with_words(tmp_path):
    """Law: a .txt file's rows are its lines that are not blank, stripped, with their line numbers."""
    (tmp_path / "a.txt").write_text(" = Title = \n\n \nSecond line.\n")
    table = read(tmp_path / "a.txt", split="train")
    assert table.column("text") == ["= Title =", "Second line."]
    assert [table.place(0), table.place(1)] == ["line 1", "line 4"]


def test_line_separators_inside_texts_do_not_cut_json_lines(tmp_path):
    """Law: U+2028 in a text is part of it and leaves line numbers right."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    table = read(path, split="train")
    assert table.column("text") == ["a\u2028b", "c"] and table.place(1) == "line 3"


def test_bad_json_names_file_and_line(tmp_path):
    """Law: a line that is not JSON, or not an object, stops with file and line."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
        read(path, split="train")
    path.write_text('{"text": "a"}\n[1, 2]\n')
    with pytest.raises(DataError, match=r"a\.jsonl: 1 bad row of 2:\n  line 2: not an object"):
        read(path, split="train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.parquet"])
def test_empty_data_name_the_split(tmp_path, name):
    """Law: a split without rows is an error that names file and split."""
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_text("[]" if name == "a.json" else "\n")
    with pytest.raises(DataError, match=rf"{name}: the validation split is empty"):
        read(path, split="validation")


def test_files_that_cannot_be_read_say_so(tmp_path):
    """Law: a missing file and an unknown kind of file are errors that name the path."""
    with pytest.raises(DataError, match=r"none\.jsonl: no such file \(wanted for the test split\)"):
        read(tmp_path / "none.jsonl", split="test")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"a\.xlsx: cannot read '\.xlsx' files"):
        read(tmp_path / "a.xlsx", split="test")
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv: cannot be read"):
        read(tmp_path / "a.csv", split="test")
    with pytest.raises(DataError, match="not DatasetDict; pass data"):
        read(datasets.DatasetDict(), split="train")


def test_hub_data_sets_load_the_split_of_their_role(tmp_path, monkeypatch):
    """Law: a data set with splits and configurations loads the split that it is used as, or the one asked for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "reviews"
    folder.mkdir()
    head = "---\nconfigs:\n"
    for config in ("short", "long"):
        head += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "validation"):
            write(folder / f"{config}-{split}.jsonl", [{"text": f"{config} {split}", "label": 0}])
            head += f"  - split: {split}\n    path: {config}-{split}.jsonl\n"
    (folder / "README.md").write_text(head + "---\n")

    table = read(DataSource(str(folder), config="long"), split="validation")
    assert table.origin == f"{folder}/long [validation]" and table.column("text") == ["long validation"]
    table = read(DataSource(str(folder), split="train", config="short"), split="test")
    assert table.origin == f"{folder}/short [train]" and table.column("text") == ["short train"]


def test_missing_column_lists_the_others():
    """Law: a column that no row has is an error with the columns there are."""
    with pytest.raises(DataError, match="no column 'sentence'; its columns are text, label"):
        Table("data", [dict(row) for row in ROWS]).column("sentence")


def test_columns_of_mixed_type_are_named():
    """Law: a column that cannot have one type is an error that names it, not an Arrow trace."""
    with pytest.raises(DataError, match="data: column 'extra' mixes types"):
        Table("data", [{"extra": 1}, {"extra": "one"}]).dataset()


def test_columns_that_only_some_rows_have_survive():
    """Law: a column absent from the first row is kept, None where absent."""
    rows = Table("data", [{"text": "a"}, {"text": "b", "note": "x"}]).dataset()
    assert rows["note"][:] == [None, "x"]


def test_bad_rows_are_listed_and_counted():
    """Law: an error shows the first five bad rows with their lines, and how many there are."""
    table = Table("file.jsonl", [{"text": ""}] * 8, lines=range(11, 19))
    with pytest.raises(DataError) as caught:
        stop_at(table, text_problems("text", table.column("text")))
    message = str(caught.value)
    assert message.startswith("file.jsonl: 8 bad rows of 8:\n  line 11: 'text' is empty")
    assert "line 15" in message and "line 16" not in message and message.endswith("... and 3 more")


def test_text_problems_name_each_kind():
    """Law: missing, empty and non-text values are bad rows; anything else is not."""
    found = list(text_problems("text", [None, "fine", " \n", 7, ["a"]]))
    assert found == [
        (0, "no 'text'"),
        (2, "'text' is empty"),
        (3, "'text' is int 7, not text"),
        (4, "'text' is list ['a'], not text"),
    ]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, True), ("", True), (float("nan"), True), (0, False), ("0", False)]
)
def test_missing_values(value, expected):
    """Law: None, NaN and "" are missing; zero is not."""
    assert missing(value) is expected


def test_subsamples_are_deterministic_and_nested():
    """Law: one seed gives one sample, a larger sample contains the smaller, another seed differs."""
    rows = datasets.Dataset.from_dict({"i": list(range(200))})
    small, large = subsample(rows, 20, 3)["i"][:], subsample(rows, 50, 3)["i"][:]
    assert small == subsample(rows, 20, 3)["i"][:] == sorted(small) and len(set(small)) == 20
    assert set(small) < set(large)
    assert small != subsample(rows, 20, 4)["i"][:]
    assert subsample(rows, 500, 3)["i"][:] == list(range(200))


def test_carving_is_a_partition():
    """Law: the two parts are disjoint, cover everything, have the asked sizes, and depend on the seed only."""
    rows = datasets.Dataset.from_dict({"i": list(range(50))})
    rest, part = carve(rows, 0.2, 0)
    assert len(part) == 10 and sorted([*rest["i"], *part["i"]]) == list(range(50))
    assert part["i"][:] == carve(rows, 0.2, 0)[1]["i"][:] != carve(rows, 0.2, 1)[1]["i"][:]
    assert not np.array_equal(part["i"][:], range(10))
    with pytest.raises(DataError, match="empty split"):
        carve(rows, 0.001, 0)


def test_fields_of_a_column_are_columns(tmp_path):
    """Law: a column of named fields is read as one column a field, from a data set and from Parquet alike."""
    rows = datasets.Dataset.from_list([{"id": 1, "choices": {"text": ["a", "b"], "label": ["A", "B"]}}])
    rows.to_parquet(tmp_path / "rows.parquet")
    for source in (rows, tmp_path / "rows.parquet"):
        table = read(source, split="train")
        assert sorted(table.names) == ["choices.label", "choices.text", "id"]
        assert table.column("choices.text") == [["a", "b"]] and table.column("id") == [1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "caf\xe9", "label": 0}\n'),
        ("a.jsonl", b'{"a":' * 100_000),
        ("a.json", b"[" * 100_000),
        ("a.txt", b"\xff\xfe"),
        ("a.csv", b"text,label\ncaf\xe9,0\n"),
        ("a.parquet", b"PAR1 and then something else PAR1"),
        ("a.jsonl.gz", b"not compressed"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a", "label": 0}\n' * 99, mtime=0)[:-12]),
        ("a.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff" + b"\xff" * 20),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[:12]),
)
def test_damaged_files_are_named(tmp_path, name, content):
    """Law: text in another encoding, bottomless nesting, and files that are cut or of another kind are errors that
    name the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        read(tmp_path / name, split="train", text_columns=("text",))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_source_may_name_its_columns_otherwise(tmp_path, kind):
    """Law: columns are read under the task's names, one that had such a name makes way, and a missing one is named."""
    rows = datasets.Dataset.from_list([{"question": "q", "answer": 1, "key": "x"}, {"question": "r", "answer": 0}])
    path = tmp_path / f"rows.{kind}"
    rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    columns = {"question_stem": "question", "key": "answer"}
    table = read(DataSource(str(path), columns=columns), split="far")
    assert sorted(table.names) == ["key", "question_stem"]
    assert table.column("question_stem") == ["q", "r"] and table.column("key") == [1, 0]
    with pytest.raises(DataError, match="no column 'stem'; its columns are"):
        read(DataSource(str(path), columns={"question": "stem"}), split="far")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_rows_stay_on_disk(tmp_path, suffix):
    """Law: the rows are those that `read` gives, from a file of the cache, not from memory; texts in CSV stay."""
    rows = {"text": ["007", "NA", "a, b", "ü\u2028x"], "label": ["no", "yes", "no", "no"]}
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([rows, *zip(*rows.values(), strict=True)])
    else:
        objects = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        text = json.dumps(objects) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in objects)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    found = on_disk(path, text_columns=("text",))
    assert found.to_dict() == rows == read(path, split="new", text_columns=("text",)).dataset().to_dict()
    assert found.cache_files and all(Path(file["filename"]).is_file() for file in found.cache_files)


def test_files_that_cannot_stay_on_disk_are_named(tmp_path):
    """Law: an unknown ending, a damaged file and one without rows are errors with the file's name."""
    for name, content, message in (
        ("a.xml", b"<a/>", "cannot read '.xml' files"),
        ("a.parquet", b"PAR1 no", "damaged"),
        ("a.jsonl", b'{"text": "a"\n', "damaged"),
        ("a.csv", b"text\n", "no rows"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            on_disk(tmp_path / name)
