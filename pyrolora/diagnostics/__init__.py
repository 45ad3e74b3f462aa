"""Diagnostics: calibration, temperature scaling, comparison under one evaluator."""

from pyrolora.diagnostics.calibration import Estimate, ReliabilityCurve, evaluate, reliability_curve
from pyrolora.diagnostics.compare import Comparison, Evaluation, compare, evaluate_posterior
from pyrolora.diagnostics.temperature import fit_temperature, scale

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "ReliabilityCurve",
    "compare",
    "evaluate",
    "evaluate_posterior",
    "fit_temperature",
    "reliability_curve",
    "scale",
]
