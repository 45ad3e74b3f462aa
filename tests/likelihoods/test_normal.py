from __future__ import annotations

import math
from types import SimpleNamespace

import pyro
import pytest
import torch

from pyrolora.likelihoods.normal import Normal

MEAN = torch.tensor([0.3, -1.2, 2.0])
BATCH = {"labels": torch.tensor([0.0, -1.0, 5.0])}
SCALE = {"likelihood.scale": torch.tensor(0.7)}


def by_hand(mean: float, label: float, scale: float) -> float:
    return -0.5 * ((label - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize(("likelihood", "parameters"), [(Normal(), SCALE), (Normal(0.7), {})])
def test_log_prob_is_the_gaussian_density(likelihood, parameters):
    """Law: log p(y | f) = −½((y−f)/s)² − log s − ½ log 2π, with s learnt or fixed."""
    out = likelihood.log_prob(MEAN, parameters, BATCH)
    expected = [by_hand(m, y, 0.7) for m, y in zip(MEAN.tolist(), BATCH["labels"].tolist(), strict=True)]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_scale_is_a_site_with_the_stated_prior():
    """Law: the trace has likelihood.scale with a LogNormal(loc, scale) density; a fixed scale leaves no site."""
    trace = pyro.poutine.trace(Normal(prior_loc=-1.0, prior_scale=0.5).sample_parameters).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["likelihood.scale"]
    value = site["value"].item()
    assert value > 0
    expected = by_hand(-1.0, math.log(value), 0.5) - math.log(value)
    assert site["log_prob"].item() == pytest.approx(expected, abs=1e-5)
    fixed = pyro.poutine.trace(Normal(0.7).sample_parameters).get_trace()
    assert "likelihood.scale" not in fixed.nodes


def test_several_outputs_are_summed():
    """Law: with D outputs the batch shape is (b,) and log p is the sum over outputs."""
    mean, labels = torch.zeros(2, 3), torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    likelihood = Normal(2.0)
    assert likelihood.logits(SimpleNamespace(logits=mean), {}).shape == (2, 3)
    assert likelihood.distribution(mean, {}, {}).batch_shape == (2,)
    out = likelihood.log_prob(mean, {}, {"labels": labels})
    expected = [sum(by_hand(0.0, y, 2.0) for y in row) for row in labels.tolist()]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_one_output_loses_its_axis():
    """Law: a head (b, 1) gives logits (b,), so that labels (b,) do not broadcast to (b, b)."""
    assert Normal().logits(SimpleNamespace(logits=MEAN[:, None].half()), {}).shape == (3,)
    assert Normal().logits(SimpleNamespace(logits=MEAN[:, None].half()), {}).dtype == torch.float32


def test_vmap_over_draws_is_the_loop():
    """Law: under vmap each draw of the mean meets its own draw of the noise scale."""
    means = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0])
    likelihood = Normal()

    def score(mean: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return likelihood.log_prob(mean, {"likelihood.scale": scale}, BATCH)

    expected = torch.stack([score(mean, scale) for mean, scale in zip(means, scales, strict=True)])
    torch.testing.assert_close(torch.vmap(score)(means, scales), expected)


def test_errors_say_what_to_do():
    """Law: a missing scale, a bad scale and a request for class probabilities each name the way out."""
    with pytest.raises(KeyError, match="sample_parameters"):
        Normal().log_prob(MEAN, {}, BATCH)
    with pytest.raises(ValueError, match="must be positive"):
        Normal(0.0)
    with pytest.raises(ValueError, match="prior_scale"):
        Normal(prior_scale=0.0)
    with pytest.raises(NotImplementedError, match="distribution"):
        Normal().probabilities(MEAN, SCALE, BATCH)
