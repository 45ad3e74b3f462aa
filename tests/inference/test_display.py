"""How a posterior shows itself in a notebook."""

from __future__ import annotations

from pyrolora.guides.inducing import Inducing
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.display import table
from pyrolora.inference.posterior import Posterior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from tests.programs import tiny_program


def test_every_site_has_a_row() -> None:
    """Law: each site once with its prior and what the posterior is there; hyper-parameters have rows of their own."""
    program = tiny_program({"*.A": Hierarchical(0.1), "*.B": Flat(), "head.*": Normal(1.0)})
    guide = MeanField()
    guide.bind(program)
    page = Posterior(program, guide)._repr_html_()
    rows = page.split("<tr>")[2:]
    assert len(rows) == len(program.latents) == 8
    assert [row for row in rows if "<td>lora.query.B</td>" in row and "Flat()" in row and "point estimate" in row]
    assert [row for row in rows if "<td>lora.query.A.scale</td>" in row and "MeanField" in row]
    assert page.startswith("<p>Posterior(MeanField, β=1")


def test_the_guides_own_numbers_and_the_last_objective() -> None:
    """Law: what the guide describes stands in its row, and the last logged objective below."""
    program, guide = tiny_program(), Inducing()
    guide.bind(program)
    history = [{"elbo": -1.0, "data": -0.5, "kl": 0.25, "log_prior": -0.25}, {"train_loss": 3.0}]
    page = table("t<itle", program, guide, history)
    assert "t&lt;itle" in page and page.count("sigma_V 0.1") == 2
    assert "elbo -1, data -0.5, kl 0.25, log_prior -0.25" in page
    point = MAP()
    point.bind(program)
    assert table("x", program, point, []).count("point estimate") == 6
