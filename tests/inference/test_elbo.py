"""The objective: Pyro's own ELBO at β = 1, its terms, its temperature, and the module that the optimiser sees."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyrolora.guides.base import Guide
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective, TemperedELBO, Terms
from pyrolora.inference.randomness import isolated
from pyrolora.priors.base import Prior
from pyrolora.priors.hierarchical import ARD, Hierarchical, Horseshoe
from pyrolora.priors.matrix_normal import MatrixNormal
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, linear_gaussian, tiny_program

# Divergences with a closed form, and (the horseshoe's half-Cauchy scales) without one.
MIXED: dict[str, Prior] = {
    "lora.query.B": ARD(0.1),
    "lora.value.A": Horseshoe(0.3),
    "*.B": MatrixNormal(0.2, 0.5),
    "*.A": Hierarchical(0.3),
    "*": Normal(1.0),
}


def batch_of(program: PyroLoRA, size: int = 8) -> dict[str, Tensor]:
    assert program.task is not None and program.task.train is not None
    return program.task.collate([program.task.train[i] for i in range(size)])


def moved(program: PyroLoRA, guide: Guide) -> Guide:
    """The guide away from its start."""
    program.model.eval()
    guide.bind(program)
    with torch.no_grad(), isolated(2):
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


def terms_of(objective: TemperedELBO) -> Terms:
    assert objective.terms is not None
    return objective.terms


@pytest.mark.parametrize("priors", [PRIORS, MIXED], ids=["normal", "mixed"])
@pytest.mark.parametrize("guide", [MAP(), MeanField(random="*.A"), MeanField(random="*")], ids=["map", "a", "all"])
def test_at_one_it_is_pyros_elbo(guide: Guide, priors: dict[str, Prior]) -> None:
    """Law: at β = 1 loss and gradients are those of Pyro's TraceMeanField_ELBO for the same draw."""
    program = tiny_program(priors)
    moved(program, guide)
    batch = batch_of(program)
    results = []
    for loss in (TemperedELBO(), TraceMeanField_ELBO()):
        guide.zero_grad()
        with isolated(1):
            value = loss.differentiable_loss(program, guide, batch)
        value.backward()
        results.append((value.item(), [p.grad.clone() for p in guide.parameters() if p.grad is not None]))
    (ours, gradients), (theirs, expected) = results
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(gradients) == len(expected) == len(list(guide.parameters()))
    assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-3) for g, e in zip(gradients, expected, strict=True))


def test_in_expectation_it_is_the_plain_elbo() -> None:
    """Law: closed-form divergences change the noise of the estimate, not its mean: Trace_ELBO's, within its error."""
    truth = linear_gaussian()
    guide = moved(truth.program, MeanField(random="*.A", init_scale=0.3))
    estimates = []
    for loss in (TemperedELBO().differentiable_loss, Trace_ELBO().loss):
        with torch.no_grad(), isolated(0):
            estimates.append(torch.tensor([float(loss(truth.program, guide, truth.batch)) for _ in range(500)]))
    ours, plain = estimates
    error = math.hypot(ours.std().item(), plain.std().item()) / math.sqrt(500)
    assert abs(ours.mean() - plain.mean()) < 4 * error
    assert error < 0.1 * ours.mean()


@pytest.mark.parametrize("priors", [PRIORS, MIXED], ids=["normal", "mixed"])
def test_terms_add_up(priors: dict[str, Prior]) -> None:
    """Law: loss = β Σ KL − data, with an entry for every latent site and a likelihood for every row."""
    program = tiny_program(priors)
    guide = moved(program, MeanField(random="*.B"))
    objective = TemperedELBO(0.3)
    loss = objective.differentiable_loss(program, guide, batch_of(program))
    terms = terms_of(objective)
    assert list(terms.kl) == list(program.latents)
    assert loss.item() == pytest.approx(0.3 * sum(v.item() for v in terms.kl.values()) - terms.data.item(), rel=1e-5)
    assert terms.rows is not None and terms.rows.shape == (8,)
    assert terms.data.item() == pytest.approx(24 / 8 * terms.rows.sum().item(), rel=1e-5)
    assert not any(value.requires_grad for value in [terms.data, terms.rows, *terms.kl.values()])


