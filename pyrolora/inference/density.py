"""Draws of a guide and their densities under guide and prior, site by site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrolora.guides.base import Guide
from pyrolora.inference.predict import NonFiniteError, not_finite
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.program import PyroLoRA

Pair = tuple[poutine.Trace, poutine.Trace]


def traces(guide: Guide, num_draws: int, *, seed: int = 0) -> Iterator[poutine.Trace]:
    """The guide's trace of each draw; draw s depends on the seed and s alone.

    Args:
        guide: A bound guide.
        num_draws: S.
        seed: Of the draws.
    """
    guide.eval()
    for s in range(num_draws):
        with _drawing(guide, s, seed):
            q = poutine.trace(guide).get_trace()
        yield q


def paired_traces(program: PyroLoRA, guide: Guide, num_draws: int, *, seed: int = 0) -> Iterator[Pair]:
    """The guide's trace of each draw, and the prior's with the same values: the same sites, auxiliary ones too.

    Draw s is that of `Posterior.draw`. The prior is the program's as the guide rewrites it. Every site of a trace has
    its ``"log_prob"``.

    Args:
        program: The Pyro model.
        guide: A bound guide.
        num_draws: S.
        seed: Of the draws.
    """
    prior = poutine.reparam(program.sample_latents, config=guide.reparametrisations())
    guide.eval()
    for s in range(num_draws):
        with _drawing(guide, s, seed):
            q = poutine.trace(guide).get_trace()
            p = poutine.trace(poutine.replay(prior, trace=q)).get_trace()
            q.compute_log_prob()
            p.compute_log_prob()
        yield q, p


@contextlib.contextmanager
def _drawing(guide: Guide, number: int, seed: int) -> Iterator[None]:
    guide.turn = number
    try:
        with torch.no_grad(), poutine.block(), isolated(spawn(seed, number)):
            yield
    except ValueError as error:  # of a distribution, which looks at its arguments
        if bad := not_finite(guide.state_dict()):
            raise NonFiniteError(
                "there is no draw, and so no probability of any row: NaN or infinity in the posterior's weights at "
                f"{', '.join(bad[:8])}; fit it again"
            ) from error
        raise
    finally:
        guide.turn = None


def values_of(trace: poutine.Trace) -> dict[str, Tensor]:
    """The value of every sample statement of a trace, auxiliary sites too."""
    return {name: site["value"] for name, site in statements(trace).items()}


def statements(trace: poutine.Trace) -> dict[str, Any]:
    """The sample statements of a trace by name, subsampling of plates left out."""
    nodes: Any = trace.nodes
    return {n: x for n, x in nodes.items() if x["type"] == "sample" and not site_is_subsample(x)}
