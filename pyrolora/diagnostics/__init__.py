"""Diagnostics: calibration, uncertainty and its uses, comparison under one evaluator, the posterior through ArviZ."""

from pyrolora.diagnostics.bootstrap import Estimate
from pyrolora.diagnostics.calibration import ReliabilityCurve, evaluate, reliability_curve
from pyrolora.diagnostics.checks import Predictive, check, posterior_predictive, prior_predictive
from pyrolora.diagnostics.compare import Comparison, compare
from pyrolora.diagnostics.convergence import rhat
from pyrolora.diagnostics.diagnose import Diagnosis, diagnose
from pyrolora.diagnostics.differences import Contrast, Difference, difference
from pyrolora.diagnostics.distance import Distance, distance, distances
from pyrolora.diagnostics.evaluation import Evaluation, evaluate_posterior, evaluate_prediction
from pyrolora.diagnostics.language import LanguageEvaluation, evaluate_language
from pyrolora.diagnostics.ood import evaluate_ood, separation
from pyrolora.diagnostics.psis import compare_loo, guide_khat, loo
from pyrolora.diagnostics.selective import RiskCoverageCurve, evaluate_selective, risk_coverage_curve
from pyrolora.diagnostics.sensitivity import power_scaling
from pyrolora.diagnostics.temperature import calibrate, fit_temperature, scale
from pyrolora.diagnostics.tokens import token_uncertainty
from pyrolora.diagnostics.uncertainty import Component, DrawsCurve, Uncertainty, decompose, nll_by_draws
from pyrolora.diagnostics.verdict import Finding
from pyrolora.diagnostics.weights import Weights, summarise

__all__ = [
    "Comparison",
    "Component",
    "Contrast",
    "Diagnosis",
    "Difference",
    "Distance",
    "DrawsCurve",
    "Estimate",
    "Evaluation",
    "Finding",
    "LanguageEvaluation",
    "Predictive",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "Uncertainty",
    "Weights",
    "calibrate",
    "check",
    "compare",
    "compare_loo",
    "decompose",
    "diagnose",
    "difference",
    "distance",
    "distances",
    "evaluate",
    "evaluate_language",
    "evaluate_ood",
    "evaluate_posterior",
    "evaluate_prediction",
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
    "token_uncertainty",
]
