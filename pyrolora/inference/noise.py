"""How large the noise of a posterior is against what was learnt: the noise-to-mean ratio of the weight update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup

# Below the first, draws are one model for all that a prediction shows; above the second, the update is noise. (Ratios
# of 4 to 7 are what a well calibrated mean field over tens of thousands of weights has.)
INDISTINGUISHABLE, ALL_NOISE = 0.01, 30.0


def noise_to_mean(
    sites: Mapping[str, SiteGroup], draws: Mapping[str, Tensor], mean: Mapping[str, Tensor]
) -> dict[str, float]:
    """``√( E‖ΔW − ΔW̄‖² / ‖ΔW̄‖² )``, ``ΔW = s B A`` and ``ΔW̄`` at the mean weights, summed over the layers of a kind.

    ``‖B A‖² = tr(BᵀB · A Aᵀ)``: only ``r × r`` products are made, never ΔW.

    Args:
        sites: The program's sites.
        draws: ``{site: (S, layers, *shape)}``.
        mean: ``{site: (layers, *shape)}``.

    Returns:
        ``{kind: ratio}``, for ``lora.query`` for instance; infinite where the mean update is zero. Adapters of experts,
        whose ranks do not pair up between A and B, are left out.
    """
    ratios = {}
    for kind, (_, noise, own) in update_squares(sites, draws, mean).items():
        total, learnt = noise.sum(-1).mean(), own.sum()
        ratios[kind] = float((total / learnt).sqrt()) if learnt > 0 else float("inf") if total > 0 else 0.0
    return ratios


def update_squares(
    sites: Mapping[str, SiteGroup], draws: Mapping[str, Tensor], mean: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """``‖ΔW‖²`` and ``‖ΔW − ΔW̄‖²`` of every draw, ``(S, layers)``, and ``‖ΔW̄‖²``, ``(layers,)``, for each kind.

    Arguments, and what is left out, as for `noise_to_mean`.
    """
    squares = {}
    for name, site in sites.items():
        other = f"{name[:-1]}B"
        if site.role != "A" or other not in sites or site.shape[-2] != sites[other].shape[-1] or _is_expert(site):
            continue
        a, b = draws[name].double(), draws[other].double()
        a0, b0 = mean[name].double(), mean[other].double()
        scaling = torch.tensor(site.scaling, dtype=torch.double, device=a.device).square()
        whole, own = _inner(b, a, b, a), _inner(b0, a0, b0, a0)
        noise = (whole - 2 * _inner(b, a, b0, a0) + own).clamp(min=0)
        squares[name.rsplit(".", 1)[0]] = (scaling * whole.clamp(min=0), scaling * noise, scaling * own)
    return squares


def verdict(ratios: Mapping[str, float]) -> str | None:
    """What is wrong with the size of the noise, and what to do; None where nothing is."""
    quiet = [kind for kind, ratio in ratios.items() if ratio < INDISTINGUISHABLE]
    loud = [kind for kind, ratio in ratios.items() if ratio > ALL_NOISE]
    if ratios and len(quiet) == len(ratios):
        return (
            f"the noise of ΔW is below {INDISTINGUISHABLE:.0%} of its mean at every site: draws are indistinguishable, "
            "and this posterior predicts as its mean does. Start wider, raise the scales' learning rate, train longer, "
            "or raise the temperature."
        )
    if loud:
        return (
            f"the noise of ΔW is more than {ALL_NOISE:g} times its mean at {', '.join(loud)}: what was learnt there is "
            "lost in it, and the posterior is close to the prior. Make fewer numbers random, or lower the temperature."
        )
    return None


def _inner(b: Tensor, a: Tensor, b0: Tensor, a0: Tensor) -> Tensor:
    """``⟨B A, B₀ A₀⟩`` for each layer."""
    return ((b.mT @ b0) * (a @ a0.mT)).sum((-2, -1))


def _is_expert(site: SiteGroup) -> bool:
    return "expert" in site.holders[0][0]
