"""Diagnostics: calibration, uncertainty and its uses, temperature scaling, comparison under one evaluator."""

from pyrolora.diagnostics.bootstrap import Estimate
from pyrolora.diagnostics.calibration import ReliabilityCurve, evaluate, reliability_curve
from pyrolora.diagnostics.compare import Comparison, compare
from pyrolora.diagnostics.differences import Contrast, Difference, difference
from pyrolora.diagnostics.evaluation import Evaluation, evaluate_posterior, evaluate_prediction
from pyrolora.diagnostics.ood import evaluate_ood, separation
from pyrolora.diagnostics.selective import RiskCoverageCurve, evaluate_selective, risk_coverage_curve
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.diagnostics.uncertainty import Component, DrawsCurve, Uncertainty, decompose, nll_by_draws

__all__ = [
    "Comparison",
    "Component",
    "Contrast",
    "Difference",
    "DrawsCurve",
    "Estimate",
    "Evaluation",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "Uncertainty",
    "compare",
    "decompose",
    "difference",
    "evaluate",
    "evaluate_ood",
    "evaluate_posterior",
    "evaluate_prediction",
    "evaluate_selective",
    "fit_temperature",
    "nll_by_draws",
    "reliability_curve",
    "risk_coverage_curve",
    "scale",
    "separation",
]
