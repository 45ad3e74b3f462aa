"""What a posterior did to the weights, in one pass over its draws: densities, KL, noise, rank, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import kl_divergence

from pyrolora.adapters.sites import SiteGroup
from pyrolora.diagnostics.calibration import FloatArray
from pyrolora.diagnostics.verdict import Finding
from pyrolora.distributions.flat import Flat
from pyrolora.inference.datatree import layer_numbers
from pyrolora.inference.density import paired_traces, statements, values_of
from pyrolora.inference.noise import ALL_NOISE, INDISTINGUISHABLE, update_squares, verdict
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated, spawn
from pyrolora.program import PyroLoRA

# Where KL(q ‖ p) is below both, the data have left no trace: in nats for each random number, and for each example.
UNMOVED_A_NUMBER, UNMOVED_AN_EXAMPLE = 0.01, 0.02

Rows = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """Summaries of S draws of a posterior's weights; the draws themselves are not kept.

    A *kind* is a kind of adapted module, ``lora.query`` for instance.

    Attributes:
        log_prior: Site to ``log p(θ_s)`` in nats with its hyper-parameters and auxiliary sites, ``(S,)``.
        log_guide: The same of ``log q(θ_s)``; 0 at point estimates.
        kl: Random site to ``KL(q ‖ p)`` in nats of each layer, ``(layers,)``; that of a hyper-parameter shared by
            layers under its own name, ``()``. NaN under a flat prior.
        update: Kind to ``‖ΔW‖`` (Frobenius), ``(S, layers)``.
        noise: Kind to ``√(E‖ΔW − ΔW̄‖²/‖ΔW̄‖²)``, ``(layers,)``.
        overall: Kind to the same ratio of all its layers together.
        rank: Kind to the effective rank of ``ΔW̄``, ``(layers,)``.
        size: Random adapter matrix to the root mean square of its entries along each rank, ``(S, layers, r)``.
        random: Random site to how many numbers are random there, auxiliary sites included.
        atoms: A site at which the guide has several point masses, and so no density; None for most guides.
        natural: Whether predictions come from draws of natural parameters in place of the weights.
    """

    log_prior: dict[str, FloatArray]
    log_guide: dict[str, FloatArray]
    kl: dict[str, FloatArray]
    update: dict[str, FloatArray]
    noise: dict[str, FloatArray]
    overall: dict[str, float]
    rank: dict[str, FloatArray]
    size: dict[str, FloatArray]
    random: dict[str, int]
    atoms: str | None
    natural: bool

    def log_ratio(self) -> FloatArray:
        """``log p(θ_s) − log q(θ_s)`` of all sites together, ``(S,)``."""
        return np.sum([self.log_prior[name] - self.log_guide[name] for name in self.log_prior], 0)


@torch.no_grad()
def summarise(posterior: Posterior, num_draws: int, *, seed: int = 0) -> Weights:
    """Goes once through the draws, which are those of `Posterior.draw`."""
    program, mean = posterior.program, posterior.mean()
    random = {owner_of(name, program.latents) for name in posterior.guide.random_sites()}
    kept: dict[str, Rows] = {name: [] for name in ("p", "q", "kl", "whole", "noise", "size")}
    learnt: dict[str, Tensor] = {}
    points: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    atoms = None
    for q_trace, p_trace in paired_traces(program, posterior.guide, num_draws, seed=seed):
        q, p, values = statements(q_trace), statements(p_trace), values_of(q_trace)
        kept["p"].append(_by_owner(p, program.latents))
        kept["q"].append(_by_owner(q, program.latents))
        kept["kl"].append(_divergences(q, p, program.latents, random))
        squares = update_squares(program.sites, {name: v.unsqueeze(0) for name, v in values.items()}, mean)
        kept["whole"].append({kind: whole[0] for kind, (whole, _, _) in squares.items()})
        kept["noise"].append({kind: away[0] for kind, (_, away, _) in squares.items()})
        learnt = {kind: own for kind, (_, _, own) in squares.items()}
        adapters = [site for name, site in program.sites.items() if name in random and "rank" in site.dims]
        kept["size"].append({site.name: _rms(values[site.name], site) for site in adapters})
        numbers = _numbers(q, p, program.latents, random)
        for name in (name for name in q if isinstance(q[name]["fn"], Delta) and not isinstance(p[name]["fn"], Delta)):
            if not torch.equal(points.setdefault(name, values[name]), values[name]):
                atoms = name
    stacked = {name: _stacked(rows) for name, rows in kept.items()}
    away = {kind: (value.mean(0), learnt[kind].cpu().numpy()) for kind, value in stacked["noise"].items()}
    return Weights(
        log_prior=stacked["p"],
        log_guide=stacked["q"],
        kl={name: value.mean(0) for name, value in stacked["kl"].items()},
        update={kind: np.sqrt(value) for kind, value in stacked["whole"].items()},
        noise={kind: _ratio(noise, own) for kind, (noise, own) in away.items()},
        overall={kind: float(_ratio(noise.sum(), own.sum())) for kind, (noise, own) in away.items()},
        rank=effective_rank(program.sites, mean),
        size=stacked["size"],
        random=numbers,
        atoms=atoms,
        natural=predicts_otherwise(posterior),
    )


def effective_rank(sites: Mapping[str, SiteGroup], mean: Mapping[str, Tensor]) -> dict[str, FloatArray]:
    """``exp H(σ/Σσ)`` of the singular values σ of ``ΔW̄``, for each kind ``(layers,)``; 0 for an update of zero.

    From the QR factors of B and Aᵀ: only ``r × r`` matrices are decomposed.  Source: Roy & Vetterli 2007.
    """
    ranks = {}
    for kind in update_squares(sites, {name: v.unsqueeze(0) for name, v in mean.items()}, mean):
        a, b = mean[f"{kind}.A"].double(), mean[f"{kind}.B"].double()
        values = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.mT).R.mT)
        total = values.sum(-1, keepdim=True)
        entropy = torch.special.entr(values / total.clamp(min=torch.finfo(values.dtype).tiny)).sum(-1)
        ranks[kind] = torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0).cpu().numpy()
    return ranks


@torch.no_grad()
def prior_sizes(program: PyroLoRA, sites: Iterable[str], num_draws: int, *, seed: int = 0) -> dict[str, FloatArray]:
    """`Weights.size` under the declared priors, ``(S, layers, r)``; sites with a flat prior have none."""
    proper = [name for name in sites if not program.latents[name].flat]
    rows: Rows = []
    for s in range(num_draws if proper else 0):
        with poutine.block(), isolated(spawn(seed, s)):
            draws, _ = program.sample_latents()
        rows.append({name: _rms(draws[name], program.sites[name]) for name in proper})
    return _stacked(rows) if rows else {}


def layer_table(posterior: Posterior, weights: Weights) -> pd.DataFrame:
    """One row for each kind of module and layer.

    Columns: ``kind``, ``layer``, ``random`` (how many numbers), ``kl`` (nats), ``kl_per_number``, ``noise_to_mean``,
    ``effective_rank``; NaN where something does not apply: nothing is random, or predictions come from natural
    parameters. Heads are kinds of their own, without an update ``ΔW``.
    """
    kinds: dict[str, list[SiteGroup]] = {}
    for name, site in posterior.program.sites.items():
        kinds.setdefault(name if site.role == "head" else name.rsplit(".", 1)[0], []).append(site)
    rows: list[dict[str, Any]] = []
    for kind, members in kinds.items():
        drawn = [site for site in members if site.name in weights.kl]
        size = sum(weights.random[site.name] // site.num_layers for site in drawn)
        for i, layer in enumerate(layer_numbers(members[0])):
            shown = size and not weights.natural
            kl = sum(float(weights.kl[site.name][i]) for site in drawn) if shown else np.nan
            row: dict[str, Any] = {"kind": kind.removeprefix("lora."), "layer": layer, "random": size, "kl": kl}
            row["kl_per_number"] = kl / size if size else np.nan
            row["noise_to_mean"] = float(weights.noise[kind][i]) if kind in weights.noise and shown else np.nan
            row["effective_rank"] = float(weights.rank[kind][i]) if kind in weights.rank else np.nan
            rows.append(row)
    return pd.DataFrame(rows)


def judge_noise(posterior: Posterior, weights: Weights) -> Finding:
    """Whether the noise of ``ΔW`` is of a size that shows in predictions, and leaves something of what was learnt."""
    if weights.natural:
        words = (
            f"{type(posterior.guide).__name__} predicts from natural parameters, not from draws of the weights, whose "
        )
        return Finding("noise", "none", f"{words}noise says nothing of its predictions.")
    # A kind whose adapters are point estimates has no noise to judge; draws may differ by the head all the same.
    random = {name for name, size in weights.random.items() if size}
    ratios = {kind: ratio for kind, ratio in weights.overall.items() if any(n.startswith(f"{kind}.") for n in random)}
    if weights.overall and not ratios:
        words = "the adapters are point estimates here: what is random is elsewhere, and ΔW has no noise to compare"
        return Finding("noise", "none", f"{words} with its mean.")
    numbers = {f"noise_to_mean {kind}": ratio for kind, ratio in ratios.items()}
    if not ratios:
        return Finding("noise", "none", "no kind of module has an update whose noise could be compared with its mean.")
    if said := verdict(ratios):
        words, _, advice = said.partition(". ")
        return Finding("noise", "bad", f"{words}.", advice, numbers)
    shown = ", ".join(f"{kind.removeprefix('lora.')} {ratio:.2g}" for kind, ratio in ratios.items())
    words = f"the noise of ΔW against its mean is {shown}: draws differ, and what was learnt is not lost in them"
    return Finding("noise", "fine", f"{words} (between {INDISTINGUISHABLE:g} and {ALL_NOISE:g}).", "", numbers)


def judge_prior(posterior: Posterior, weights: Weights) -> Finding:
    """Whether the data moved the posterior away from the prior: ``KL(q ‖ p)`` for each number and each example."""
    kl = float(sum(value.sum() for value in weights.kl.values()))
    size = sum(weights.random.values())
    examples = posterior.program.num_data
    numbers = {"kl": kl, "kl_per_number": kl / max(size, 1), "kl_per_example": kl / examples}
    if weights.natural:
        effective = sum(row.get("effective", 0.0) for row in posterior.guide.describe().values())
        words = f"a Gaussian at the mode of {size:,} numbers, of which the data determine {effective:.1f} (effective "
        return Finding("prior", "fine", f"{words}parameters).", "", {"effective": effective})
    if weights.atoms or not np.isfinite(kl) or not size:
        why = f"point masses at {weights.atoms} have" if weights.atoms else "a random site with a flat prior has"
        return Finding("prior", "none", f"{why} no finite KL from the prior.")
    words = f"KL(q ‖ p) is {kl:.4g} nats: {kl / size:.2g} for each of {size:,} random numbers, {kl / examples:.2g} "
    words += "for each training example"
    if kl / size < UNMOVED_A_NUMBER and kl / examples < UNMOVED_AN_EXAMPLE:
        advice = (
            "Predictions are the prior's. Lower the temperature β, make fewer numbers random (Inducing), train longer, "
            "or declare a wider prior."
        )
        return Finding("prior", "bad", f"{words}: the posterior equals the prior.", advice, numbers)
    return Finding("prior", "fine", f"{words}: the data have moved the posterior.", "", numbers)


def predicts_otherwise(posterior: Posterior) -> bool:
    """Whether predictions come from draws of natural parameters rather than of the weights (Laplace, linearised)."""
    return posterior.guide.natural_parameters(posterior.program, 1) is not None


def _by_owner(sites: Mapping[str, Any], latents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Log density of each latent site together with its hyper-parameters and auxiliary sites, as double."""
    totals: dict[str, Tensor] = {}
    for name, site in sites.items():
        owner = owner_of(name, latents)
        value = site["log_prob"].double().sum()
        totals[owner] = totals[owner] + value if owner in totals else value
    return totals


