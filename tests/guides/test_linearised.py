"""Averages of a softmax over a Gaussian: against ordinary Monte Carlo and known limits."""

from __future__ import annotations

import logging

import pytest
import torch
from pyro.distributions import Normal

from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.guides.linearised import (
    bridge,
    covariance_of,
    gaussian_points,
    jacobians,
    negative_log_likelihoods,
    probit,
    say_whether_noise_drowns,
    slices,
)
from pyrolora.guides.map import MAP
from pyrolora.inference.randomness import isolated
from tests.programs import tiny_program


def gaussians(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    with isolated(0):
        mean, root = torch.randn(5, classes), torch.randn(5, classes, classes)
    return mean, root @ root.mT / classes


@pytest.mark.parametrize("classes", [2, 4])
def test_points_average_as_draws_do(classes: int) -> None:
    """Law: the mean of softmax, and mean and covariance themselves, are those of many ordinary draws."""
    mean, covariance = gaussians(classes)
    points = gaussian_points(mean, covariance, 1024, seed=3)
    with isolated(1):
        draws = torch.distributions.MultivariateNormal(mean, covariance + 1e-6 * torch.eye(classes)).sample((100_000,))
    assert torch.allclose(points.softmax(-1).mean(0), draws.softmax(-1).mean(0), atol=0.005)
    assert torch.allclose(points.mean(0), mean, atol=0.02)
    centred = points - points.mean(0)
    assert torch.allclose(torch.einsum("sni,snj->nij", centred, centred) / 1024, covariance, atol=0.1)


@pytest.mark.parametrize(("classes", "error"), [(2, 0.01), (4, 0.08)])
def test_probit_is_near(classes: int, error: float) -> None:
    """Law: probit approximates the mean of softmax; without covariance it is softmax itself for two classes."""
    mean, covariance = gaussians(classes)
    expected = gaussian_points(mean, covariance, 4096).softmax(-1).mean(0)
    assert (probit(mean, covariance).softmax(-1) - expected).abs().max() < error
    assert torch.allclose(probit(mean, 0 * covariance).softmax(-1), mean.softmax(-1), atol=1e-5)


def test_bridge_for_two_classes_is_the_point_estimate() -> None:
    """Law: the Laplace bridge's mean does not see the covariance for K = 2, and flattens for K > 2."""
    mean = torch.tensor([[1.0, -0.5]])
    assert torch.allclose(bridge(mean, 2 * torch.eye(2).unsqueeze(0)).softmax(-1), mean.softmax(-1))
    mean = torch.tensor([[3.0, 0.0, -1.0]])
    wide = bridge(mean, 4 * torch.eye(3).unsqueeze(0)).softmax(-1)
    assert wide.max() < mean.softmax(-1).max() and wide.argmax() == 0


def test_jacobians_are_autograds() -> None:
    """Law: ∂f_nc/∂W of each example and class is what autograd gives, left or right of padding."""
    program = tiny_program()
    guide = MAP()
    guide.bind(program)
    values = {name: guide.point(latent) + 0.05 for name, latent in guide.latents.items()}
    sites = [site for site in program.sites.values() if site.event_dim == 2]
    assert program.task is not None and program.task.test is not None
    batch = program.task.collate([program.task.test[i] for i in range(4)])
    ((rows, mean, found),) = list(jacobians(program, values, sites, batch))
    program.model.eval()
    logits = program.logits(values, batch)
    assert rows == slice(0, 4) and torch.allclose(mean, logits, atol=1e-5)
    assert len(list(slices(program, values, sites, batch))) == 2
    for n, c in ((0, 1), (3, 0)):
        for site in sites:
            (expected,) = torch.autograd.grad(logits[n, c], values[site.name], retain_graph=True)
            assert torch.allclose(found[site.name][:, n, c], expected, atol=1e-5)


def test_covariance_adds_over_sites_and_layers() -> None:
    """Law: independent matrices add their J Σ Jᵀ."""

    class Isotropic(Normal):
        def covariance_of(self, jacobian: torch.Tensor) -> torch.Tensor:
            flat = jacobian.flatten(-2)
            return self.scale**2 * flat @ flat.mT

    with isolated(0):
        own = {"a": torch.randn(2, 3, 2, 4, 5), "b": torch.randn(1, 3, 2, 5, 2)}
    found = covariance_of({"a": Isotropic(0.0, 2.0), "b": Isotropic(0.0, 3.0)}, own)
    expected = torch.zeros(3, 2, 2)
    for name, scale in (("a", 2.0), ("b", 3.0)):
        for layer in own[name]:
            expected += scale**2 * torch.einsum("nkij,nlij->nkl", layer, layer)
    assert torch.allclose(found, expected, rtol=1e-4)


def test_mixtures_are_averaged_in_probability() -> None:
    """Law: the NLL of a candidate is −log of the mean over points of p(y|f), point by point, under its covariance."""
    program = tiny_program()
    guide = MAP()
    guide.bind(program)
    values = {name: guide.point(latent) + 0.05 for name, latent in guide.latents.items()}
    sites = [program.sites["lora.query.B"]]
    assert program.task is not None and program.task.test is not None
    data = [program.task.collate([program.task.test[i] for i in rows]) for rows in ((0, 1, 2), (3, 4))]
    name = "lora.query.B"
    law = DiagonalPrecisionNormal(values[name].detach(), torch.zeros(sites[0].shape), precision=1.0)
    tried = [{name: torch.tensor(p)} for p in (1e-2, 1.0)]
    found = negative_log_likelihoods(
        program, values, sites, data, {name: law}, tried, lambda m, c: gaussian_points(m, c, 64)
    )
    for i, candidate in enumerate(tried):
        total = 0.0
        for batch in data:
            ((_, mean, jacobian),) = list(jacobians(program, values, sites, batch))
            own = {name: law.with_precision(candidate[name])}
            points = gaussian_points(mean, covariance_of(own, jacobian), 64)
            for n, label in enumerate(batch["labels"]):
                total -= float(points[:, n].softmax(-1)[:, label].mean().log()) / 5
        assert float(found[i]) == pytest.approx(total, rel=1e-4)


def test_noise_that_drowns_the_logits_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Law: a covariance that moves the class of many examples is warned of; one that flattens them is not."""
    mean = torch.tensor([[2.0, 1.0, -1.0]]).expand(8, 3)
    with caplog.at_level(logging.WARNING, "pyrolora"):
        say_whether_noise_drowns(mean, 4 * torch.eye(3).expand(8, 3, 3))
        assert not caplog.text
        # Noise along one class's logit alone makes that class the likeliest on average.
        say_whether_noise_drowns(mean, torch.diag(torch.tensor([0.0, 0.0, 400.0])).expand(8, 3, 3))
    assert "changes the predicted class of 100 % of 8 training examples" in caplog.text
