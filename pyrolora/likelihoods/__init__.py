"""Likelihoods: how data arise given the base model's output."""

from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import ClassLikelihood, Likelihood
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.likelihoods.normal import Normal

__all__ = ["AnswerTokens", "Categorical", "ClassLikelihood", "Likelihood", "NextToken", "Normal"]