def _divergences(
    q: Mapping[str, Any], p: Mapping[str, Any], latents: Mapping[str, Any], random: set[str]
) -> dict[str, Tensor]:
    """``KL(q ‖ p)`` by layer of each random site; where it has no closed form, ``log q − log p`` at the draw."""
    found: dict[str, Tensor] = {}
    for name, site in q.items():
        owner = owner_of(name, latents)
        if owner not in random or isinstance(site["fn"], Delta):
            continue
        try:
            value = kl_divergence(site["fn"], p[name]["fn"])
        except NotImplementedError:
            value = site["log_prob"] - p[name]["log_prob"]
        value = value.double() if not isinstance(p[name]["fn"], Flat) else torch.full_like(value, torch.nan).double()
        key = owner if value.shape == latents[owner].shape[:1] else name
        found[key] = found[key] + value if key in found else value
    return found


def _numbers(
    q: Mapping[str, Any], p: Mapping[str, Any], latents: Mapping[str, Any], random: set[str]
) -> dict[str, int]:
    """How many numbers are random at each random site: none where others fix them (W given V in product form), nor
    where they are as in the prior by construction (W given V at λ = 1)."""
    found: dict[str, int] = dict.fromkeys(random, 0)
    for name, site in q.items():
        owner = owner_of(name, latents)
        given = name in latents and any(other.startswith(f"{name}.") for other in q)
        fixed = isinstance(site["fn"], Delta) or (given and torch.equal(site["log_prob"], p[name]["log_prob"]))
        if owner in random and not fixed:
            found[owner] += site["value"].numel()
    return found


def owner_of(name: str, latents: Mapping[str, Any]) -> str:
    """The adapter site that a hyper-parameter or an auxiliary site belongs to; any other site is its own."""
    adapters = (n for n, latent in latents.items() if latent.group is not None and name.startswith(f"{n}."))
    return next(adapters, name)


def _rms(value: Tensor, site: SiteGroup) -> Tensor:
    """Root mean square over all but layer and rank, ``(layers, r)``."""
    rank = site.dims.index("rank")
    return value.double().square().movedim(rank, 1).flatten(2).mean(-1).sqrt()


def _ratio(noise: FloatArray, learnt: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise > 0, np.sqrt(noise / learnt), 0.0)


def _stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, FloatArray]:
    return {name: torch.stack([row[name] for row in rows]).cpu().numpy() for name in rows[0]}
