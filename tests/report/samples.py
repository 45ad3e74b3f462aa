"""A whole results dictionary by hand, which tests of the report share."""

from __future__ import annotations

from typing import Any

DRAWS = [[0.9, 0.1], [0.2, 0.8], [0.95, 0.05]]


def estimate(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metrics(nll: float) -> dict[str, Any]:
    values = {"accuracy": 0.8, "nll": nll, "ece": nll / 7, "brier": 0.3, "adaptive_ece": 0.05, "mce": 0.2}
    values |= {"classwise_ece": 0.04, "aurc": 0.11, "excess_aurc": 0.05, "error_auroc": 0.71, "accuracy@0.8": 0.87}
    return {name: estimate(value) for name, value in values.items()}


def uncertainty(epistemic: float, error: float | None) -> dict[str, Any]:
    parts = {"entropy": 0.4 + epistemic, "expected_entropy": 0.4, "mutual_information": epistemic}
    return {name: {**estimate(value), "monte_carlo_error": error} for name, value in parts.items()}


def separation(area: float, *, scores: tuple[str, ...]) -> dict[str, Any]:
    one = {"auroc": estimate(area), "aupr_out": estimate(0.4), "fpr95": estimate(0.9)}
    return {
        "scores": dict.fromkeys(scores, one),
        "histogram": {"edges": [0.0, 0.35, 0.7], "inside": [400, 200], "outside": [17, 60]},
        "uncertainty": uncertainty(0.2, None),
        "num_examples": 77,
    }


def cell(method: str, nll: float, *, seed: int = 0, split: str = "test", draws: int = 1) -> dict[str, Any]:
    """A cell of a point estimate, or with several draws of a posterior."""
    random = draws > 1
    scores = ("max_probability", "entropy", "mutual_information") if random else ("max_probability", "entropy")
    return {
        "method": method,
        "description": f"about {method}",
        "seed": seed,
        "split": split,
        "num_draws": draws,
        "joint_draws": True,
        "num_examples": 600,
        "metrics": metrics(nll),
        "scaling": 1.42,
        "scaled_metrics": metrics(nll - 0.1),
        "reliability": {
            "edges": [0.0, 0.5, 1.0], "confidence": [None, 0.9], "accuracy": [None, 0.7], "count": [0, 600]
        },
        "risk_coverage": {"coverage": [0.5, 1.0], "risk": [0.1, 0.2]},
        "uncertainty": uncertainty(0.05 if random else 0.0, 0.003 if random else None),
        "averaging": {
            "mean_weights": nll + 0.2,
            "gain": {**estimate(-0.2), "real": True},
            "by_draws": {"sizes": [1, draws], "nll": [nll + 0.1, nll], "sd": [0.1, None], "num_subsets": [9, 1]},
        } if random else None,
        "ood": {"arc_easy": separation(0.75 if random else 0.6, scores=scores)} if split == "test" else {},
        "cost": {
            "fit_seconds": 20.0 * nll, "fit_memory": 1.2e9, "predict_seconds": 1.5, "parameters": 74496, "passes": draws
        },
    }  # fmt: skip


def contrast(
    method: str, gap: float, *, real: bool = True, scaled: bool = False, other: bool = False
) -> dict[str, Any]:
    found = {
        name: {**estimate(gap, 0.05), "sd": None, "num_seeds": 2, "real": real}
        for name in ("accuracy", "nll", "ece", "brier", "aurc")
    }
    about = {"split": "test", "method": method, "scaled": scaled, "baseline": "LoRA", "baseline_scaled": other}
    return {**about, "metrics": found}


def example(kind: str, text: str, *, label: int = 1) -> dict[str, Any]:
    says = {
        "LoRA": {"probabilities": [0.99, 0.01], "draws": [[0.99, 0.01]]},
        "MeanField": {"probabilities": [0.88, 0.12], "draws": DRAWS},
    }
    return {"kind": kind, "score": 0.1234, "row": 0, "text": text, "label": label, "says": says}


def results() -> dict[str, Any]:
    """Two methods, two seeds, another split."""
    means = {"MeanField": (0.45, 16), "LoRA": (0.7, 1)}
    cells = [
        cell(method, mean + 0.01 * seed, seed=seed, draws=draws)
        for method, (mean, draws) in means.items()
        for seed in (0, 2)
    ]
    cells += [cell("MeanField", 0.9123, split="arc_easy", draws=16), cell("LoRA", 1.3, split="arc_easy")]
    return {
        "format": 3,
        "title": "A comparison",
        "baseline": "LoRA",
        "task": {"name": "sst2", "class_names": ["bad", "good"], "splits": {"train": 400, "test": 600, "arc_easy": 77}},
        "settings": {
            "num_draws": 16,
            "seeds": [0, 2],
            "temperature": {"LoRA": 1.0, "MeanField": 0.3},
            "versions": {"torch": "2.13.0"},
            "hardware": "two cores",
            "recipes": [
                {
                    "name": "small",
                    "file": "models/small.yaml",
                    "sha256": "0123456789abcdef" * 4,
                    "git": {"commit": "c0ffee", "file_changed": True, "tree_changed": False},
                    "priors": {"*.A": "Normal(0.05)"},
                    "text": "lora:\n  r: 8",
                }
            ],
        },
        "cells": cells,
        "contrasts": [
            contrast("LoRA", -0.3, scaled=True),
            contrast("MeanField", -0.25),
            contrast("MeanField", -0.02, real=False, other=True),
            contrast("MeanField", -0.1, scaled=True, other=True),
        ],
        "examples": [example("wrong", "a fine film"), example("draws", "a film, a film")],
        "heatmaps": [
            {"title": "Noise", "unit": "ratio", "method": "MeanField", "values": {"query": {"0": 0.1, "1": 0.4}}}
        ],
    }
