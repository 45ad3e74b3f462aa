"""The program: what its priors imply before a fit, its latent sites, how it prints, and its errors."""

from __future__ import annotations

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pyro import poutine
from torch import Tensor

from pyrolora.adapters.sites import SiteGroup
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.base import Prior, PriorError
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical, Horseshoe
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, LinearModel, linear_gaussian, lora, sentence_task, tiny_bert, tiny_program

ADAPTERS = [f"lora.{kind}.{role}" for kind in ("query", "value") for role in "AB"]
HEAD = ["head.classifier.weight", "head.classifier.bias"]


def rows(program: PyroLoRA, start: int = 0, stop: int = 24) -> dict[str, Tensor]:
    assert program.task is not None and program.task.train is not None
    return program.task.collate([program.task.train[i] for i in range(start, stop)])


def linear_classifier(prior_b: Prior, *, classes: int = 3) -> tuple[PyroLoRA, dict[str, Tensor]]:
    """Softmax regression with LoRA on its weight and no head of its own; A has variance-preserving scale."""
    with isolated(3):
        program = PyroLoRA(
            LinearModel(torch.randn(classes, 4)),
            LoraConfig(r=2, lora_alpha=2, target_modules=["linear"]),
            priors={"*.A": Normal("fan_in"), "*.B": prior_b},
            likelihood=Categorical(classes),
            num_data=30,
        )
        return program, {"x": torch.randn(30, 4), "labels": torch.randint(classes, (30,))}


# -- prior predictive ------------------------------------------------------------------------------------------------


