"""Distributions over adapter matrices, with closed-form divergences."""

import pyrolora.distributions.kl  # noqa: F401 - registers the closed forms
from pyrolora.distributions.centred import Centred
from pyrolora.distributions.flat import Flat
from pyrolora.distributions.full_normal import FullMatrixNormal
from pyrolora.distributions.inducing import InducedMatrixNormal
from pyrolora.distributions.kronecker import LowRankKroneckerNormal
from pyrolora.distributions.matrix_normal import MatrixNormal

__all__ = ["Centred", "Flat", "FullMatrixNormal", "InducedMatrixNormal", "LowRankKroneckerNormal", "MatrixNormal"]