def test_divergences_are_those_of_the_distributions() -> None:
    """Law: a random site's entry is KL(q ‖ p); a point's is −log p(θ)."""
    program = tiny_program({"*": Normal(0.3)})
    guide = moved(program, MeanField(random="*.A"))
    objective = TemperedELBO()
    objective.differentiable_loss(program, guide, batch_of(program))
    prior = torch.distributions.Normal(0.0, 0.3)
    for name, latent in program.latents.items():
        value = terms_of(objective).kl[name].item()
        if guide.is_random(latent):
            q = guide.distribution(latent).base_dist  # type: ignore[attr-defined]
            assert value == pytest.approx(kl_divergence(q, prior).sum().item(), rel=1e-5)
        else:
            assert value == pytest.approx(-prior.log_prob(guide.point(latent)).sum().item(), rel=1e-5)


def test_temperature_scales_the_divergence_alone() -> None:
    """Law: the loss is affine in β with slope Σ KL, from −data at β = 0; the terms themselves do not change."""
    program = tiny_program()
    guide = moved(program, MeanField(random="*"))
    batch, losses, found = batch_of(program), {}, {}
    for beta in (0.0, 0.5, 1.0, 4.0):
        objective = TemperedELBO(beta)
        with isolated(1):
            losses[beta] = objective.differentiable_loss(program, guide, batch).item()
        found[beta] = terms_of(objective)
    total = sum(value.item() for value in found[1.0].kl.values())
    assert losses[0.0] == pytest.approx(-found[0.0].data.item(), rel=1e-6)
    for beta, loss in losses.items():
        assert torch.equal(found[beta].data, found[1.0].data)
        assert loss - losses[0.0] == pytest.approx(beta * total, rel=1e-4, abs=1e-2)


def test_particles_are_averaged() -> None:
    """Law: S particles give the mean of S single evaluations on the same random numbers, terms and gradients too."""
    program = tiny_program(MIXED)
    guide = moved(program, MeanField(random="*"))
    batch = batch_of(program)
    many, single = TemperedELBO(num_particles=3), TemperedELBO()
    with isolated(1):
        guide.zero_grad()
        loss = many.differentiable_loss(program, guide, batch)
        loss.backward()
        gradients = [p.grad.clone() for p in guide.parameters() if p.grad is not None]
    guide.zero_grad()
    parts, terms = [], []
    with isolated(1):
        for _ in range(3):
            parts.append(single.differentiable_loss(program, guide, batch))
            terms.append(terms_of(single))
        (sum(parts) / 3).backward()  # type: ignore[union-attr]
    assert len({round(part.item(), 3) for part in parts}) == 3
    assert loss.item() == pytest.approx(sum(part.item() for part in parts) / 3, rel=1e-6)
    expected = [p.grad for p in guide.parameters() if p.grad is not None]
    assert all(torch.allclose(g, e, rtol=1e-3, atol=1e-3) for g, e in zip(gradients, expected, strict=True))
    assert terms_of(many).data.item() == pytest.approx(sum(t.data.item() for t in terms) / 3, rel=1e-6)
    for name, value in terms_of(many).kl.items():
        assert value.item() == pytest.approx(sum(t.kl[name].item() for t in terms) / 3, rel=1e-5)
    rows = torch.stack([t.rows for t in terms if t.rows is not None]).mean(0)
    assert torch.allclose(terms_of(many).rows, rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [-0.1, float("nan")])
def test_bad_temperatures_are_refused(temperature: float) -> None:
    """Law: β is a number ≥ 0."""
    with pytest.raises(ValueError, match="temperature is a number ≥ 0"):
        TemperedELBO(temperature)


# -- the module that the optimiser sees ------------------------------------------------------------------------------


