"""Reading labelled data: files, hub names and datasets into checked tables.

A source is read, then checked, then becomes a :class:`datasets.Dataset`. Rows are checked before anything else
happens to them, so that a bad row stops with its file and line, not with a shape error an hour later.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SHOWN = 5  # bad rows written out in an error; the rest are counted


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the row and the reason."""


@dataclass(frozen=True)
class DataSource:
    """Where a split comes from, for hub data sets that need more than a name.

    Attributes:
        path: a hub name, a folder laid out like a hub data set, or a local file (.jsonl, .json, .csv, .tsv, .parquet,
            .txt; text files also as .gz).
        split: the hub split; by default the name of the split that it is used as.
        config: the hub configuration, such as "sst2" of "nyu-mll/glue".
        columns: what the task calls a column to what it is called here, where one split names them otherwise than the
            rest: ``{"question_stem": "question"}``.
    """

    path: str
    split: str | None = None
    config: str | None = None
    columns: Mapping[str, str] | None = None


Source: TypeAlias = str | os.PathLike[str] | DataSource | datasets.Dataset

Problem: TypeAlias = tuple[int, str]  # (row index, reason)


@dataclass(frozen=True)
class Table:
    """Rows as they were read, with what is needed to point at one of them.

    Attributes:
        origin: what to call the data in messages: a path, a hub name, or the name of the split.
        rows: a data set, or the objects of a JSON Lines file that have not been forced into columns yet.
        lines: the 1-based line of each row, where rows are lines of a file.
    """

    origin: str
    rows: datasets.Dataset | list[dict[str, Any]]
    lines: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        """What to call one row: "line 7" of a file of lines, "row 7" (1-based) of anything else."""
        return f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"

    @property
    def names(self) -> list[str]:
        """The columns, in order of first appearance."""
        if isinstance(self.rows, datasets.Dataset):
            return list(self.rows.column_names)
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def column(self, name: str) -> list[Any]:
        """One column's values, ``None`` where a row has none.

        Raises:
            DataError: no row has that column.
        """
        if name not in self.names:
            raise DataError(
                f"{self.origin}: no column '{name}'; its columns are {', '.join(self.names)}. "
                "Say in the task's arguments which column plays which part."
            )
        if isinstance(self.rows, datasets.Dataset):
            return list(self.rows[name])
        return [row.get(name) for row in self.rows]

    def class_label(self, name: str) -> tuple[str, ...] | None:
        """The class names that the data set itself declares for a column, if it does."""
        if isinstance(self.rows, datasets.Dataset):
            feature = self.rows.features.get(name)
            if isinstance(feature, datasets.ClassLabel):
                return tuple(feature.names)
        return None

    def dataset(self) -> datasets.Dataset:
        """The rows as a data set.

        Raises:
            DataError: a column holds values of different types.
        """
        if isinstance(self.rows, datasets.Dataset):
            return self.rows
        columns = {}
        for name in self.names:
            values = [row.get(name) for row in self.rows]
            try:
                pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise DataError(
                    f"{self.origin}: column '{name}' mixes types; give it one, or drop it. {error}"
                ) from error
            columns[name] = values
        return datasets.Dataset.from_dict(columns)


def read(source: Source, *, split: str, text_columns: Sequence[str] = ()) -> Table:
    """Read one split. Columns of a data set that have fields of their own become one a field: "choices.text".

    Args:
        source: a hub name, a local file, a :class:`DataSource` or a data set.
        split: what the split is for ("train"); the hub split too, unless the source says another.
        text_columns: columns that are text even where every value looks like a number (CSV has no types).

    Raises:
        DataError: the source cannot be read, or has no rows.
    """
    if isinstance(source, datasets.Dataset):
        table = Table(f"the {split} data set", source.with_format(None))
    elif isinstance(source, (datasets.DatasetDict, datasets.IterableDataset)):
        raise DataError(
            f"the {split} split must be one datasets.Dataset, not {type(source).__name__}; pass data['{split}']."
        )
    else:
        if not isinstance(source, DataSource):
            source = DataSource(os.fspath(source))
        table = _read_named(source, split, text_columns)
    if len(table) == 0:
        raise DataError(f"{table.origin}: the {split} split is empty.")
    if isinstance(table.rows, datasets.Dataset):
        table = dataclasses.replace(table, rows=table.rows.flatten())
    columns = source.columns if isinstance(source, DataSource) else None
    return _renamed(table, columns) if columns else table


