from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro import poutine

from pyrolora.priors.base import PriorError, checked
from pyrolora.priors.hierarchical import ARD, Hierarchical, Horseshoe

TAU, SLAB = 0.02, 0.04


def run(prior, site, seed: int = 0) -> poutine.Trace:
    def model():
        fn = checked(prior, site)
        with pyro.plate("layers", site.num_layers):
            pyro.sample(site.name, fn)

    pyro.set_rng_seed(seed)
    return poutine.trace(model).get_trace()


def hyper(trace: poutine.Trace, name: str) -> np.ndarray:
    return trace.nodes[name]["value"].double().numpy()


def scale_given(prior, site, **values) -> torch.Tensor:
    """The standard deviations of a site's elements for given hyper-parameters."""
    data = {f"{site.name}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return poutine.condition(prior, data=data)(site).base_dist.scale


def free_horseshoe(local: float, site, *, tau: float = TAU, slab: float = SLAB) -> float:
    shape = (site.num_layers, site.shape[site.dims.index("rank")])
    scales = scale_given(Horseshoe(), site, tau=tau, slab=slab**2, local=torch.full(shape, local))
    assert bool((scales == scales.flatten()[0]).all())
    return float(scales.flatten()[0])


@pytest.mark.parametrize("shape", [("A", 3, 2, 5), ("B", 3, 5, 2), ("head", 1, 4, 6), ("head", 1, 4)])
def test_hierarchical_density_by_hand(group, shape):
    """Law: log p(θ, s) = Σ_l log LogNormal(s_l) + Σ_l,i,j log N(θ_lij; 0, s_l²), for matrices and biases."""
    site = group(*shape)
    trace = run(Hierarchical(0.05, spread=0.7), site)
    scale, value = hyper(trace, f"{site.name}.scale"), hyper(trace, site.name)
    assert scale.shape == (site.num_layers,)
    by_hand = scipy.stats.lognorm.logpdf(scale, s=0.7, scale=0.05).sum()
    by_hand += scipy.stats.norm.logpdf(value, scale=scale.reshape(-1, *[1] * site.event_dim)).sum()
    assert trace.log_prob_sum().item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("shape", [("A", 3, 2, 5), ("B", 3, 5, 2)])
def test_ard_density_by_hand(group, shape):
    """Law: log p(θ, s) = Σ_lk log LogNormal(s_lk) + Σ log N(θ; 0, s_lk²), s_lk over A's row k or B's column k."""
    site = group(*shape)
    trace = run(ARD(0.05, spread=0.7), site)
    scale, value = hyper(trace, f"{site.name}.scale"), hyper(trace, site.name)
    assert scale.shape == (3, 2)
    by_hand = scipy.stats.lognorm.logpdf(scale, s=0.7, scale=0.05).sum()
    for layer in range(3):
        for rank in range(2):
            elements = value[layer, rank, :] if site.role == "A" else value[layer, :, rank]
            by_hand += scipy.stats.norm.logpdf(elements, scale=scale[layer, rank]).sum()
    assert trace.log_prob_sum().item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("shape", [("A", 3, 2, 5), ("B", 3, 5, 2)])
def test_horseshoe_density_by_hand(group, shape):
    """Law: the joint density is half-Cauchy(τ) half-Cauchy(λ) InvGamma(c²) N(θ; 0, τ²λ̃²), λ̃² = c²λ²/(c² + τ²λ²)."""
    site = group(*shape)
    trace = run(Horseshoe(0.01, slab_scale=0.2, slab_df=4.0), site)
    tau, local, slab, value = (hyper(trace, f"{site.name}{x}") for x in (".tau", ".local", ".slab", ""))
    assert tau.shape == slab.shape == () and local.shape == (3, 2)
    by_hand = scipy.stats.halfcauchy.logpdf(tau, scale=0.01) + scipy.stats.halfcauchy.logpdf(local).sum()
    by_hand += scipy.stats.invgamma.logpdf(slab, 2.0, scale=2.0 * 0.2**2)
    scale = np.sqrt(tau**2 * slab * local**2 / (slab + tau**2 * local**2))
    scale = scale[:, :, None] if site.role == "A" else scale[:, None, :]
    by_hand += scipy.stats.norm.logpdf(value, scale=scale).sum()
    assert trace.log_prob_sum().item() == pytest.approx(by_hand, rel=1e-5)


def marginal_cdf(x: np.ndarray, density, upper: float) -> np.ndarray:
    """``P(θ < x) = ∫ Φ(x/s) p(s) ds`` by quadrature over log s."""
    log_scale = np.linspace(math.log(1e-8), math.log(upper), 2001)
    weight = density(np.exp(log_scale)) * np.exp(log_scale)
    return scipy.integrate.simpson(scipy.stats.norm.cdf(x[:, None] / np.exp(log_scale)) * weight, x=log_scale, axis=1)


@pytest.mark.parametrize("prior", [Hierarchical(0.05, spread=0.7), ARD(0.05, spread=0.7)])
def test_marginal_of_a_weight(group, prior):
    """Law: with the scale integrated out, a weight is the scale mixture's: Kolmogorov–Smirnov on 2000 layers."""
    trace = run(prior, group("A", 2000, 1, 1))
    draws = hyper(trace, "lora.query.A").flatten()

    def cdf(x):
        return marginal_cdf(x, lambda s: scipy.stats.lognorm.pdf(s, s=0.7, scale=0.05), upper=10.0)

    assert scipy.stats.kstest(draws, cdf).pvalue > 0.01


def test_marginal_of_a_weight_under_the_horseshoe(group):
    """Law: given τ and c, a weight is the mixture over λ ~ half-Cauchy(1): Kolmogorov–Smirnov on 2000 layers."""
    data = {"lora.query.A.tau": torch.tensor(TAU), "lora.query.A.slab": torch.tensor(SLAB**2)}
    trace = run(poutine.condition(Horseshoe(), data=data), group("A", 2000, 1, 1))
    draws = hyper(trace, "lora.query.A").flatten()

    def cdf(x):
        angle = (np.arange(2000) + 0.5) / 2000 * (math.pi / 2)  # λ = tan(angle) is half-Cauchy for uniform angle
        free = TAU * np.tan(angle)
        scale = SLAB * free / np.sqrt(SLAB**2 + free**2)
        return np.array([scipy.stats.norm.cdf(v / scale).mean() for v in x])

    assert scipy.stats.kstest(draws, cdf).pvalue > 0.01


def test_ard_scale_multiplies_its_own_rank(group):
    """Law: scale k stands on row k of A and on column k of B, in every layer its own."""
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    for_a = scale_given(ARD(), group("A", 3, 2, 5), scale=scales)
    for_b = scale_given(ARD(), group("B", 3, 5, 2), scale=scales)
    assert torch.equal(for_a, scales[:, :, None].expand(3, 2, 5))
    assert torch.equal(for_b, scales[:, None, :].expand(3, 5, 2))


def test_a_square_matrix_is_not_confused(group):
    """Law: where rank equals the number of features, the scale still stands on the rank, not on whichever axis fits."""
    scales = torch.tensor([[1.0, 2.0]])
    assert torch.equal(scale_given(ARD(), group("A", 1, 2, 2), scale=scales)[0], scales.T.expand(2, 2))
    assert torch.equal(scale_given(ARD(), group("B", 1, 2, 2), scale=scales)[0], scales.expand(2, 2))


def test_horseshoe_limits(group):
    """Law: the regularised scale is τλ where τλ ≪ c, c where τλ ≫ c, and c/√2 where they are equal."""
    site = group("A", 3, 2, 5)
    assert free_horseshoe(1e-3, site) == pytest.approx(TAU * 1e-3, rel=1e-5)
    assert free_horseshoe(1e6, site) == pytest.approx(SLAB, rel=1e-5)
    assert free_horseshoe(SLAB / TAU, site) == pytest.approx(SLAB / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("local", [1e-25, 1e25])
def test_horseshoe_tails_stay_finite(group, local):
    """Law: half-Cauchy draws whose square is no float32 number give the limits, not NaN, with finite gradients."""
    site = group("A", 1, 1, 5)
    value = torch.full((1, 1), local, requires_grad=True)
    scales = scale_given(Horseshoe(), site, tau=TAU, slab=SLAB**2, local=value)
    expected = min(TAU * local, SLAB)
    torch.testing.assert_close(scales.detach(), torch.full((1, 1, 5), expected), rtol=1e-5, atol=0)
    scales.sum().backward()
    assert bool(value.grad.isfinite().all())


@pytest.mark.parametrize("prior", [ARD(), Horseshoe()])
@pytest.mark.parametrize("shape", [("head", 1, 4, 6), ("head", 1, 4)])
def test_a_site_without_ranks_is_refused(group, prior, shape):
    """Law: a head has no ranks to prune; the error names it and the priors that serve."""
    with pytest.raises(PriorError, match=r"'head\.classifier\.weight' has no rank dimension: declare priors\.Normal"):
        prior(group(*shape))


@pytest.mark.parametrize(
    ("prior", "argument"),
    [
        (Hierarchical, "scale"),
        (Hierarchical, "spread"),
        (ARD, "scale"),
        (ARD, "spread"),
        (Horseshoe, "scale"),
        (Horseshoe, "slab_scale"),
        (Horseshoe, "slab_df"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), "wide"])
def test_arguments_are_positive_numbers(prior, argument, value):
    """Law: each argument is a positive finite number; the error names prior and argument."""
    with pytest.raises(PriorError, match=rf"{prior.__name__}: {argument} is a positive number"):
        prior(**{argument: value})
