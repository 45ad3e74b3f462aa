"""The table of sites: what it names, and that names of a user's code stay names."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist

from pyrolora.adapters.sites import SiteGroup
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from tests.programs import tiny_program
from tests.test_program import ADAPTERS, HEAD


def strange(site: SiteGroup) -> dist.TorchDistribution:
    return dist.Normal(0.0, 0.5).expand(site.shape).to_event(site.event_dim)


def test_sites_print_as_a_table() -> None:
    """Law: the table names each site, its shape with dimensions, its size, its prior and its first module."""
    program = tiny_program({"*.A": strange, "*.B": Normal(0.1), "head.*": Hierarchical(1.0, spread=0.5)})
    table = {row[0]: row[1:] for row in program.sites.table()}
    assert list(table) == ADAPTERS + HEAD
    first = "bert.encoder.layer.0.attention.self.query"
    assert table["lora.query.A"] == ("layer 2 × rank 2 × in_feature 16", "64", "strange", first)
    assert table["lora.query.B"][2] == "Normal(scale=0.1)"
    assert table["head.classifier.bias"] == (
        "head 1 × feature 2",
        "2",
        "Hierarchical(scale=1.0, spread=0.5)",
        "classifier",
    )
    lines = repr(program.sites).splitlines()
    assert len(lines) == 1 + len(table)
    assert [line.split()[0] for line in lines] == ["site", *table]
    assert len({line.index(word) for line, word in zip(lines[1:3], ("strange", "Normal"), strict=True)}) == 1


def test_html_is_escaped() -> None:
    """Law: names from a user's code cannot become markup in a notebook."""
    prior: Callable = lambda site: strange(site)  # noqa: E731 - its name, <lambda>, is the point
    shown = tiny_program({"*": prior}).sites._repr_html_()
    assert "&lt;lambda&gt;" in shown and "<lambda>" not in shown
    assert shown.startswith("<pre>") and shown.endswith("</pre>")