def test_prior_predictive_is_probabilities_by_seed() -> None:
    """Law: ``(S, b, K)`` rows that sum to one, the same for the same seed, a longer run extending a shorter one."""
    program = tiny_program()
    batch = rows(program, 0, 6)
    first, again, other = (program.prior_predictive(batch, 5, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (5, 6, 2)
    assert torch.allclose(first.sum(-1), torch.ones(5, 6))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert torch.equal(program.prior_predictive(batch, 3), first[:3])
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_wide_head_priors_are_extreme() -> None:
    """Law: the wider the head's prior, the nearer to 0 or 1 the probabilities that it implies."""
    confidence = []
    for scale in (0.1, 1.0, 10.0):
        program = tiny_program({"lora.*": Normal(0.1), "head.*": Normal(scale)})
        confidence.append(program.prior_predictive(rows(program), 40).amax(-1).mean().item())
    assert confidence[0] < 0.7 < confidence[1] < 0.95 < confidence[2]


def test_narrow_priors_predict_as_the_base_model() -> None:
    """Law: with a prior on B that is nearly zero, every draw predicts what the base model predicts; a wide one not."""
    program, batch = linear_classifier(Normal(1e-6))
    base = program.model.get_base_model().linear.base_layer(batch["x"]).softmax(-1)
    assert torch.allclose(program.prior_predictive(batch, 5), base.expand(5, -1, -1), atol=1e-4)
    wide, batch = linear_classifier(Normal(3.0))
    assert (wide.prior_predictive(batch, 5) - base).abs().mean() > 0.1


def test_prior_predictive_of_the_exact_variance() -> None:
    """Law: the log odds that it implies vary as s² B A x does under the priors: Var = 2 s² σ_B² r (|x|²/d)."""
    program, batch = linear_classifier(Normal(0.2), classes=2)
    odds = program.prior_predictive(batch, 3000).logit()[..., 1]
    scaling = program.sites["lora.linear.A"].scaling[0]
    expected = 2 * scaling**2 * 0.2**2 * 2 * batch["x"].square().sum(-1) / 4
    assert torch.allclose(odds.var(0), expected, rtol=0.25)


def test_prior_predictive_keeps_flat_sites_at_their_start() -> None:
    """Law: a flat site has no prior draws: it stands at PEFT's weights, so that the other factor's prior is seen."""
    program, batch = linear_classifier(Normal(3.0))
    flat = PyroLoRA(
        LinearModel(program.model.get_base_model().linear.base_layer.weight.detach()),
        LoraConfig(r=2, lora_alpha=2, target_modules=["linear"]),
        priors={"*.A": Flat(), "*.B": Normal(3.0)},
        likelihood=Categorical(3),
        num_data=30,
    )
    probabilities = flat.prior_predictive(batch, 5)
    assert (probabilities - probabilities.mean(0)).abs().mean() > 0.05


def test_prior_predictive_leaves_everything_as_it_was() -> None:
    """Law: no generator, no weight and no module's training mode changes, also where modes are mixed."""
    program = tiny_program(dropout=0.3)
    program.model.train()
    program.model.base_model.model.bert.embeddings.eval()
    modes = {name: module.training for name, module in program.model.named_modules()}
    weights = {name: (id(p), p.clone()) for name, p in program.model.named_parameters()}
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with_dropout_off = program.prior_predictive(rows(program), 2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]
    assert {name: module.training for name, module in program.model.named_modules()} == modes
    assert all(weights[n][0] == id(p) and torch.equal(weights[n][1], p) for n, p in program.model.named_parameters())
    program.model.eval()
    assert torch.equal(program.prior_predictive(rows(program), 2), with_dropout_off)


def test_building_leaves_the_callers_generator() -> None:
    """Law: reading the priors draws nothing from the caller's generator; PEFT's own initialisation alone does."""
    with isolated(0):
        get_peft_model(tiny_bert(), lora())
        expected = torch.rand(1)
    with isolated(0):
        PyroLoRA(tiny_bert(), lora(), priors={"*.B": ARD(0.1), "*": Hierarchical(1.0)}, task=sentence_task())
        assert torch.equal(torch.rand(1), expected)


# -- latents ---------------------------------------------------------------------------------------------------------


def test_latents_are_what_the_model_samples() -> None:
    """Law: every latent site with shape, plate and support, hyper-parameters before the sites that they govern."""
    program = tiny_program({"lora.query.B": ARD(0.1), "lora.*": Normal(0.2), "head.*": Hierarchical(0.5)})
    names = ["lora.query.A", "lora.query.B.scale", "lora.query.B", "lora.value.A", "lora.value.B"]
    names += [f"{head}{suffix}" for head in HEAD for suffix in (".scale", "")]
    assert list(program.latents) == names
    trace = poutine.trace(program).get_trace(rows(program, 0, 2))
    for name, latent in program.latents.items():
        node = trace.nodes[name]
        assert latent.shape == node["value"].shape
        assert latent.event_dim == node["fn"].event_dim
        assert [frame.name for frame in node["cond_indep_stack"]] == ([latent.plate] if latent.plate else [])
        assert latent.group is program.sites.get(name)
        assert not latent.flat
    scale = program.latents["lora.query.B.scale"]
    assert (
        scale.shape == (2, 2) and scale.support.check(scale.start).all() and not scale.support.check(-scale.start).any()
    )


def test_hyper_parameters_start_at_their_prior_medians() -> None:
    """Law: LogNormal(log s) starts at s exactly, half-Cauchy(τ) at τ, the slab at its simulated median."""
    horseshoe = Horseshoe(scale=0.03, slab_scale=0.2, slab_df=4.0)
    program = tiny_program({"lora.query.B": horseshoe, "*": Hierarchical(0.07, spread=2.0)})
    start = {name: latent.start for name, latent in program.latents.items()}
    assert torch.allclose(start["lora.value.A.scale"], torch.full((2,), 0.07))
    assert start["lora.query.B.tau"].item() == pytest.approx(0.03, rel=1e-5)
    assert torch.allclose(start["lora.query.B.local"], torch.ones(2, 2))
    with isolated(0):
        slab = dist.InverseGamma(2.0, 2.0 * 0.2**2).sample((100_000,)).median().item()
    assert start["lora.query.B.slab"].item() == pytest.approx(slab, rel=0.15)


def test_prior_scales() -> None:
    """Law: prior_scale is the prior's standard deviation, under hyper-parameters at their medians, and 1 for those."""
    program = tiny_program({"*.A": Normal("fan_in"), "lora.query.B": Hierarchical(0.2), "*.B": Flat(), "*": Normal(2)})
    scale = {name: latent.prior_scale for name, latent in program.latents.items()}
    assert scale["lora.query.A"] == pytest.approx(0.25)
    assert scale["lora.query.B"] == pytest.approx(0.2)
    assert scale["lora.query.B.scale"] == scale["lora.value.B"] == 1.0
    assert scale["head.classifier.weight"] == pytest.approx(2.0)
    assert program.latents["lora.value.B"].flat and not program.latents["lora.query.B"].flat


def test_adapters_start_at_pefts_weights() -> None:
    """Law: an adapter's start is what PEFT holds: zeros in B, none in A."""
    program = tiny_program()
    for name, site in program.sites.items():
        held = torch.stack([program.model.get_submodule(path).get_parameter(key) for path, key in site.holders])
        assert torch.equal(program.latents[name].start, held)
        if site.role != "head":
            assert (held == 0).all() == (site.role == "B")


def test_likelihood_parameters_are_latents() -> None:
    """Law: a learned noise scale is a latent without group or plate, at its prior median, and reaches the density."""
    likelihood = NormalLikelihood(prior_loc=math.log(0.4), prior_scale=0.5)
    truth = linear_gaussian()
    program = PyroLoRA(
        LinearModel(torch.randn(3, 4)),
        LoraConfig(r=2, target_modules=["linear"]),
        priors={"*": Normal(1.0)},
        likelihood=likelihood,
        num_data=20,
    )
    latent = program.latents["likelihood.scale"]
    assert (latent.group, latent.plate, latent.shape, latent.prior_scale) == (None, None, (), 1.0)
    assert latent.start.item() == pytest.approx(0.4)
    density = []
    for scale in (0.1, 10.0):
        fixed = poutine.condition(program, data={"likelihood.scale": torch.tensor(scale)})
        nodes = poutine.trace(fixed).get_trace(truth.batch).nodes
        assert nodes["labels"]["fn"].base_dist.scale.unique().item() == pytest.approx(scale)
        density.append(nodes["labels"]["fn"].log_prob(truth.batch["labels"]).sum())
    assert not torch.isclose(*density)


# -- what it shows, and its errors -----------------------------------------------------------------------------------


def test_a_site_without_a_prior_is_named() -> None:
    """Law: a site that no pattern matches is an error that names it."""
    with pytest.raises(PriorError, match=r"head\.classifier\.weight, head\.classifier\.bias"):
        tiny_program({"lora.*": Normal(0.1)})


def test_hyper_sites_are_named_after_their_site() -> None:
    """Law: a hyper-site whose name does not begin with its site's is refused, with the name that would do."""

    def prior(site: SiteGroup) -> dist.TorchDistribution:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        return dist.Normal(0.0, scale).expand(site.shape).to_event(site.event_dim)

    with pytest.raises(
        PriorError, match=r"site 'lora\.query\.A': its prior samples 'scale'; name it f\"\{site\.name\}"
    ):
        tiny_program({"*": prior})


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"likelihood": Categorical(2)},
        {"num_data": 3},
        {"likelihood": Categorical(2), "num_data": 0},
        {"task": True, "likelihood": Categorical(2)},
        {"task": True, "num_data": 24},
        {"task": True, "likelihood": Categorical(2), "num_data": 24},
    ],
)
def test_the_data_are_said_once(data: dict) -> None:
    """Law: a task, or a likelihood with N: neither, both, or half is an error that says so."""
    data = {**data, "task": sentence_task()} if "task" in data else data
    with pytest.raises(TypeError, match="either task=, or likelihood= and a positive num_data="):
        PyroLoRA(tiny_bert(), lora(), priors=PRIORS, **data)


