"""Guides: interchangeable approximations of one and the same program's posterior."""

from pyrolora.guides.base import Guide
from pyrolora.guides.dropout import Dropout
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.guides.nuts import NUTS
from pyrolora.guides.samples import Checkpoints
from pyrolora.guides.sgld import SGLD
from pyrolora.guides.subspace import Subspace
from pyrolora.guides.swag import SWAG
from pyrolora.guides.tfb import TFB

__all__ = [
    "MAP",
    "NUTS",
    "SGLD",
    "SWAG",
    "TFB",
    "Checkpoints",
    "Dropout",
    "Ensemble",
    "Guide",
    "Inducing",
    "InputAdaptive",
    "Laplace",
    "MeanField",
    "Subspace",
]
