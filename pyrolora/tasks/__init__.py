"""Tasks: data and a likelihood, with the tokenizer between them."""

from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataError, DataSource
from pyrolora.tasks.sequence_classification import SequenceClassification

__all__ = ["DataError", "DataSource", "SequenceClassification", "Task"]