def test_adapters_are_said_once() -> None:
    """Law: a LoraConfig for a plain model, none for a PeftModel; the other two combinations are errors."""
    peft = get_peft_model(tiny_bert(), lora())
    with pytest.raises(TypeError, match="PeftModel already"):
        PyroLoRA(peft, lora(), priors=PRIORS, task=sentence_task())
    with pytest.raises(TypeError, match=r"give a peft\.LoraConfig or an adapter folder"):
        PyroLoRA(tiny_bert(), priors=PRIORS, task=sentence_task())
    with pytest.raises(ValueError, match='use bias="none"'):
        PyroLoRA(tiny_bert(), lora(bias="all"), priors=PRIORS, task=sentence_task())
    assert PyroLoRA(peft, priors=PRIORS, task=sentence_task()).model is peft


def test_unknown_draws_are_named() -> None:
    """Law: a draw of the wrong shape stops with the site's name; nothing stays on the model."""
    program = tiny_program()
    batch = rows(program, 0, 2)
    held = {name: id(p) for name, p in program.model.named_parameters()}
    with pytest.raises(ValueError, match=r"'lora\.query\.A': a draw has shape \(2, 2, 16\), not \(2, 16\)"):
        program.logits({"lora.query.A": torch.zeros(2, 16)}, batch)
    assert {name: id(p) for name, p in program.model.named_parameters()} == held
    assert not program._running
