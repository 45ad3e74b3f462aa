from __future__ import annotations

import datasets
import pytest

from pyrolora.tasks.data import DataError, Table
from pyrolora.tasks.labels import LabelIndex, classes_of


def table(values: list) -> Table:
    return Table("data.jsonl", [{"label": value} for value in values], lines=range(1, len(values) + 1))


def test_labels_are_found_by_name_and_by_index():
    """Law: the k-th class is found by its name and by k; anything else is −1."""
    index = LabelIndex(["neg", "pos"])
    assert [index.get(value) for value in ("neg", "pos", 0, 1, True, 1.0)] == [0, 1, 0, 1, 1, 1]
    assert [index.get(value) for value in (2, -1, "x", None, [0], float("nan"))] == [-1] * 6


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([1, 0, 1], ("0", "1")),
        ([5, 3, 10], ("3", "5", "10")),
        ([True, False], ("False", "True")),
    ],
)
def test_default_classes_are_the_sorted_distinct_labels(values, names):
    """Law: classes are the distinct labels in sorted order (numbers as numbers), found again by value and name."""
    index = classes_of(table(values), "label")
    assert index.names == names
    assert [names[index.get(value)] for value in values] == [str(value) for value in values]


def test_declared_classes_come_first():
    """Law: a ClassLabel feature gives names and order, whatever labels occur."""
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ape", "cat"])})
    rows = datasets.Dataset.from_dict({"label": [1, 1]}, features=features)
    assert classes_of(Table("data", rows), "label").names == ("zebra", "ape", "cat")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, None, 1], r"data\.jsonl: 1 bad row of 3:\n  line 2: no 'label'"),
        ([0, float("nan"), 1], "line 2: no 'label'"),
        ([0, 1, -1], "line 3: 'label' -1 is not a class index"),
        ([0, 1, 0.5], "line 3: 'label' 0.5 is not a class index"),
        ([0, 1, float("inf")], "line 3: 'label' inf is not a class index"),
        ([0, [1]], r"line 2: 'label' is list \[1\]"),
        ([0, "one"], "mixes text and numbers"),
        (["a", "a"], "every 'label' is 'a'"),
    ],
)
def test_labels_that_can_be_no_class_stop(values, message):
    """Law: each kind of unusable label is an error that says where and why."""
    with pytest.raises(DataError, match=message):
        classes_of(table(values), "label")


def test_duplicate_names_are_refused_and_long_lists_are_shortened():
    """Law: class names are distinct; a message shows ten of them."""
    with pytest.raises(ValueError, match="duplicates"):
        LabelIndex(["a", "a"])
    assert LabelIndex([str(i) for i in range(150)]).describe().endswith("'9', ... (150 in all)")
