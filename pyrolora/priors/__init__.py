"""Priors over adapter matrices: declared by pattern, each a callable from site group to distribution."""

from pyrolora.priors.base import Prior, PriorError
from pyrolora.priors.by_site import by_site
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical, Horseshoe
from pyrolora.priors.matrix_normal import MatrixNormal
from pyrolora.priors.normal import Normal

__all__ = ["ARD", "Flat", "Hierarchical", "Horseshoe", "MatrixNormal", "Normal", "Prior", "PriorError", "by_site"]
