"""The linearised predictive: ``f(x; θ) ≈ f*(x) + J(x)(θ − θ*)``, and averages of a softmax over a Gaussian."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup
from pyrolora.guides.curvature import Recorder
from pyrolora.guides.factors import weight_gradients
from pyrolora.program import Batch, PyroLoRA, evaluating

logger = logging.getLogger("pyrolora")

# Bytes that the Jacobian of one batch may take before the batch is halved.
JACOBIAN_BYTES = 2**30


def slices(
    program: PyroLoRA, values: Mapping[str, Tensor], sites: Sequence[SiteGroup], batch: Batch
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """One forward pass, then one backward pass to the watched modules' outputs for each natural parameter c.

    Works through any attention kernel: forward-mode derivatives, which few kernels have, are not needed.

    Args:
        program: The Pyro model.
        values: All its latent sites; those of ``sites`` with a gradient.
        sites: The sites to differentiate by.
        batch: A collated batch.

    Yields:
        For c = 1 … K the means ``f*``, ``(b, K)``, and ``∂f_c/∂W`` by site, ``(layers, b, out, in)``; b examples.

    Raises:
        ValueError: Natural parameters that are not a vector for each example.
    """
    recorder = Recorder(program, sites)
    with evaluating(program.model), recorder.watching(), torch.enable_grad():
        logits = recorder.run(values, batch)
        flat = logits.unsqueeze(-1) if logits.dim() == 1 else logits
        if flat.dim() != 2:
            raise ValueError(
                "the linearised predictive is over a vector of natural parameters for each example, not "
                f"{tuple(logits.shape)}: use Laplace(predictive='weights')"
            )
        unit = torch.eye(flat.shape[-1], dtype=flat.dtype, device=flat.device)
        whole = functools.partial(weight_gradients, size=len(flat))
        for c in range(flat.shape[-1]):
            gradients = recorder.gradients(flat, unit[c], whole, keep=c + 1 < flat.shape[-1])
            own = {site.name: torch.stack([gradients[path] for path, _ in site.holders]) for site in sites}
            yield flat.detach(), own


def jacobians(
    program: PyroLoRA, values: Mapping[str, Tensor], sites: Sequence[SiteGroup], batch: Batch
) -> Iterator[tuple[slice, Tensor, dict[str, Tensor]]]:
    """The Jacobian of a batch by site, ``(layers, b, K, out, in)``, in parts that fit in `JACOBIAN_BYTES`.

    Yields:
        Which rows of the batch, their means ``f*``, ``(b, K)``, and their Jacobians.
    """
    size = len(next(iter(batch.values())))
    outputs = len(program.task.class_names) if program.task is not None else 1
    step = max(1, JACOBIAN_BYTES // (4 * max(outputs, 1) * sum(site.shape.numel() for site in sites)))
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        part = {name: value[rows] for name, value in batch.items()} if step < size else batch
        found = list(slices(program, values, sites, part))
        yield rows, found[0][0], {site.name: torch.stack([own[site.name] for _, own in found], 2) for site in sites}


def covariance_of(laws: Mapping[str, Any], jacobian: Mapping[str, Tensor]) -> Tensor:
    """``J Σ Jᵀ``, ``(b, K, K)``, summed over sites and layers, which are independent."""
    return torch.stack([laws[name].covariance_of(own).sum(0) for name, own in jacobian.items()]).sum(0)


def negative_log_likelihoods(
    program: PyroLoRA,
    values: Mapping[str, Tensor],
    sites: Sequence[SiteGroup],
    data: Iterable[Batch],
    laws: Mapping[str, Any],
    candidates: Sequence[Mapping[str, Tensor]],
    points: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """NLL of the linearised predictive under several prior precisions, in nats an example, in one pass.

    Args:
        program: The Pyro model.
        values: All its latent sites; those of ``sites`` with a gradient.
        sites: The random matrices.
        data: Collated batches.
        laws: The posterior, by site; its own λ does not matter.
        candidates: Values of λ, each by site.
        points: From mean and covariance to natural parameters, ``(S, b, K)``.

    Returns:
        One for each candidate.
    """
    parameters = {name: value.detach() for name, value in values.items() if name not in program.sites}
    total, count = torch.zeros(len(candidates), dtype=torch.double), 0
    for batch in data:
        for rows, mean, jacobian in jacobians(program, values, sites, batch):
            part = {name: value[rows] for name, value in batch.items()}
            count += len(mean)
            with torch.no_grad():
                of = {name: laws[name].covariance_by_precision(own) for name, own in jacobian.items()}
                for i, candidate in enumerate(candidates):
                    covariances = [of[name](candidate[name]).sum(0) for name in of]
                    drawn = points(mean, torch.stack(covariances).sum(0))
                    each = torch.vmap(lambda f, own=part: program.likelihood.log_prob(f, parameters, own))(drawn)
                    total[i] += float((math.log(len(drawn)) - each.double().logsumexp(0)).sum())
    return total / count


def gaussian_points(mean: Tensor, covariance: Tensor, num_points: int, *, seed: int = 0) -> Tensor:
    """Quasi-Monte Carlo points of ``N(mean, covariance)``, ``(S, b, K)``: one scrambled Sobol sequence for all b."""
    engine = torch.quasirandom.SobolEngine(mean.shape[-1], scramble=True, seed=seed % 2**31)
    uniform = engine.draw(num_points, dtype=torch.double).clamp(1e-9, 1 - 1e-9)
    white = torch.special.ndtri(uniform).to(mean)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return mean + torch.einsum("nkj,sj->snk", root, white)


def say_whether_noise_drowns(mean: Tensor, covariance: Tensor) -> None:
    """Warns where averaging changes the class of more than a tenth of the examples, which are training examples."""
    averaged = gaussian_points(mean, covariance, 256).softmax(-1).mean(0)
    changed = float((averaged.argmax(-1) != mean.argmax(-1)).float().mean())
    if changed > 0.1:
        logger.warning(
            "Laplace: averaging over the posterior changes the predicted class of %.0f %% of %d training examples. "
            "Saturated predictions have no curvature, and the evidence then takes a λ whose noise drowns the logits: "
            "give the task a validation split for precision='val_nll', or fit under a prior",
            100 * changed,
            len(mean),
        )


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """``log p_k`` up to a constant, ``p_k ≈ 1/(1 + Σ_{j≠k} exp(−(μ_k − μ_j)/√(1 + π/8 V_kj)))``, V of the difference.

    For two classes it is MacKay's probit approximation. Source: Lu et al. 2020 (mean-field softmax), pairwise form.
    """
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    spread = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    margin = (mean.unsqueeze(-1) - mean.unsqueeze(-2)) / (1 + math.pi / 8 * spread.clamp(min=0)).sqrt()
    return -torch.logsumexp(-margin, -1)  # j = k contributes the 1


def bridge(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logarithm of the mean of the Dirichlet that matches the Gaussian (Hobbhahn et al. 2022, eq. 10).

    The logits are centred first, because a softmax does not see their sum. For two classes the bridge's mean is that
    of the point estimate, whatever the covariance.
    """
    classes = mean.shape[-1]
    centring = torch.eye(classes, dtype=mean.dtype, device=mean.device) - 1 / classes
    mean = mean @ centring
    variance = (centring @ covariance @ centring).diagonal(dim1=-2, dim2=-1)
    exponent = mean.exp() / classes**2 * (-mean).exp().sum(-1, keepdim=True)
    alpha = (1 - 2 / classes + exponent) / variance.clamp(min=1e-12)
    return alpha.clamp(min=1e-12).log()
