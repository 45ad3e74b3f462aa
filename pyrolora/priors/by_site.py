"""Which prior goes to which site: patterns, the first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from pyrolora.priors.base import Prior, PriorError


def by_site(priors: Mapping[str, Prior], sites: Iterable[str]) -> dict[str, Prior]:
    """Gives each site the prior of the first pattern that matches its name.

    Args:
        priors: Shell-style patterns (``"*.A"``, ``"lora.q_proj.*"``, ``"head.*"``) to priors, in order.
        sites: Site names.

    Returns:
        Site name to prior.

    Raises:
        PriorError: A site that no pattern matches, or a pattern that matches no site; both lists are shown.
    """
    names = list(sites)
    chosen = {name: next((pattern for pattern in priors if fnmatchcase(name, pattern)), None) for name in names}
    orphans = [name for name, pattern in chosen.items() if pattern is None]
    if orphans:
        raise PriorError(
            f"no prior for site(s) {', '.join(orphans)}. Patterns, in order: {', '.join(priors) or 'none'}. "
            'Add one, for instance {"head.*": priors.Normal(1.0)}, or "*": priors.Flat() for a plain point estimate.'
        )
    idle = [pattern for pattern in priors if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise PriorError(f"prior pattern(s) {', '.join(idle)} match no site. Sites: {', '.join(names)}.")
    return {name: priors[pattern] for name, pattern in chosen.items() if pattern is not None}
