"""The guide contract, walked over every guide that the package exports."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping

import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

from pyrolora import guides
from pyrolora.guides.base import Guide
from pyrolora.inference.elbo import Objective, TemperedELBO
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, linear_gaussian, lora, sentence_task, tiny_program

CONCRETE = [name for name in guides.__all__ if name != "Guide"]
MIXED = {"lora.query.A": ARD(0.1), "*.A": Hierarchical(0.2), "*.B": Flat(), "head.*": Normal(1.0)}


# Guides whose arguments choose between different constructions are walked in each.
VARIANTS = (
    {
        "Ensemble, one": {"guide": guides.MeanField(), "size": 1},
        "Ensemble, of posteriors": {"guide": [guides.MeanField(), guides.Inducing(structure="product")]},
    }
    | {
        f"Inducing, {structure}, {q}": {"structure": structure, "random": "lora.*", "posterior": q}
        for structure, families in {
            "factors": ("diagonal", "matrix", "full", "flow", "ensemble"),
            "product": ("diagonal", "flow"),
        }.items()
        for q in families
    }
    | {
        "Inducing, learned": {"conditional": "learned"},
        "MeanField, BLoB": {"noise": "flipout", "parametrisation": "square", "init_scale": 0.0125},
        "InputAdaptive, declared": {"prior": "declared"},
        "InputAdaptive, backbone": {"features": "backbone", "kl": "sum", "noise": "example"},
    }
)


@pytest.fixture(params=[*CONCRETE, *VARIANTS])
def guide(request: pytest.FixtureRequest) -> Guide:
    return getattr(guides, request.param.partition(",")[0])(**VARIANTS.get(request.param, {}))


@pytest.fixture(params=["normal", "mixed"])
def program(request: pytest.FixtureRequest, guide: Guide) -> PyroLoRA:
    if request.param == "mixed" and getattr(guide, "structure", None) == "factors":
        pytest.skip("inducing factors refuse priors that are not Gaussian of known scale")
    if request.param == "mixed" and getattr(guide, "prior", None) == "declared":
        pytest.skip("the declared prior of each example's weights is a Normal of known scale")
    return serving(guide, PRIORS if request.param == "normal" else MIXED)


def serving(guide: Guide, priors: Mapping[str, Prior] = PRIORS) -> PyroLoRA:
    """A program that the guide accepts: some need what LoRA is usually configured with."""
    program = tiny_program(priors, adapter=lora(lora_dropout=0.1 if isinstance(guide, guides.Dropout) else 0.0))
    program.model.eval()
    return program


def whole_batch(program: PyroLoRA) -> dict[str, torch.Tensor]:
    assert program.task is not None
    return program.task.collate(list(program.task.train))


def arguments_of(guide: Guide) -> dict[str, object]:
    return {name: getattr(guide, name) for name in inspect.signature(type(guide)).parameters}


def test_every_guide_is_walked() -> None:
    """Law: whatever the package exports as a guide meets this suite."""
    assert {"MAP", "MeanField"} <= set(CONCRETE)
    assert all(issubclass(getattr(guides, name), Guide) for name in CONCRETE)


def test_samples_each_site_once_with_its_shape(guide: Guide, program: PyroLoRA) -> None:
    """Law: one sample statement for every site of the (augmented) model, in the model's order, with its shapes."""
    guide.bind(program)
    batch = whole_batch(program)
    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(poutine.replay(guide.augmented(program), trace=q)).get_trace(batch)
    latent = [n for n in p.stochastic_nodes if not n.endswith(".layers") and n != "data"]
    sampled = [n for n in q.stochastic_nodes if not n.endswith(".layers") and n != "data"]
    assert sorted(sampled) == sorted(latent)
    # A guide's auxiliary sites are named after the site that they belong to.
    own = {n for n in sampled if n not in program.latents}
    assert all(n.rsplit(".", 1)[0] in guide.random_sites() + guide.local_sites() for n in own)
    assert [n for n in sampled if n not in own] == list(program.latents)
    for name in latent:
        assert q.nodes[name]["value"].shape == p.nodes[name]["fn"].shape()
        assert p.nodes[name]["value"] is q.nodes[name]["value"]
        assert name in own or q.nodes[name]["value"].shape == program.latents[name].shape


def test_returns_what_it_sampled(guide: Guide, program: PyroLoRA) -> None:
    """Law: the guide returns {site: value}, with or without a batch."""
    guide.bind(program)
    trace = poutine.trace(guide).get_trace()
    values = trace.nodes["_RETURN"]["value"]
    assert list(values) == list(program.latents)
    assert all(values[name] is trace.nodes[name]["value"] for name in values)


