"""The precision of a Gaussian prior: by maximising the Laplace evidence, or by validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from pyrolora.guides.base import check_choice
from pyrolora.likelihoods.base import ClassLikelihood
from pyrolora.program import Latent, PyroLoRA

logger = logging.getLogger("pyrolora")

Precision = Literal["auto", "marglik", "val_nll", "declared"]
Scope = Literal["site", "layer", "global"]

# Bounds of λ: prior standard deviations from 1e-4 to 1e3.
LOWEST, HIGHEST = 1e-6, 1e8


@torch.no_grad()
def tuned(laws: Mapping[str, Any], values: Mapping[str, Tensor], *, scope: Scope = "site") -> dict[str, Tensor]:
    """The λ at which ``∂ log Z/∂ log λ = ½(γ(λ) − λ‖θ‖²)`` is zero, ``γ = Σ (1 − λ/eigenvalue)``.

    γ falls and ``λ‖θ‖²`` rises with λ, so that there is one root, found by bisection of log λ: it cannot run away, and
    needs the factors alone. Where the weights are zero there is no root, and λ stands at its upper bound: it is said.

    Args:
        laws: Site to a `LowRankKroneckerNormal`; its own λ does not matter.
        values: Site to the MAP estimate, ``(layers, *shape)``.
        scope: What shares one λ.

    Returns:
        λ by site, ``(layers,)``.

    Source: MacKay 1992, eq. 4.9.
    """
    squared = {name: value.double().square().sum((-2, -1)) for name, value in values.items()}

    def slope(log_precision: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, law in laws.items():
            precision = log_precision[name].exp()
            found[name] = (
                law.with_precision(precision.float()).effective_dimension().double() - precision * squared[name]
            )
        return _shared(found, scope)

    low = {name: torch.full_like(s, LOWEST).log() for name, s in squared.items()}
    high = {name: torch.full_like(s, HIGHEST).log() for name, s in squared.items()}
    for _ in range(60):
        middle = {name: (low[name] + high[name]) / 2 for name in laws}
        rising = slope(middle)
        for name in laws:
            low[name] = torch.where(rising[name] > 0, middle[name], low[name])
            high[name] = torch.where(rising[name] > 0, high[name], middle[name])
    chosen = {name: ((low[name] + high[name]) / 2).exp().float() for name in laws}
    _say_bounds(chosen)
    return chosen


def best_factor(factors: Tensor, scores: Tensor) -> float:
    """The factor on λ with the smallest validation NLL; says so where it is the first or the last that was tried."""
    best = int(scores.argmin())
    if best in (0, len(factors) - 1):
        logger.warning(
            "the validation NLL is smallest at the %s factor on the evidence's prior precision that was tried, %g: the "
            "optimum may lie beyond it",
            "smallest" if best == 0 else "largest",
            float(factors[best]),
        )
    return float(factors[best])


def validates(precision: Precision | float, program: PyroLoRA) -> bool:
    """Whether λ is chosen on validation data: ``"val_nll"``, and ``"auto"`` where there are such data and classes."""
    has_classes = isinstance(program.likelihood, ClassLikelihood)
    return precision == "val_nll" or (precision == "auto" and has_classes and bool(_validation(program)))


def validation_rows(program: PyroLoRA) -> Dataset:
    """The task's validation split.

    Raises:
        ValueError: There is none.
    """
    if data := _validation(program):
        return data
    raise ValueError("Laplace(precision='val_nll') needs a validation split: give the task one, or use 'marglik'")


def _validation(program: PyroLoRA) -> Dataset | None:
    return program.task.validation if program.task is not None else None


def declared_precision(latent: Latent) -> float:
    """One over the variance of a site's declared Normal prior."""
    if latent.flat:
        raise ValueError(
            f"Laplace(precision='declared'): site {latent.name!r} has a flat prior; declare priors.Normal for it, or "
            "use precision='marglik'"
        )
    return latent.prior_scale**-2


def check_precision(value: Precision | float) -> Precision | float:
    """A positive number, or one of the names.

    Raises:
        ValueError: Neither.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"Laplace: a precision is one over a variance, and positive, not {value!r}")
        return float(value)
    return check_choice("Laplace: precision", value, Precision)


def _shared(found: Mapping[str, Tensor], scope: Scope) -> dict[str, Tensor]:
    """Sums of slopes over what shares a λ."""
    if scope == "layer":
        return dict(found)
    sums = {name: value.sum().expand_as(value) for name, value in found.items()}
    if scope == "site":
        return sums
    total = torch.stack([value.sum() for value in found.values()]).sum()
    return {name: total.expand_as(value) for name, value in found.items()}


def _say_bounds(chosen: Mapping[str, Tensor]) -> None:
    at = [name for name, value in chosen.items() if bool((value > HIGHEST / 2).any() or (value < LOWEST * 2).any())]
    if at:
        logger.warning(
            "the evidence has no optimum of the prior precision at %s: λ stands at its bound. Are the weights there "
            "zero, or was nothing learnt?",
            ", ".join(at),
        )
