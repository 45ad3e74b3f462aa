"""Diagnostics: calibration, uncertainty and its uses, comparison under one evaluator, the posterior through ArviZ."""

from pyrolora.diagnostics.calibration import Estimate, ReliabilityCurve, evaluate, reliability_curve
from pyrolora.diagnostics.checks import Predictive, check, posterior_predictive, prior_predictive
from pyrolora.diagnostics.compare import Comparison, Evaluation, compare, evaluate_posterior
from pyrolora.diagnostics.convergence import rhat
from pyrolora.diagnostics.diagnose import Diagnosis, diagnose
from pyrolora.diagnostics.ood import evaluate_ood, separation
from pyrolora.diagnostics.psis import compare_loo, guide_khat, loo
from pyrolora.diagnostics.selective import RiskCoverageCurve, evaluate_selective, risk_coverage_curve
from pyrolora.diagnostics.sensitivity import power_scaling
from pyrolora.diagnostics.temperature import fit_temperature, scale
from pyrolora.diagnostics.uncertainty import Component, DrawsCurve, Uncertainty, decompose, nll_by_draws
from pyrolora.diagnostics.verdict import Finding
from pyrolora.diagnostics.weights import Weights, summarise

__all__ = [
    "Comparison",
    "Component",
    "Diagnosis",
    "DrawsCurve",
    "Estimate",
    "Evaluation",
    "Finding",
    "Predictive",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "Uncertainty",
    "Weights",
    "check",
    "compare",
    "compare_loo",
    "decompose",
    "diagnose",
    "evaluate",
    "evaluate_ood",
    "evaluate_posterior",
    "evaluate_selective",
    "fit_temperature",
    "guide_khat",
    "loo",
    "nll_by_draws",
    "posterior_predictive",
    "power_scaling",
    "prior_predictive",
    "reliability_curve",
    "rhat",
    "risk_coverage_curve",
    "scale",
    "separation",
    "summarise",
]
