"""Tasks: data and a likelihood, with the tokenizer between them."""

from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataError, DataSource
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.multiple_choice import AnswerTokenChoice, CandidateChoice
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense
from pyrolora.tasks.sequence_classification import SequenceClassification

__all__ = [
    "AnswerTokenChoice",
    "CandidateChoice",
    "DataError",
    "DataSource",
    "LanguageModeling",
    "PhysicalCommonsense",
    "SequenceClassification",
    "Task",
]
