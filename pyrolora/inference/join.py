"""Posteriors that were fitted apart, put together as one ensemble."""

from __future__ import annotations

from collections.abc import Sequence

from pyrolora.guides.ensemble import Ensemble
from pyrolora.inference import archive
from pyrolora.inference.posterior import Posterior


def join(posteriors: Sequence[Posterior]) -> Posterior:
    """The uniform mixture ``(1/M) Σ_m q_m(θ)`` of posteriors of one program, as a posterior of its own.

    How an ensemble is fitted by several processes or machines: each fits its member, by any guide, with a seed of its
    own. The posteriors that are given stay as they are.

    Args:
        posteriors: Of the same sites on the same base model, at the same temperature β.

    Raises:
        ValueError: Nothing to join, or posteriors of different models.
    """
    if not posteriors:
        raise ValueError("there is nothing to join: give the posteriors that are to be the members")
    first = posteriors[0]
    for i, other in enumerate(posteriors[1:], start=1):
        for what, of_first, own in (
            ("sites", _sites(first), _sites(other)),
            ("base weights", first.program.fingerprint, other.program.fingerprint),
            ("priors", archive.describe(first.program.declared), archive.describe(other.program.declared)),
            ("temperature β", first.temperature, other.temperature),
        ):
            if of_first != own:
                raise ValueError(f"member {i} has other {what} than member 0: {own} in place of {of_first}")
    where = "a member of the ensemble"
    ensemble = Ensemble([archive.rebuild(archive.describe(each.guide), where=where) for each in posteriors])
    ensemble.bind(first.program)
    for part, posterior in zip(ensemble.parts(), posteriors, strict=True):
        part.load_state_dict(posterior.guide.state_dict())
    ensemble.to(first.program.device).eval()
    joined = Posterior(first.program, ensemble, temperature=first.temperature, seed=first.seed)
    joined.history = [{"member": i, **row} for i, each in enumerate(posteriors) for row in each.history]
    return joined


def _sites(posterior: Posterior) -> dict[str, list[int]]:
    return {name: list(site.shape) for name, site in posterior.program.sites.items()}
