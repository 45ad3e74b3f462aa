from __future__ import annotations

import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

from pyrolora.distributions.centred import Centred

LOC = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.1]])
SCALE = torch.tensor([[0.1, 1.0, 2.0], [0.3, 0.5, 0.7]])


def test_the_reparametrised_draw_is_the_mean():
    """Law: rsample returns loc for every sample shape, and its gradient goes to loc alone."""
    loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
    fn = Centred(loc, scale)
    assert torch.equal(fn.rsample(), LOC) and torch.equal(fn.rsample(torch.Size([4])), LOC.expand(4, 2, 3))
    fn.rsample(torch.Size([4])).sum().backward()
    assert torch.equal(loc.grad, torch.full_like(LOC, 4.0)) and scale.grad is None


def test_the_density_is_that_of_the_normal():
    """Law: log_prob, mean, variance and entropy are those of N(loc, scale²)."""
    fn, normal, value = Centred(LOC, SCALE), dist.Normal(LOC, SCALE), LOC + 0.3
    assert torch.equal(fn.log_prob(value), normal.log_prob(value))
    assert torch.equal(fn.mean, normal.mean) and torch.equal(fn.variance, normal.variance)
    assert torch.equal(fn.entropy(), normal.entropy())


def test_divergence_is_that_of_the_normal_with_its_gradient():
    """Law: KL(Centred ‖ Normal) and its gradients equal KL(Normal ‖ Normal)'s, elementwise and as matrix events."""
    prior = dist.Normal(0.0, 0.7).expand([2, 3])
    grads = []
    for family in (Centred, dist.Normal):
        loc, scale = LOC.clone().requires_grad_(), SCALE.clone().requires_grad_()
        divergence = kl_divergence(family(loc, scale).to_event(1), prior.to_event(1))
        torch.testing.assert_close(divergence, kl_divergence(dist.Normal(LOC, SCALE), prior).sum(-1))
        divergence.sum().backward()
        grads.append((loc.grad, scale.grad))
    torch.testing.assert_close(grads[0], grads[1])


def test_expand_stays_centred():
    """Law: expand keeps the family, so a plate over layers draws the mean as well."""
    wide = Centred(LOC, SCALE).to_event(2).expand([5])
    assert isinstance(wide.base_dist, Centred) and wide.batch_shape == (5,)
    assert torch.equal(wide.rsample(), LOC.expand(5, 2, 3))
