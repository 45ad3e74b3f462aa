"""The inducing guide: plain LoRA as its limit, the declared prior kept, exact starts, and clear refusals."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyrolora.guides.base import key
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.inducing_families import Diagonal
from pyrolora.inference.elbo import Objective, TemperedELBO
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.matrix_normal import MatrixNormal
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, lora, sentence_task, tiny_bert, tiny_program

PRODUCT: dict[str, Any] = {"structure": "product"}
FACTORS: dict[str, Any] = {"random": "lora.*"}
BOTH = [{}, PRODUCT, {**FACTORS, "conditional": "learned"}]


def trained(seed: int = 3) -> PyroLoRA:
    """A program whose adapters are not zero: what training or an imported adapter leaves."""
    program = tiny_program()
    with isolated(seed), torch.no_grad():
        for name, parameter in program.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    program.latents = program._find_latents()
    return program


def bound(program: PyroLoRA, **options: Any) -> Inducing:
    guide = Inducing(**options)
    with isolated(0):
        guide.bind(program)
    return guide


def shrink(guide: Inducing, sigma: float, noise: float) -> None:
    """Sets σ_V and λ everywhere, whatever λ was to be."""
    guide.conditional, guide.conditional_scale = "fixed", noise
    for log_noise in guide.log_noise.values():
        log_noise.data.fill_(math.log(noise))
    for family in guide.families.values():
        assert isinstance(family, Diagonal)
        family.log_scale.data.fill_(math.log(sigma))


def whole_batch(program: PyroLoRA) -> dict[str, Tensor]:
    assert program.task is not None
    return program.task.collate(list(program.task.train))


# -- plain LoRA is the limit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BOTH)
def test_without_noise_it_is_lora(options: dict[str, Any]) -> None:
    """Law (L1): with a trained adapter embedded and σ, λ → 0 the logits of a draw are plain LoRA's."""
    program = trained()
    batch = whole_batch(program)
    guide = bound(program, **options)
    with torch.no_grad(), poutine.block():
        plain = program.logits({}, batch)
        noisy = program.logits(guide(batch), batch)
        shrink(guide, 1e-9, 1e-9)
        assert torch.allclose(program.logits(guide(batch), batch), plain, atol=2e-5)
    assert not torch.allclose(noisy, plain, atol=1e-2)


def test_noise_shrinks_with_slope_two() -> None:
    """Law (L2): E‖W_ε − W₀‖² = s²[σ²‖R_r‖²‖R_c‖² + λ²(mn − tr(R_r R_rᵀ) tr(R_c R_cᵀ))], so ε² in ε = σ = λ."""
    program = trained()
    guide = bound(program, **FACTORS, size=3)
    latent = program.latents["lora.query.A"]
    row, column = guide._sides(latent)
    assert row is None and column is not None
    rows, columns = latent.shape[1:]
    scale = float(guide.colours[latent.name].scale.flatten()[0])
    explained = column.map.square().sum((-2, -1))
    measured, expected = [], []
    for epsilon in (0.4, 0.04):
        shrink(guide, epsilon, epsilon)
        with torch.no_grad(), isolated(1), poutine.block():
            mean = guide.centre(latent)
            draws = torch.stack([guide()[latent.name] for _ in range(3000)])
        measured.append((draws - mean).square().sum((-2, -1)).mean(0))
        # The exact side has R_r = I, of squared norm m.
        expected.append(scale**2 * epsilon**2 * (rows * explained + rows * columns - rows * explained))
        assert torch.allclose(measured[-1], expected[-1], rtol=0.03)
    assert torch.allclose((measured[0] / measured[1]).log10(), torch.tensor(2.0), atol=0.03)


# -- the declared prior ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rank_size"), [(1, None), (2, None), (5, None), (5, 1)])
@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_augmentation_keeps_the_declared_prior(size: int, rank_size: int | None, correlation: float) -> None:
    """Law (L3): in the augmented program W has the declared covariance, whatever Z and D."""
    declared = Normal(0.3) if correlation == 0 else MatrixNormal(0.3, correlation)
    program = tiny_program({"lora.query.A": declared, **PRIORS})
    # One inducing variable cannot hold PEFT's start of A, of rank two: stand at zero.
    program.latents["lora.query.A"].start.zero_()
    guide = bound(program, random="lora.query.A", size=size, rank_size=rank_size)
    assert [side is None for side in guide._sides(program.latents["lora.query.A"])] == [rank_size is None, False]
    with torch.no_grad(), isolated(2), poutine.block():
        for parameter in guide.inducing.values():
            parameter.add_(0.5 * torch.randn_like(parameter))
        model = poutine.reparam(program.sample_latents, config=guide.reparametrisations())
        draws = torch.stack([poutine.trace(model).get_trace().nodes["lora.query.A"]["value"] for _ in range(6000)])
    expected = 0.09 * torch.kron(torch.eye(2) * (1 - correlation) + correlation, torch.eye(16))
    for layer in range(2):
        own = torch.cov(draws[:, layer].flatten(-2).T)
        assert torch.allclose(own, expected, atol=0.009)


