"""The contract of priors, walked over every class that ``pyrolora.priors`` exports."""

from __future__ import annotations

import functools
import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from transformers import BertConfig, BertForSequenceClassification

from pyrolora import priors
from pyrolora.guides.base import key
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.archive import describe, rebuild
from pyrolora.inference.elbo import Objective, TemperedELBO
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.base import PriorError, checked
from pyrolora.program import PyroLoRA

LAYERS, RANK, WIDTH, CLASSES = 2, 3, 8, 3
SHAPES = {
    "lora.query.A": (LAYERS, RANK, WIDTH),
    "lora.query.B": (LAYERS, WIDTH, RANK),
    "head.classifier.weight": (1, CLASSES, WIDTH),
    "head.classifier.bias": (1, CLASSES),
}
CLASSES_OF_PRIORS = [
    thing
    for name in priors.__all__
    if isinstance(thing := getattr(priors, name), type) and not issubclass(thing, Exception)
]
# One entry for each exported class: arguments that differ from its defaults.
EXAMPLES = {
    "ARD": priors.ARD(0.2, spread=0.5),
    "Flat": priors.Flat(),
    "Hierarchical": priors.Hierarchical(0.2, spread=0.5),
    "Horseshoe": priors.Horseshoe(0.05, slab_scale=0.3, slab_df=5.0),
    "MatrixNormal": priors.MatrixNormal(0.2, rank_correlation=0.4),
    "Normal": priors.Normal("fan_in"),
}
NEED_RANKS = {"ARD", "Horseshoe", "MatrixNormal"}
EVERY_PRIOR = pytest.mark.parametrize("name", [prior.__name__ for prior in CLASSES_OF_PRIORS])


@functools.cache
def base_model() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=WIDTH,
        max_position_embeddings=16,
        num_labels=CLASSES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config).eval()


@functools.cache
def program_with(name: str) -> PyroLoRA:
    prior = EXAMPLES[name]
    declared = {"*.A": prior, "*.B": prior, "head.*": priors.Normal(1.0) if name in NEED_RANKS else prior}
    adapter = LoraConfig(r=RANK, lora_alpha=4, target_modules=["query"], task_type="SEQ_CLS")
    base = BertForSequenceClassification(base_model().config)
    base.load_state_dict(base_model().state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        program = PyroLoRA(base.eval(), adapter, priors=declared, likelihood=Categorical(CLASSES), num_data=10)
    assert {site: tuple(group.shape) for site, group in program.sites.items()} == SHAPES
    return program


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2, 1, 1])}


def served(name: str) -> list:
    """The sites of the tiny model that a prior serves."""
    sites = program_with("Normal").sites.values()
    return [site for site in sites if "rank" in site.dims or name not in NEED_RANKS]


def test_every_exported_prior_is_walked():
    """Law: a prior that is exported has an example here, so that none stays untested."""
    assert {prior.__name__ for prior in CLASSES_OF_PRIORS} == EXAMPLES.keys()


@EVERY_PRIOR
def test_shapes_and_finite_density(name):
    """Law: on A, B, head matrix and bias, a prior has batch (layers,), the site's event, and scores its draws."""
    pyro.set_rng_seed(0)
    for site in served(name):
        fn = checked(EXAMPLES[name], site)
        value = fn()
        assert fn.batch_shape == (site.num_layers,) and fn.event_shape == site.event_shape
        assert value.shape == site.shape and value.dtype == torch.float32
        log_prob = fn.log_prob(value)
        assert log_prob.shape == (site.num_layers,) and bool(log_prob.isfinite().all())
        assert bool(fn.support.check(value).all()) and fn.support.event_dim == site.event_dim


@EVERY_PRIOR
def test_sites_that_a_prior_cannot_serve_are_named(name):
    """Law: a prior over ranks refuses a head by name; every other prior serves all sites."""
    for site in program_with("Normal").sites.values():
        if site in served(name):
            checked(EXAMPLES[name], site)
        else:
            with pytest.raises(PriorError, match=site.name):
                checked(EXAMPLES[name], site)


@EVERY_PRIOR
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_draws_are_on_the_device_in_force(name, device):
    """Law: under torch's device context, draws, hyper-parameters and densities are on that device."""
    with torch.device(device):
        for site in served(name):
            trace = poutine.trace(lambda site=site: pyro.sample("w", checked(EXAMPLES[name], site))).get_trace()
            trace.compute_log_prob()
            for node in trace.nodes.values():
                if node["type"] == "sample":
                    assert node["value"].device.type == node["log_prob"].device.type == device


