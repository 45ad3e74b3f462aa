from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyrolora.distributions.matrix_normal import MatrixNormal
from pyrolora.priors.base import PriorError, checked, positive


def scale_per_layer(site):
    """A prior as a user writes it: any function from a site to a distribution, with hyper-sites of its own."""
    hyper = dist.HalfNormal(0.1).expand([site.num_layers]).to_event(1)
    scale = pyro.sample(f"{site.name}.width", hyper)
    return dist.Laplace(0.0, scale[:, None, None]).expand(site.shape).to_event(2)


def test_batch_becomes_layers(group):
    """Law: whether a prior gives one distribution or one for each layer, the program gets batch shape (layers,)."""
    site = group("A", 3, 2, 5)
    for fn in (
        dist.Normal(0.0, 2.0).expand(site.event_shape).to_event(2),
        dist.Normal(0.0, 2.0).expand(site.shape).to_event(2),
        MatrixNormal(torch.zeros(2, 5), 2 * torch.eye(2)),
    ):
        out = checked(lambda site, fn=fn: fn, site)
        assert out.batch_shape == (3,) and out.event_shape == (2, 5)
        expected = dist.Normal(0.0, 2.0).log_prob(torch.ones(2, 5)).sum().expand(3)
        torch.testing.assert_close(out.log_prob(torch.ones(3, 2, 5)), expected)


@pytest.mark.parametrize("shape", [(2, 5), (1, 5, 2), (4, 2, 5), (1, 2, 5)])
def test_other_shapes_are_refused(group, shape):
    """Law: an event of another shape, or a batch that is not the layers, is an error that says shape and fix."""
    site = group("A", 3, 2, 5)
    fn = dist.Normal(0.0, 1.0).expand(shape).to_event(min(2, len(shape) - 1))
    with pytest.raises(
        PriorError, match=r"'lora\.query\.A'.*event shape \(2, 5\).*expand\(site\.shape\)\.to_event\(2\)"
    ):
        checked(lambda site: fn, site)


@pytest.mark.parametrize("returned", [0.1, None, torch.zeros(3, 2, 5), torch.distributions.Normal(0.0, 1.0)])
def test_what_is_not_a_pyro_distribution_is_refused(group, returned):
    """Law: a prior that returns something else (a number, torch's own distribution) names its site and the type."""
    with pytest.raises(PriorError, match=rf"'lora\.query\.A'.*{type(returned).__name__}, not a Pyro distribution"):
        checked(lambda site: returned, group("A", 3, 2, 5))


def test_a_users_function_is_a_prior(group):
    """Law: a plain function with a hyper-site is a prior: the joint density is hyper-prior times conditional."""
    site = group("A", 3, 2, 5)

    def model():
        fn = checked(scale_per_layer, site)
        with pyro.plate("layers", 3):
            pyro.sample(site.name, fn)

    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(model).get_trace()
    width, value = trace.nodes["lora.query.A.width"]["value"], trace.nodes[site.name]["value"]
    by_hand = dist.HalfNormal(0.1).log_prob(width).sum() + dist.Laplace(0.0, width[:, None, None]).log_prob(value).sum()
    torch.testing.assert_close(trace.log_prob_sum(), by_hand)


@pytest.mark.parametrize("value", [0.0, -1, float("nan"), float("inf"), "1", None])
def test_positive_names_prior_and_argument(value):
    """Law: an argument that is not a positive finite number is an error that names the prior and the argument."""
    with pytest.raises(PriorError, match=r"MyPrior: width is a positive number, not "):
        positive("MyPrior", scale=1, width=value)
