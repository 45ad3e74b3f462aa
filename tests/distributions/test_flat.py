from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, kl_divergence

from pyrolora.distributions.flat import Flat

START = torch.arange(24.0).reshape(4, 2, 3)


def test_log_density_is_zero_for_each_batch_member():
    """Law: log p(x) = 0, one number for each batch member, broadcast as torch broadcasts."""
    fn = Flat(START, event_dim=2)
    assert fn.batch_shape == (4,) and fn.event_shape == (2, 3)
    for shape in ((4, 2, 3), (2, 3), (5, 4, 2, 3)):
        log_prob = fn.log_prob(torch.full(shape, 1e30))
        assert log_prob.shape == ((5, 4) if len(shape) == 4 else (4,)) and not bool(log_prob.any())


@pytest.mark.parametrize("event_dim", [0, 1, 2, 3])
def test_draws_are_the_start(event_dim):
    """Law: sample and rsample return the starting value, for every sample shape and split into batch and event."""
    fn = Flat(START, event_dim=event_dim)
    assert torch.equal(fn(), START) and torch.equal(fn.sample(), START)
    assert torch.equal(fn.rsample(torch.Size([2])), torch.stack([START, START]))


def test_expand_keeps_start_and_event():
    """Law: expand repeats the start over new batch dimensions and leaves the event alone."""
    wide = Flat(START[0], event_dim=2).expand([5])
    assert wide.batch_shape == (5,) and wide.event_shape == (2, 3)
    assert torch.equal(wide.sample(), START[0].expand(5, 2, 3)) and wide.log_prob(wide.sample()).shape == (5,)


def test_support_has_the_events_dimensions():
    """Law: the support is real arrays of the event's dimension, so that guides map it to itself."""
    fn = Flat(START, event_dim=2)
    assert fn.support.event_dim == 2 and bool(fn.support.check(START).all())
    assert torch.equal(biject_to(fn.support)(START), START)
    assert fn.support.check(START).shape == (4,)


def test_divergence_of_a_point_is_zero():
    """Law: KL(Delta ‖ Flat) = −log p = 0 for each layer, so a point estimate under it is maximum likelihood."""
    divergence = kl_divergence(dist.Delta(START, event_dim=2), Flat(torch.zeros(4, 2, 3), event_dim=2))
    assert torch.equal(divergence, torch.zeros(4))


def test_a_flat_site_can_be_traced():
    """Law: a Pyro model with a flat site in a plate traces, with log probability 0."""

    def model():
        with pyro.plate("layers", 4):
            pyro.sample("w", Flat(START, event_dim=2))

    trace = pyro.poutine.trace(model).get_trace()
    assert torch.equal(trace.nodes["w"]["value"], START) and trace.log_prob_sum() == 0
