"""The sites of a program with their priors, as a table."""

from __future__ import annotations

import html
from collections.abc import Mapping
from types import FunctionType

from pyrolora.adapters.sites import SiteGroup
from pyrolora.priors.base import Prior


class Sites(dict[str, SiteGroup]):
    """Site name to `SiteGroup`; prints as a table with the priors."""

    def __init__(self, sites: Mapping[str, SiteGroup], priors: Mapping[str, Prior]):
        super().__init__(sites)
        self.priors = dict(priors)

    def table(self) -> list[tuple[str, str, str, str, str]]:
        """Rows of name, shape, number of parameters, prior and first adapted module."""
        return [
            (
                name,
                " × ".join(f"{d} {n}" for d, n in zip(s.dims, s.shape, strict=True)),
                f"{s.shape.numel():,}",
                _shown(self.priors[name]),
                s.layers[0],
            )
            for name, s in self.items()
        ]

    def __repr__(self) -> str:
        rows = [("site", "shape", "parameters", "prior", "first module"), *self.table()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def _shown(prior: Prior) -> str:
    """A prior as one would write it: ``Normal(scale=0.1)``, or the name of a function."""
    if isinstance(prior, FunctionType):
        return prior.__name__
    return f"{type(prior).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(prior).items())})"
