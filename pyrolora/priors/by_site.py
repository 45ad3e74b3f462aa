"""Which prior goes to which site: patterns, the first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import combinations

from pyrolora.priors.base import Prior, PriorError


def by_site(priors: Mapping[str, Prior], sites: Iterable[str]) -> dict[str, Prior]:
    """Gives each site the prior of the first pattern that matches its name.

    Args:
        priors: Shell-style patterns (``"*.A"``, ``"lora.q_proj.*"``, ``"head.*"``) to priors, in order.
        sites: Site names.

    Returns:
        Site name to prior.

    Raises:
        PriorError: A site that no pattern matches, a pattern that matches no site, or one that can never be chosen
            because a wider pattern stands before it.
    """
    names = list(sites)
    matched = {pattern: {name for name in names if fnmatchcase(name, pattern)} for pattern in priors}
    orphans = [name for name in names if not any(name in found for found in matched.values())]
    if orphans:
        raise PriorError(
            f"no prior for site(s) {', '.join(orphans)}. Patterns, in order: {', '.join(priors) or 'none'}. "
            'Add one, for instance {"head.*": priors.Normal(1.0)}, or "*": priors.Flat() for a plain point estimate.'
        )
    if idle := [pattern for pattern, found in matched.items() if not found]:
        raise PriorError(f"prior pattern(s) {', '.join(idle)} match no site. Sites: {', '.join(names)}.")
    for (wide, first), (narrow, second) in combinations(matched.items(), 2):
        if second < first:
            raise PriorError(
                f"prior pattern {narrow!r} is never used: {wide!r} matches its sites first. Put it before."
            )
    return {name: next(priors[pattern] for pattern, found in matched.items() if name in found) for name in names}