def test_what_the_inducing_variables_do_not_say_is_the_priors_and_free() -> None:
    """Law: by default λ = 1: off the span of R a draw of A has the prior's variance, and only q(V) costs anything."""
    program = trained()
    guide = bound(program)
    assert guide.random_sites() == ["lora.query.A", "lora.value.A"]
    for family in guide.families.values():
        assert isinstance(family, Diagonal)
        family.log_scale.data.fill_(math.log(1e-6))
    latent = program.latents["lora.query.A"]
    _, column = guide._sides(latent)
    assert column is not None
    with torch.no_grad(), isolated(1), poutine.block():
        draws = torch.stack([guide()[latent.name] for _ in range(2000)])
        outside = torch.linalg.qr(column.map, mode="complete").Q[..., column.map.shape[-1] :]
        spread = (draws @ outside).std(0)
    assert torch.allclose(spread, torch.full_like(spread, 0.25), rtol=0.1)  # fan_in of 16
    objective = Objective(program, guide)
    objective(whole_batch(program))
    assert objective.elbo.terms is not None
    assert float(objective.elbo.terms.kl[latent.name]) == 0 < float(objective.elbo.terms.kl[f"{latent.name}.V"])


def test_whitened_and_unwhitened_divergence_agree() -> None:
    """Law (L5): KL(q(V) ‖ N(0, I)) = KL(q(U) ‖ MN(0, K_r, K_c)) with U = L_r V L_cᵀ."""
    program = trained()
    guide = bound(program, **FACTORS)
    name = "lora.query.A"
    z, log_d = guide.inducing[f"{key(program.latents[name])}/column"], guide.log_diagonal["lora/query/A/column"]
    factor = torch.linalg.cholesky(z @ z.mT + torch.diag_embed((2 * log_d).exp()))
    q = guide._family(program.latents[name]).distribution()
    assert isinstance(q, torch.distributions.Independent)
    for layer in range(2):
        # vec reads rows one after another: rows are exact, so the map of vec(V) is I ⊗ L_c.
        linear = torch.kron(torch.eye(2), factor[layer].contiguous())
        own = torch.diag(q.stddev[layer].flatten().square())
        u = MultivariateNormal(linear @ q.mean[layer].flatten(), linear @ own @ linear.T)
        p = MultivariateNormal(torch.zeros(4), linear @ linear.T)
        white = kl_divergence(
            q, torch.distributions.Independent(torch.distributions.Normal(0.0, torch.ones(2, 2, 2)), 2)
        )
        assert torch.allclose(white[layer], kl_divergence(u, p), rtol=1e-3)


def test_the_elbo_has_both_divergences_exactly() -> None:
    """Law: the terms are KL(q(V) ‖ N(0, I)) and (mn/2)(λ² − 1 − 2 log λ): the same at every draw."""
    program = trained()
    guide = bound(program, **FACTORS, conditional="fixed", conditional_scale=0.5)
    rows = []
    for seed in range(3):
        elbo = TemperedELBO()
        with isolated(seed), torch.no_grad():
            elbo.differentiable_loss(guide.augmented(program), guide, whole_batch(program))
        assert elbo.terms is not None
        rows.append({name: float(value) for name, value in elbo.terms.kl.items()})
    assert all(row[name] == pytest.approx(rows[0][name], rel=1e-5) for row in rows for name in rows[0])
    size = program.latents["lora.query.A"].shape.numel()
    assert rows[0]["lora.query.A"] == pytest.approx(0.5 * size * (0.25 - 1 - 2 * math.log(0.5)), rel=1e-4)
    described = guide.describe()["lora.query.A"]
    assert described["kl_V"] == pytest.approx(rows[0]["lora.query.A.V"], rel=1e-4)
    assert described["kl_conditional"] == pytest.approx(rows[0]["lora.query.A"], rel=1e-4)
    assert described["lambda"] == pytest.approx(0.5)


