"""Guides: interchangeable approximations of one and the same program's posterior."""

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField

__all__ = ["MAP", "Guide", "Inducing", "InputAdaptive", "Laplace", "MeanField"]