def test_objective_is_per_example() -> None:
    """Law: the module's value is the loss over N, whatever the batch's size."""
    program = tiny_program()
    guide = moved(program, MAP())
    whole = TemperedELBO(0.5).differentiable_loss(program, guide, batch_of(program, 24)).item()
    objective = Objective(program, guide, 0.5).eval()
    assert objective(batch_of(program, 24)).item() == pytest.approx(whole / 24, rel=1e-6)
    parts = [{name: value[i : i + 4] for name, value in batch_of(program, 24).items()} for i in range(0, 24, 4)]
    assert sum(objective(part).item() for part in parts) / 6 == pytest.approx(whole / 24, rel=1e-5)


def test_state_is_the_guides_alone() -> None:
    """Law: a checkpoint of the objective holds the guide's parameters and no base weight, and loads back."""
    program = tiny_program()
    guide = moved(program, MeanField(random="*"))
    objective = Objective(program, guide)
    state = objective.state_dict()
    assert set(state) == set(guide.state_dict()) == {name for name, _ in guide.named_parameters()}
    other = MeanField(random="*")
    other.bind(program)
    Objective(program, other).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), other.parameters(), strict=True))


def test_only_the_guide_learns() -> None:
    """Law: nothing but the guide's parameters asks for a gradient; in evaluation mode nothing does."""
    program = tiny_program()
    guide = moved(program, MeanField(random="*"))
    objective = Objective(program, guide)
    learned = {id(p) for p in objective.parameters() if p.requires_grad}
    assert learned == {id(p) for p in guide.parameters()}
    assert objective(batch_of(program)).requires_grad
    assert not objective.eval()(batch_of(program)).requires_grad


def test_validation_runs_on_the_first_batch_only() -> None:
    """Law: Pyro's checks see the first batch, are skipped afterwards, and the caller's setting comes back."""
    program = tiny_program()
    objective = Objective(program, moved(program, MeanField(random="*")))
    seen = []
    forward = program.likelihood.observe
    program.likelihood.observe = lambda *args: (  # type: ignore[method-assign]
        seen.append(pyro.settings.get("validate_distributions_pyro")),
        forward(*args),
    )[1]
    try:
        for _ in range(3):
            objective(batch_of(program))
    finally:
        del program.likelihood.observe
    assert seen == [True, False, False]
    assert pyro.settings.get("validate_distributions_pyro")


def test_a_checkpoint_of_another_guide_is_refused() -> None:
    """Law: resuming never passes over missing or foreign parameters, though the Trainer asks for leniency."""
    program = tiny_program()
    first, second = MAP(), MeanField(random="*")
    first.bind(program)
    second.bind(program)
    with pytest.raises(RuntimeError, match="Missing key"):
        Objective(program, second).load_state_dict(Objective(program, first).state_dict(), False)


def test_modes_reach_the_base_model_and_are_set_once() -> None:
    """Law: train and eval reach every module whatever mode it was in; asking again for the same mode walks nothing."""
    program = tiny_program(dropout=0.1)
    guide = MAP()
    guide.bind(program)
    program.model.eval()
    objective = Objective(program, guide)
    walks = []
    program.model.register_module("watch", watch := nn.Identity())
    watch.train = lambda mode=True: walks.append(mode)  # type: ignore[method-assign,assignment,return-value]
    for mode in (True, True, False, False, True, True):
        objective.train(mode)
        assert all(m.training == mode for m in program.model.modules() if m is not watch)
        assert objective.guide.training == mode
    assert walks == [True, False, True]
    program.model.eval()
    assert objective.train().program.model.training


def test_zeroing_reaches_the_guide() -> None:
    """Law: after zero_grad no parameter of the guide has a gradient."""
    program = tiny_program()
    guide = MAP()
    guide.bind(program)
    objective = Objective(program, guide)
    assert program.task is not None
    objective(program.task.collate(list(program.task.train))).backward()
    assert all(p.grad is not None for p in guide.parameters())
    objective.zero_grad()
    assert all(p.grad is None for p in guide.parameters())