def on_disk(path: Path, *, text_columns: Sequence[str] = ()) -> datasets.Dataset:
    """The rows of a file of any size: `datasets` converts it into its cache once, and no row stays in memory.

    Args:
        path: a .jsonl, .json, .csv, .tsv or .parquet file; also .gz of text.
        text_columns: as of :func:`read`.

    Raises:
        DataError: the file cannot be read, or has no rows.
    """
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    separated: dict[str, Any] = {"converters": dict.fromkeys(text_columns, str), "keep_default_na": False}
    readers: dict[str, Callable[[str], Any]] = {
        ".jsonl": datasets.Dataset.from_json,
        ".json": datasets.Dataset.from_json,
        ".csv": lambda file: datasets.Dataset.from_csv(file, **separated),
        ".tsv": lambda file: datasets.Dataset.from_csv(file, sep="\t", **separated),
        ".parquet": datasets.Dataset.from_parquet,
    }
    if suffix not in readers:
        raise DataError(f"{path}: cannot read '{suffix}' files; use one of {', '.join(readers)} (.gz for text).")
    try:
        rows: datasets.Dataset = readers[suffix](str(path))
        rows.data.validate(full=True)  # Arrow's reader of JSON takes any bytes for text
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError, StopIteration) as error:
        # What `datasets` says of a header alone, and what its reader of JSON does at an empty file.
        if "no data" in str(error) or isinstance(error, StopIteration):
            raise DataError(f"{path}: no rows.") from error
        raise DataError(f"{path}: damaged, or no {suffix} file in UTF-8: {error.__cause__ or error}") from error
    if len(rows) == 0:
        raise DataError(f"{path}: no rows.")
    return rows


def _renamed(table: Table, columns: Mapping[str, str]) -> Table:
    """The table with columns under the task's names; a column that had such a name already makes way."""
    if absent := [name for name in columns.values() if name not in table.names]:
        raise DataError(f"{table.origin}: no column '{absent[0]}'; its columns are {', '.join(table.names)}.")
    task = {theirs: own for own, theirs in columns.items()}
    kept = [name for name in table.names if name in task or name not in columns]
    if isinstance(table.rows, datasets.Dataset):
        rows = table.rows.select_columns(kept).rename_columns(task)
    else:
        rows = [{task.get(name, name): row[name] for name in kept if name in row} for row in table.rows]
    return dataclasses.replace(table, rows=rows)


def _read_named(source: DataSource, split: str, text_columns: Sequence[str]) -> Table:
    path = Path(source.path)
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    readers: Mapping[str, Callable[[Path], Table]] = {
        ".jsonl": _read_json,
        ".json": _read_json,
        ".txt": _read_lines,
        ".csv": lambda file: _read_csv(file, ",", text_columns),
        ".tsv": lambda file: _read_csv(file, "\t", text_columns),
        ".parquet": lambda file: Table(str(file), datasets.Dataset(pq.read_table(file))),
    }
    if suffix in readers:
        if not path.is_file():
            raise DataError(f"{path}: no such file (wanted for the {split} split).")
        try:
            return readers[suffix](path)
        except DataError:
            raise
        except (OSError, EOFError, UnicodeDecodeError, RecursionError, zlib.error, pa.ArrowException) as error:
            raise DataError(f"{path}: damaged, or no {suffix} file in UTF-8: {error}") from error
    if path.is_file():
        raise DataError(f"{path}: cannot read '{suffix}' files; use one of {', '.join(readers)} (.gz for text).")
    hub_split = source.split or split
    rows = datasets.load_dataset(source.path, source.config, split=hub_split)
    name = source.path if source.config is None else f"{source.path}/{source.config}"
    return Table(f"{name} [{hub_split}]", rows)


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _read_json(path: Path) -> Table:
    """JSON Lines, or a JSON array of objects."""
    with _open(path) as file:
        text = file.read()
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON: {error}.") from error
        lines = None
    else:
        rows, lines = [], []
        # Not str.splitlines: it also cuts at U+2028, which JSON allows inside a string.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}.") from error
            lines.append(number)
    table = Table(str(path), rows, lines)
    stop_at(table, ((i, "not an object with named columns") for i, row in enumerate(rows) if not isinstance(row, dict)))
    return table