def test_the_model_really_runs(guide: Guide, program: PyroLoRA) -> None:
    """Law: the objective's data term is the base model's log-likelihood at the guide's draw."""
    guide.bind(program)
    guide.eval()
    batch = whole_batch(program)
    objective = TemperedELBO()
    with isolated(1), torch.no_grad():
        objective.differentiable_loss(guide.augmented(program), guide, batch)
    with isolated(1), torch.no_grad(), poutine.block():
        draws = guide(batch)
    with torch.no_grad():
        by_hand = program.likelihood.log_prob(program.logits(draws, batch), {}, batch).sum()
    assert objective.terms is not None
    assert torch.allclose(objective.terms.data, by_hand, rtol=1e-5)
    other = {n: v + 0.5 for n, v in draws.items()}
    with torch.no_grad():
        assert not torch.allclose(program.logits(other, batch), program.logits(draws, batch))


def test_every_parameter_gets_a_gradient(guide: Guide, program: PyroLoRA) -> None:
    """Law: no parameter of a guide is idle, and all gradients are finite."""
    guide.bind(program)
    # B starts at zero, where A's likelihood gradient vanishes: move off that point.
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.01)
    for part in guide.parts() or [guide]:
        with part.hooks(program):
            Objective(program, part)(whole_batch(program)).backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert all(p.grad is None for p in program.model.parameters())


def test_parameter_groups_cover_every_parameter_once(guide: Guide, program: PyroLoRA) -> None:
    """Law: the optimiser sees each parameter exactly once."""
    guide.bind(program)
    grouped = [id(p) for group in guide.parameter_groups(1e-3) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in guide.parameters())


def test_same_seed_same_draws(guide: Guide, program: PyroLoRA) -> None:
    """Law: draws depend on the seed alone; more draws extend fewer; the caller's generator is untouched."""
    guide.bind(program)
    posterior = Posterior(program, guide)
    before = torch.random.get_rng_state()
    few, many = posterior.draw(2, seed=5), posterior.draw(4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(few[n], many[n][:2]) for n in few)
    random = guide.random_sites()
    # Which member of an ensemble draw s is of does not depend on the seed.
    drawn = {n for part in guide.parts() or [guide] for n in part.random_sites()}
    assert all((posterior.draw(2, seed=6)[n] != few[n]).any() for n in drawn)
    assert all((many[n] == many[n][0]).all() for n in program.latents if n not in random)


def test_state_round_trip(guide: Guide, program: PyroLoRA) -> None:
    """Law: a state dict loaded into a fresh bound guide gives the same draws."""
    guide.bind(program)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fresh = type(guide)(**arguments_of(guide))
    fresh.bind(program)
    fresh.load_state_dict(guide.state_dict())
    mine, its = Posterior(program, guide).draw(2), Posterior(program, fresh).draw(2)
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_binding_and_evaluating_leave_the_base_model_bitwise(guide: Guide, program: PyroLoRA) -> None:
    """Law: the base model's weights are the same objects with the same bits after a step."""
    before = {name: (id(p), p.clone()) for name, p in program.model.named_parameters()}
    guide.bind(program)
    Objective(program, guide)(whole_batch(program)).backward()
    for name, parameter in program.model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_another_guide_on_the_same_program_changes_nothing(guide: Guide, program: PyroLoRA) -> None:
    """Law: binding and moving a second guide leaves the first one's draws alone."""
    guide.bind(program)
    first = Posterior(program, guide).draw(1)
    second = copy.deepcopy(guide)
    second.bind(program)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(first[n], v) for n, v in Posterior(program, guide).draw(1).items())


def test_starts_at_the_adapter_that_peft_holds(guide: Guide, program: PyroLoRA) -> None:
    """Law: before training the guide's mean is PEFT's present weights: ΔW = 0, or an imported adapter."""
    guide.bind(program)
    current = program.placement.current()
    assert all(torch.allclose(guide.mean()[name], value) for name, value in current.items())


def test_elbo_is_below_the_log_evidence(guide: Guide) -> None:
    """Law: ELBO ≤ log p(y), for any parameters, on a program whose evidence is known (random sites only)."""
    if isinstance(guide, guides.MAP | guides.SWAG):  # whose randomness comes after the fit, if at all
        pytest.skip("a point estimate has no finite evidence bound")
    truth = linear_gaussian()
    if getattr(guide, "features", None) == "backbone":
        pytest.skip("the base model of this truth has no hidden states")
    guide.random = "*.A" if guide.random else ()
    guide.bind(truth.program)
    if not guide.random_sites() or getattr(guide, "structure", None) == "product":
        pytest.skip("a point estimate has no finite evidence bound")
    with torch.no_grad(), isolated(0):
        loss = TemperedELBO()
        for _ in range(3):
            values = [-loss.differentiable_loss(guide.augmented(truth.program), guide, truth.batch) for _ in range(50)]
            assert torch.stack(values).mean() < truth.log_evidence
            for parameter in guide.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_pyros_own_svi_takes_it(guide: Guide, elbo: type) -> None:
    """Law: program and guide are ordinary Pyro objects: SVI runs on them unchanged and lowers its loss."""
    program = serving(guide)
    guide.bind(program)
    batch = program.task.collate(list(sentence_task().train))
    with isolated(0):
        svi = SVI(guide.augmented(program), guide, Adam({"lr": 0.02}), loss=elbo())
        losses = [svi.step(batch) for _ in range(30)]
    assert sum(losses[-5:]) < sum(losses[:5])
