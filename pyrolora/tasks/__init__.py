"""Tasks: data and a likelihood, with what makes the model's inputs between them."""

from pyrolora.tasks.base import Task
from pyrolora.tasks.data import DataError, DataSource
from pyrolora.tasks.image_classification import ImageClassification
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.multiple_choice import AnswerTokenChoice, CandidateChoice
from pyrolora.tasks.physical_commonsense import PhysicalCommonsense
from pyrolora.tasks.sequence_classification import SequenceClassification

__all__ = [
    "AnswerTokenChoice",
    "CandidateChoice",
    "DataError",
    "DataSource",
    "ImageClassification",
    "LanguageModeling",
    "PhysicalCommonsense",
    "SequenceClassification",
    "Task",
]