@EVERY_PRIOR
def test_draws_are_of_the_type_in_force(name):
    """Law: under a float64 default, draws and densities are float64."""
    torch.set_default_dtype(torch.float64)
    try:
        for site in served(name):
            fn = checked(EXAMPLES[name], site)
            assert fn().dtype == fn.log_prob(fn()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@EVERY_PRIOR
def test_hyper_sites_carry_the_sites_name(name):
    """Law: whatever a prior samples of its own is named <site>.<hyper>, is outside plates, and has no batch shape."""
    for site in served(name):
        for hyper, node in poutine.trace(EXAMPLES[name]).get_trace(site).nodes.items():
            if node["type"] == "sample":
                assert hyper.startswith(f"{site.name}.") and "." not in hyper.removeprefix(f"{site.name}.")
                assert node["fn"].batch_shape == () and node["cond_indep_stack"] == ()


@EVERY_PRIOR
def test_a_saved_prior_is_the_same_prior(name):
    """Law: describe → JSON → rebuild gives the same hyper-sites, draws and densities, bit for bit, on every site."""
    back = rebuild(json.loads(json.dumps(describe(EXAMPLES[name]), allow_nan=False)), where="file")
    for site in served(name):
        traces = []
        for prior in (EXAMPLES[name], back):
            pyro.set_rng_seed(3)
            trace = poutine.trace(lambda p=prior, s=site: pyro.sample("w", checked(p, s))).get_trace()
            trace.compute_log_prob()
            traces.append({n: (x["value"], x["log_prob"]) for n, x in trace.nodes.items() if x["type"] == "sample"})
        assert traces[0].keys() == traces[1].keys()
        for hyper, pair in traces[0].items():
            assert all(torch.equal(a, b) for a, b in zip(pair, traces[1][hyper], strict=True))


@EVERY_PRIOR
def test_a_program_traces(name):
    """Law: in a real program the trace holds every adapter site and the prior's hyper-sites, with finite densities."""
    program = program_with(name)
    pyro.set_rng_seed(4)
    trace = poutine.trace(program).get_trace(batch())
    trace.compute_log_prob()
    sampled = {n: x for n, x in trace.nodes.items() if x["type"] == "sample" and not site_is_subsample(x)}
    latent = {n for n, x in sampled.items() if not x["is_observed"]}
    assert latent == program.latents.keys() >= SHAPES.keys()
    for site in latent:
        assert trace.nodes[site]["value"].shape == program.latents[site].shape
        assert bool(trace.nodes[site]["log_prob"].isfinite().all())
    assert trace.nodes["labels"]["is_observed"] and bool(trace.log_prob_sum().isfinite())


@EVERY_PRIOR
@pytest.mark.parametrize("guide", [MAP(), MeanField(random="*")], ids=["MAP", "MeanField"])
def test_one_step_is_finite(name, guide):
    """Law: the objective and its gradient in every parameter of a guide are finite, and each parameter has one."""
    program = program_with(name)
    guide.bind(program)
    pyro.set_rng_seed(5)
    elbo = TemperedELBO()
    loss = elbo.differentiable_loss(program, guide, batch())
    loss.backward()
    assert bool(loss.isfinite()) and elbo.terms.kl.keys() == program.latents.keys()
    for parameter, value in guide.named_parameters():
        assert value.grad is not None and bool(value.grad.isfinite().all()), parameter
    improper = {site for site, latent in program.latents.items() if latent.flat}
    assert improper == (set(program.sites) if name == "Flat" else set())
    assert guide.random_sites() == (
        [] if isinstance(guide, MAP) else [site for site in program.latents if site not in improper]
    )


@pytest.mark.parametrize("name", ["Normal", "MatrixNormal"])
def test_the_objective_uses_the_closed_form(name):
    """Law: under Gaussian priors the KL of mean field is no estimate: two draws give the very same KL at each site."""
    program, guide = program_with(name), MeanField(random="*")
    guide.bind(program)
    terms = []
    for seed in (6, 7):
        pyro.set_rng_seed(seed)
        elbo = TemperedELBO()
        elbo.differentiable_loss(program, guide, batch())
        terms.append(elbo.terms)
    assert terms[0].data != terms[1].data
    assert all(torch.equal(terms[0].kl[site], terms[1].kl[site]) for site in program.sites)


def students_t(site):
    """A user's own prior, all of it: heavy tails with a learnt scale for the site."""
    scale = pyro.sample(f"{site.name}.scale", dist.LogNormal(-2.0, 0.5))
    return dist.StudentT(4.0, 0.0, scale).expand(site.shape).to_event(site.event_dim)


@pytest.mark.parametrize("exponent", [-8, -4, 4, 8])
@pytest.mark.parametrize("name", ["ARD", "Hierarchical", "Horseshoe"])
def test_extreme_hyper_parameters_are_finite(name, exponent):
    """Law: where q of an unknown scale stands at 1e-8 to 1e8, one after another, objective and gradients are finite."""
    program = program_with(name)
    hypers = [latent for latent in program.latents.values() if latent.group is None]
    assert hypers
    for latent in hypers:
        pyro.set_rng_seed(0)
        guide = MeanField(random="*")
        guide.bind(program)
        guide.loc[key(latent)].data.fill_(exponent * math.log(10))
        loss = Objective(program, guide)(batch())
        gradients = torch.autograd.grad(loss, list(guide.parameters()))
        assert torch.isfinite(loss) and not [g for g in gradients if not torch.isfinite(g).all()], latent.name


def test_a_users_own_prior_in_a_program():
    """Law: a plain function with a hyper-site is a prior like any other: it traces, fits a step, and owns its scale."""
    adapter = LoraConfig(r=RANK, target_modules=["query"], task_type="SEQ_CLS")
    base = BertForSequenceClassification(base_model().config).eval()
    program = PyroLoRA(base, adapter, priors={"*": students_t}, likelihood=Categorical(CLASSES), num_data=10)
    assert {f"{site}.scale" for site in SHAPES} == program.latents.keys() - SHAPES.keys()
    guide = MeanField(random="*.A")
    guide.bind(program)
    loss = TemperedELBO().differentiable_loss(program, guide, batch())
    loss.backward()
    assert bool(loss.isfinite()) and guide.random_sites() == ["lora.query.A.scale", "lora.query.A"]
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())