def _read_lines(path: Path) -> Table:
    """Plain text: each line that is not blank is a row with the one column "text"."""
    with _open(path) as file:
        numbered = [(number, line.strip()) for number, line in enumerate(file, start=1) if line.strip()]
    return Table(str(path), [{"text": line} for _, line in numbered], [number for number, _ in numbered])


def _read_csv(path: Path, separator: str, text_columns: Sequence[str]) -> Table:
    try:
        # keep_default_na: a text that reads "NA" or "None" is that text, not a hole.
        frame = pd.read_csv(path, sep=separator, dtype=dict.fromkeys(text_columns, str), keep_default_na=False)
        rows = datasets.Dataset.from_pandas(frame, preserve_index=False)
    except (ValueError, OverflowError) as error:  # among them pandas' and Arrow's own, and a NUL in a column's name
        raise DataError(f"{path}: cannot be read as delimited text: {error}") from error
    return Table(str(path), rows)


def stop_at(table: Table, problems: Iterable[Problem]) -> None:
    """Stop if there are bad rows.

    Raises:
        DataError: names the file, the first few bad rows with their reasons, and how many there are.
    """
    found = sorted(problems)
    if not found:
        return
    shown = "\n".join(f"  {table.place(row)}: {reason}" for row, reason in found[:SHOWN])
    bad = len({row for row, _ in found})
    more = "" if len(found) <= SHOWN else f"\n  ... and {len(found) - SHOWN} more"
    raise DataError(f"{table.origin}: {bad} bad row{'s' if bad > 1 else ''} of {len(table)}:\n{shown}{more}")


def missing(value: Any) -> bool:
    """Whether a value stands for "nothing here": None, NaN or an empty string."""
    return value is None or value == "" or (isinstance(value, (float, np.floating)) and bool(np.isnan(value)))


def text_problems(name: str, values: Iterable[Any]) -> Iterator[Problem]:
    """Rows whose text is missing, empty, or not text."""
    for row, value in enumerate(values):
        if value is None:
            yield row, f"no '{name}'"
        elif not isinstance(value, str):
            yield row, f"'{name}' is {type(value).__name__} {value!r}, not text"
        elif not value.strip():
            yield row, f"'{name}' is empty"


def carve(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off a fraction at random: ``(the rest, the fraction)``, both in their original order.

    Raises:
        DataError: one of the two parts would be empty.
    """
    size = round(fraction * len(dataset))
    if not 0 < size < len(dataset):
        raise DataError(f"validation_fraction={fraction} of {len(dataset)} training rows leaves an empty split.")
    order = np.random.default_rng([seed, 0]).permutation(len(dataset))
    return dataset.select(np.sort(order[size:])), dataset.select(np.sort(order[:size]))


def subsample(dataset: datasets.Dataset, size: int, seed: int) -> datasets.Dataset:
    """``size`` rows at random, in their original order; all rows where there are no more than that.

    Samples of one seed are nested: a larger one contains the smaller.
    """
    if size >= len(dataset):
        return dataset
    order = np.random.default_rng([seed, 1]).permutation(len(dataset))
    return dataset.select(np.sort(order[:size]))
