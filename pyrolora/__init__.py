"""pyrolora: Bayesian low-rank adapters. One Pyro program over PEFT's adapters, many guides."""

import pyro

from pyrolora import guides, likelihoods, priors, tasks
from pyrolora.diagnostics.compare import Comparison, compare
from pyrolora.diagnostics.diagnose import Diagnosis, diagnose
from pyrolora.diagnostics.temperature import calibrate
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.generate import generate
from pyrolora.inference.generation import Generation
from pyrolora.inference.join import join
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.prediction import Prediction
from pyrolora.inference.sharding import shard
from pyrolora.inference.stream import predict_to_parquet
from pyrolora.program import PyroLoRA
from pyrolora.recipe import Recipe

# Parameters live in their modules, not in Pyro's global store: two posteriors never share one.
pyro.settings.set(module_local_params=True)

__all__ = [
    "Comparison",
    "Diagnosis",
    "Generation",
    "Posterior",
    "Prediction",
    "PyroLoRA",
    "Recipe",
    "calibrate",
    "compare",
    "default_arguments",
    "diagnose",
    "fit",
    "generate",
    "guides",
    "join",
    "likelihoods",
    "predict_to_parquet",
    "priors",
    "shard",
    "tasks",
]
