"""Inference: fit, posterior, prediction."""

from pyrolora.inference.archive import ArchiveError
from pyrolora.inference.elbo import Objective, TemperedELBO
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.generate import generate
from pyrolora.inference.generation import GeneratedText, Generation
from pyrolora.inference.join import join
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import NonFiniteError
from pyrolora.inference.prediction import Prediction
from pyrolora.inference.trainer import ELBOTrainer

__all__ = [
    "ArchiveError",
    "ELBOTrainer",
    "GeneratedText",
    "Generation",
    "NonFiniteError",
    "Objective",
    "Posterior",
    "Prediction",
    "TemperedELBO",
    "default_arguments",
    "fit",
    "generate",
    "join",
]