@pytest.mark.parametrize("posterior", ["diagonal", "matrix", "full"])
def test_it_describes_what_was_learnt(posterior: str) -> None:
    """Law: with var V_ij = σ² everywhere σ_V is σ, and Σ(1 − σ²) + mn(1 − λ²) numbers are determined; at σ = λ = 1,
    the prior, none is, and at σ > 1 not less than none."""
    guide = bound(trained(), posterior=posterior, size=3, conditional="fixed", conditional_scale=0.8)
    for family in guide.families.values():
        name = {"diagonal": "log_scale", "matrix": "log_row", "full": "log_diagonal"}[posterior]
        getattr(family, name).data.fill_(math.log(0.5))
    row = guide.describe()["lora.query.A"]
    assert row["sigma_V"] == pytest.approx(0.5) and row["lambda"] == pytest.approx(0.8)
    assert row["effective"] == pytest.approx(2 * 2 * 3 * 0.75 + 2 * 2 * 16 * 0.36)
    guide.conditional_scale = 1.0
    for sigma in (0.0, 0.5):
        for family in guide.families.values():
            getattr(family, name).data.fill_(sigma)
        assert guide.describe()["lora.query.A"]["effective"] == pytest.approx(0, abs=1e-4)


REFUSED = {
    "its prior has hyper-parameters": Hierarchical(0.1),
    "Laplace is not an affine map of white noise": lambda site: dist.Laplace(0.0, 1.0).expand(site.shape).to_event(2),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_factors_refuse_other_priors(reason: str) -> None:
    """Law: a prior that augmentation cannot keep is refused with the site and what to declare; product bears it."""
    program = tiny_program({"*.A": REFUSED[reason], "*": Normal(0.1)})
    with pytest.raises(ValueError, match=rf"site 'lora\.query\.A': .*declare priors\.Normal .*{reason}"):
        bound(program, **FACTORS)
    assert bound(program, **PRODUCT).random_sites() == ["lora.query.A", "lora.value.A"]


# -- starts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("posterior", ["diagonal", "matrix", "full", "flow", "ensemble"])
@pytest.mark.parametrize("options", BOTH)
def test_starts_at_an_imported_adapter(options: dict[str, Any], posterior: str) -> None:
    """Law: the mean at the start is the adapter that the model holds, to round-off."""
    program = trained()
    mean = bound(program, posterior=posterior, **options).mean()
    for name, value in program.placement.current().items():
        assert torch.allclose(mean[name], value, atol=2e-6)


def test_sizes_that_cannot_hold_the_start_are_refused() -> None:
    """Law: fewer inducing variables than the rank of the present weights, or more than a side has, are errors."""
    program = trained()
    with pytest.raises(ValueError, match=r"lora\.query\.A: 1 inducing columns cannot start .* have rank 2"):
        bound(program, **FACTORS, size=1)
    with pytest.raises(ValueError, match="17 inducing columns for 16 columns"):
        bound(program, **FACTORS, size=17)
    with pytest.raises(ValueError, match="belong to structure='factors'"):
        Inducing(**PRODUCT, size=3)
    with pytest.raises(ValueError, match="conditional_scale is λ where conditional is 'learned' or 'fixed'"):
        Inducing(conditional_scale=0.01)
    with pytest.raises(ValueError, match="scales, the learning rate's factor, depth and members are positive"):
        Inducing(conditional="fixed", conditional_scale=0.0)
    with pytest.raises(ValueError, match=r"site 'lora\.query\.A': .* or use structure='product'"):
        bound(tiny_program({"*.A": Flat(), "*": Normal(1.0)}))
    with pytest.raises(ValueError, match="structure is one of factors, product, not 'sum'"):
        Inducing(structure="sum")  # type: ignore[arg-type]


def test_a_side_as_large_as_the_matrix_is_exact() -> None:
    """Law: with k = n on the long side, and the rank's side exact, W = s V: no conditional noise, no extra KL."""
    program = trained()
    guide = bound(program, **FACTORS, size=16, conditional="learned")
    assert not guide.inducing and not guide.log_noise
    with poutine.block(), torch.no_grad():
        trace = poutine.trace(guide).get_trace()
    white, value = (trace.nodes[name]["value"] for name in ("lora.query.A.V", "lora.query.A"))
    assert torch.allclose(value, 0.25 * white)  # fan_in of 16


def test_product_multiplies_one_factor() -> None:
    """Law: ΔW = s T_r V T_c whichever factor is named; where both are, A has the V."""
    program = trained()
    for pattern, sites in (("*.A", "A"), ("*.B", "B"), ("*", "A"), ("lora.query.*", "A")):
        guide = bound(program, **PRODUCT, random=pattern)
        assert all(name.endswith(sites) for name in guide.random_sites())
        with poutine.block(), torch.no_grad():
            nodes: Any = poutine.trace(guide).get_trace().nodes
        white, map_ = (nodes[f"lora.query.{sites}.{x}"]["value"] for x in "VT")
        product = white @ map_ if sites == "A" else map_ @ white
        assert torch.allclose(nodes[f"lora.query.{sites}"]["value"], product)
        partner = "B" if sites == "A" else "A"
        assert torch.equal(nodes[f"lora.query.{partner}"]["value"], program.latents[f"lora.query.{partner}"].start)


def test_product_bears_flat_priors_and_prices_t_and_b_alone() -> None:
    """Law: with flat priors the only divergence is V's; the declared prior of A is that of T."""
    program = tiny_program({"*": Flat()})
    guide = bound(program, **PRODUCT)
    objective = Objective(program, guide)
    objective(whole_batch(program))
    assert objective.elbo.terms is not None
    assert {name for name, kl in objective.elbo.terms.kl.items() if kl != 0} == {"lora.query.A.V", "lora.value.A.V"}
    declared = trained()
    objective = Objective(declared, bound(declared, **PRODUCT))
    objective(whole_batch(declared))
    assert objective.elbo.terms is not None
    value = declared.latents["lora.query.A"].start
    expected = -torch.distributions.Normal(0.0, 0.25).log_prob(value).sum()
    assert torch.allclose(objective.elbo.terms.kl["lora.query.A.T"], expected)


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", BOTH)
def test_bf16_base_models_work(options: dict[str, Any]) -> None:
    """Law: over a bf16 base the guide stays in fp32, and objective and gradients are finite."""
    task = sentence_task()
    with isolated(0):
        program = PyroLoRA(tiny_bert().to(torch.bfloat16), lora(), priors=PRIORS, task=task)
    guide = bound(program, **options)
    loss = Objective(program, guide)(whole_batch(program))
    loss.backward()
    assert torch.isfinite(loss) and all(p.dtype == torch.float32 for p in guide.parameters())
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", BOTH)
def test_inducing_matrices_reach_arviz(options: dict[str, Any]) -> None:
    """Law: the auxiliary sites stand in the tree beside the adapters, posterior and prior, with their layers."""
    program = trained()
    tree = Posterior(program, bound(program, **options)).to_datatree(num_draws=5, var_names="lora.query.A*")
    assert tree.posterior["lora.query.A.V"].dims == ("chain", "draw", "layer", "row", "column")
    assert "lora.query.A.V" in tree.prior and "lora.query.A" in tree.posterior
    assert abs(float(tree.prior["lora.query.A.V"].std()) - 1) < 0.3


def test_log_scales_have_their_own_learning_rate() -> None:
    """Law: σ, λ and D are in the second group, everything else in the first."""
    guide = bound(trained(), **FACTORS, conditional="learned", scale_learning_rate=7.0)
    slow, fast = guide.parameter_groups(0.01)
    names = {id(p): name for name, p in guide.named_parameters()}
    assert all("log_" in names[id(p)] for p in fast["params"])
    assert not any("log_" in names[id(p)] for p in slow["params"])
    assert (slow["lr"], fast["lr"]) == (0.01, pytest.approx(0.07))


def test_members_of_an_ensemble_are_whole_models() -> None:
    """Law: one draw uses the same member at every site and layer."""
    program = trained()
    guide = bound(program, **PRODUCT, posterior="ensemble", members=3)
    with isolated(0), torch.no_grad(), poutine.block():
        for _ in range(10):
            nodes: Any = poutine.trace(guide).get_trace().nodes
            chosen = []
            for site in guide.random_sites():
                members: Any = guide.families[site.replace(".", "/")].members
                chosen += (members == nodes[f"{site}.V"]["value"]).flatten(1).all(1).nonzero().flatten().tolist()
            assert len(chosen) == 2 and len(set(chosen)) == 1
