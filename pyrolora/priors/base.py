"""What a prior is: a callable from a site group to a Pyro distribution."""

from __future__ import annotations

import math
from collections.abc import Callable

from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyrolora.adapters.sites import SiteGroup

Prior = Callable[[SiteGroup], TorchDistributionMixin]
"""``prior(site)`` returns a distribution with ``event_shape == site.event_shape`` and batch shape ``()`` or
``(site.num_layers,)``. It may call ``pyro.sample`` for hyper-parameters of its own; their names begin with
``f"{site.name}."``, by which guides know whose they are. It is called outside every plate, so a hyper-parameter per
layer is a vector event: ``dist.LogNormal(0, 1).expand([site.num_layers]).to_event(1)``."""


class PriorError(ValueError):
    """A prior that is missing or does not fit its site; the message names the site."""


def positive(prior: str, **arguments: float) -> None:
    """Refuses constructor arguments that are not positive finite numbers; the error names prior and argument."""
    for name, value in arguments.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise PriorError(f"{prior}: {name} is a positive number, not {value!r}")


def checked(prior: Prior, site: SiteGroup) -> TorchDistributionMixin:
    """Calls a prior and checks the shape of what it returns.

    Returns:
        The distribution with batch shape ``(layers,)``.

    Raises:
        PriorError: Not a distribution, or of another shape than the site.
    """
    fn = prior(site)
    if not isinstance(fn, TorchDistributionMixin):
        raise PriorError(f"site {site.name!r}: its prior returned {type(fn).__name__}, not a Pyro distribution")
    if fn.event_shape != site.event_shape or fn.batch_shape not in ((), (site.num_layers,)):
        raise PriorError(
            f"site {site.name!r}: its prior has batch shape {tuple(fn.batch_shape)} and event shape "
            f"{tuple(fn.event_shape)}; it needs event shape {tuple(site.event_shape)} and batch shape () or "
            f"({site.num_layers},). Use .expand(site.shape).to_event({site.event_dim})."
        )
    return fn.expand([site.num_layers])
