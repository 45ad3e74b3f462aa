"""Input-adaptive noise: its divergence, what it adds where, its limits, and what it learns from noisy labels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from pyro import poutine
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence
from transformers import OPTConfig, OPTForSequenceClassification, TrainingArguments

from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import Objective, TemperedELBO
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import (
    PRIORS,
    LinearModel,
    linear_gaussian,
    lora,
    sentence_task,
    tiny_bert,
    tiny_program,
    tokenizer,
)

SITE, OTHER = "lora.query.A", "lora.value.A"
KINDS = ("weight", "example", "local", "flipout")


def bound(program: PyroLoRA, guide: InputAdaptive, *, size: float = 0.3) -> InputAdaptive:
    """The guide away from its start: B not zero, α different between layers and inputs."""
    guide.bind(program)
    with torch.no_grad(), isolated(4):
        for parameter in guide.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return guide


def whole_batch(program: PyroLoRA) -> dict[str, Tensor]:
    assert program.task is not None
    return program.task.collate(list(program.task.train))


def terms_of(program: PyroLoRA, guide: InputAdaptive, batch: dict[str, Tensor]) -> Any:
    objective = TemperedELBO()
    with guide.hooks(program), torch.no_grad():
        objective.differentiable_loss(guide.augmented(program), guide, batch)
    return objective.terms


# -- the divergence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["dropout", "declared"])
def test_kl_is_that_of_the_weights(prior: str) -> None:
    """Law: with kl="sum" a site's KL is torch's between N(θ, αθ²) and the prior of A, over all weights and examples,
    scaled up from the minibatch; with kl="mean" it is that over the number of a layer's weights."""
    program = tiny_program({"*.A": Normal(0.4), "*": Normal(1.0)})
    guide = bound(program, InputAdaptive(prior=prior, kl="sum", rate=0.2))  # type: ignore[arg-type]
    batch = {name: value[:6] for name, value in whole_batch(program).items()}
    found = terms_of(program, guide, batch).kl
    for site in (SITE, OTHER):
        theta = guide.point(program.latents[site]).detach()
        alpha = guide.describe_inputs(batch)[f"{site}.alpha"][..., None, None]
        q = TorchNormal(theta.expand(6, *theta.shape), alpha.sqrt() * theta.abs())
        p = TorchNormal(0.0, 0.25**0.5 * theta.abs()) if prior == "dropout" else TorchNormal(0.0, 0.4)
        by_hand = kl_divergence(q, p).sum() * 24 / 6
        assert found[f"{site}.multiplier"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    guide.kl = "mean"
    tempered = terms_of(program, guide, batch).kl
    size = program.sites[SITE].event_shape.numel()
    assert tempered[f"{SITE}.multiplier"] * size == pytest.approx(found[f"{SITE}.multiplier"].item(), rel=1e-5)


def test_declared_prior_is_counted_once() -> None:
    """Law: under prior="declared" the density of A stands with each example alone; under "dropout" θ has its own."""
    program = tiny_program()
    batch = whole_batch(program)
    declared, dropout = (bound(program, InputAdaptive(prior=p)) for p in ("declared", "dropout"))  # type: ignore[arg-type]
    assert terms_of(program, declared, batch).kl[SITE] == 0.0
    theta = dropout.point(program.latents[SITE]).detach()
    by_hand = -program.priors[SITE](program.sites[SITE]).log_prob(theta).sum()
    assert terms_of(program, dropout, batch).kl[SITE].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_alpha_starts_at_the_least_divergence() -> None:
    """Law: α is ς = p/(1 − p) for every input at first, where the KL has no gradient."""
    program = tiny_program()
    guide = InputAdaptive(rate=0.2)
    guide.bind(program)
    batch = whole_batch(program)
    assert all(torch.allclose(a, torch.tensor(0.25)) for a in guide.describe_inputs(batch).values())
    q, p = guide.local_family(batch), guide.local_prior(batch)
    sum(kl_divergence(q[name], p[name]).sum() for name in q).backward()  # type: ignore[union-attr]
    assert all(x.grad is None or x.grad.abs().max() < 1e-4 for x in guide.network.parameters())


def test_local_latents_stand_inside_the_data_plate() -> None:
    """Law: multipliers are in both traces inside the plate of the data, scaled N/b; the adapters stand outside."""
    program = tiny_program()
    guide = bound(program, InputAdaptive())
    batch = {name: value[:6] for name, value in whole_batch(program).items()}
    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(poutine.replay(guide.augmented(program), trace=q)).get_trace(batch)
    for trace in (q, p):
        node: Any = trace.nodes[f"{SITE}.multiplier"]
        assert [frame.name for frame in node["cond_indep_stack"]] == ["data"] and float(node["scale"]) == 24 / 6
        assert node["value"].shape == (6, 2)
        outside: Any = trace.nodes[SITE]
        assert "data" not in [frame.name for frame in outside["cond_indep_stack"]]
    assert not guide.random_sites() and guide.local_sites() == [SITE, OTHER]


# -- the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", KINDS)
def test_expected_data_term_is_a_closed_form(noise: str) -> None:
    """Law: on a linear-Gaussian program E_q log p(y | x, A) is the Gaussian's at θ minus s² B diag(d) Bᵀ / 2σ², with
    d = α(x) (θ²)(x²); data − KL is below the evidence of the multipliers' prior."""
    truth = linear_gaussian()
    guide = InputAdaptive(noise=noise, kl="sum", rate=0.4)  # type: ignore[arg-type]
    bound(truth.program, guide)
    x, y = truth.batch["x"], truth.batch["labels"]
    theta = guide.point(truth.program.latents["lora.linear.A"])[0].detach()
    b = guide.point(truth.program.latents["lora.linear.B"])[0].detach()
    base = truth.program.model.get_base_model().linear.base_layer.weight.detach()
    alpha = guide.describe_inputs(truth.batch)["lora.linear.A.alpha"]
    assert alpha.std() > 0.01
    s, bottleneck = 2.0, x.square() @ theta.square().T
    errors = (y - x @ base.T - s * x @ theta.T @ b.T).square() + s**2 * (alpha * bottleneck) @ b.square().T
    exact = (-0.5 * errors / truth.noise**2 - math.log(truth.noise * math.sqrt(2 * math.pi))).sum()
    with isolated(0):
        found = [terms_of(truth.program, guide, truth.batch) for _ in range(200)]
    data = torch.stack([t.data for t in found])
    assert (data.mean() - exact).abs() < 4.5 * data.std() / math.sqrt(200)
    covariance = s**2 * guide.prior_variance * torch.einsum("or,nr,pr->nop", b, bottleneck, b)
    marginal = torch.distributions.MultivariateNormal(x @ base.T, covariance + truth.noise**2 * torch.eye(3))
    assert exact - found[0].kl["lora.linear.A.multiplier"] < marginal.log_prob(y).sum()


@pytest.mark.parametrize("noise", KINDS)
def test_no_noise_is_felt_while_b_is_zero(noise: str) -> None:
    """Law: at B = 0 a sampled pass is the base model's, to the bit; away from it, it is not."""
    program = tiny_program()
    batch = whole_batch(program)
    with torch.no_grad():
        plain = program.likelihood.logits(tiny_bert()(**program.likelihood.forward_inputs(batch)), batch)
        guide = InputAdaptive(noise=noise)  # type: ignore[arg-type]
        guide.bind(program)
        with guide.hooks(program), poutine.block():
            assert torch.equal(program.logits(guide(batch), batch), plain)
        bound(program, guide)
        with guide.hooks(program), poutine.block():
            assert (program.logits(guide(batch), batch) - program.logits(guide.mean(), batch)).abs().min() > 1e-5


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    chosen: dict = {"max_steps": 2, "learning_rate": 3e-2, "per_device_train_batch_size": 8, "disable_tqdm": True}
    chosen |= {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "seed": 0, **changes}
    return TrainingArguments(output_dir=str(folder), **chosen)


@pytest.mark.parametrize("kind", [InputAdaptive, MeanField])
@pytest.mark.parametrize("noise", KINDS)
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_recomputes_the_same_noise(tmp_path: Path, kind: Any, noise: str, bf16: bool) -> None:
    """Law: activation checkpointing changes nothing, with two particles and accumulated gradients, in bfloat16 too."""
    options = arguments(tmp_path, gradient_accumulation_steps=2, bf16=bf16, use_cpu=True)
    ends = []
    for checkpointing in (False, True):
        options.gradient_checkpointing = checkpointing
        ends.append(fit(tiny_program(), kind(noise=noise), args=options, num_particles=2).guide.state_dict())
    plain, saved = ends
    assert all(torch.allclose(plain[name], saved[name], atol=1e-6) for name in plain)
    assert (plain["points.lora/query/B"] != 0).any()


def post_norm_opt() -> PyroLoRA:
    """A layer's attention reads the layer's own argument, and registers keys before values before queries."""
    config = OPTConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=64,
        do_layer_norm_before=False,
        dropout=0.0,
        init_std=0.3,
        pad_token_id=tokenizer().pad_token_id,
    )
    with isolated(0):
        adapter = lora(target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
        return PyroLoRA(OPTForSequenceClassification(config), adapter, priors=PRIORS, task=sentence_task())


@pytest.mark.parametrize("kind", [InputAdaptive, MeanField])
@pytest.mark.parametrize("noise", ["weight", "example", "local", "flipout"])
@pytest.mark.parametrize("make", [tiny_program, post_norm_opt])
def test_each_checkpointed_pass_keeps_its_noise(kind: Any, noise: str, make: Callable[[], PyroLoRA]) -> None:
    """Law: one backward pass through two passes, over batches of two sizes, has the gradients that it has without
    checkpointing, whatever order modules run in; and the guide that was hooked can be copied afterwards."""
    found = []
    for checkpointing in (False, True):
        program = make()
        if checkpointing:
            program.enable_activation_checkpointing()
        with isolated(2):
            guide = bound(program, kind(noise=noise))
        objective, batch = Objective(program, guide, 0.1), whole_batch(program)
        with isolated(7), pytest.raises(KeyError), guide.hooks(program):
            losses = [objective({name: value[:size] for name, value in batch.items()}) for size in (6, 3)]
            sum(losses).backward()  # type: ignore[union-attr]
            raise KeyError
        found.append({name: p.grad for name, p in guide.named_parameters() if p.grad is not None})
        copy.deepcopy(guide)
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_count_the_kl_once(tmp_path: Path) -> None:
    """Law: two batches of four, accumulated, move the network as one of eight does. With B = 0 the labels say nothing
    about it, and its gradient is that of the KL, whose prior is not where q starts."""
    moved = []
    for size, steps in ((8, 1), (4, 2)):
        options = arguments(tmp_path, max_steps=1, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0)
        options.per_device_train_batch_size, options.gradient_accumulation_steps = size, steps
        guide = fit(tiny_program(), InputAdaptive(prior="declared"), args=options).guide
        start = math.log(math.expm1(InputAdaptive().prior_variance))
        moved.append(guide.state_dict()["network.3.bias"] - start)
    assert (moved[0].abs() > 1e-6).all()
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=0)


def test_alpha_is_in_float32_under_autocast() -> None:
    """Law: autocast changes no α."""
    program = tiny_program()
    guide, batch = bound(program, InputAdaptive()), whole_batch(program)
    plain = guide.describe_inputs(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = guide.describe_inputs(batch)
    assert all(torch.equal(automatic[name], plain[name]) for name in plain)


def test_which_draws_are_functions() -> None:
    """Law: a draw is one function of all inputs where one ε serves them all, and only there."""
    assert [kind for kind in KINDS if InputAdaptive(predictive=kind).joint_draws] == ["weight"]


# -- predictions and files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "more"), [("embedding", 0), ("backbone", 1)])
def test_passes_are_counted(features: str, more: int) -> None:
    """Law: a prediction takes a pass for each draw, and features of the backbone one more, α included; that is what
    the guide says."""
    program = tiny_program()
    posterior = Posterior(program, bound(program, InputAdaptive(features=features)))  # type: ignore[arg-type]
    seen: list[int] = []
    encoder = program.model.get_base_model().bert.encoder
    handle = encoder.register_forward_hook(lambda *_: seen.append(1))
    for draws in (4, 0):
        seen.clear()
        assert posterior.predict(sentence_task().test, draws).inputs
        assert len(seen) == posterior.guide.passes(draws, 2) == max(draws, 1) + more
    assert posterior.guide.draws_for(4) == 4
    objective = Objective(program, posterior.guide.train(), num_particles=3)
    with posterior.guide.hooks(program):
        seen.clear()
        objective(whole_batch(program))
    assert len(seen) == 3 + more  # of a step with three particles, whose features are computed once
    handle.remove()


@pytest.mark.parametrize("features", ["embedding", "backbone"])
def test_mean_mode_is_plain_lora(tmp_path: Path, features: str) -> None:
    """Law: without draws the prediction is that of the exported adapter in stock PEFT, to the bit."""
    program = tiny_program()
    posterior = Posterior(program, bound(program, InputAdaptive(features=features)))  # type: ignore[arg-type]
    posterior.export_peft(tmp_path)
    batch = whole_batch(program)
    stock = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).eval()
    with torch.no_grad():
        plain = stock(**program.likelihood.forward_inputs(batch)).logits
        program.model.eval()
        assert torch.equal(program.logits(posterior.mean(), batch), plain)
        merged = stock.merge_and_unload()(**program.likelihood.forward_inputs(batch)).logits
        torch.testing.assert_close(merged, plain, rtol=1e-4, atol=1e-4)
    train = sentence_task().train
    assert torch.allclose(posterior.predict(train, 0, batch_size=24).log_mean, plain.log_softmax(-1), atol=1e-6)
    with pytest.raises(ValueError, match="InputAdaptive: noise of each input fits no adapter file"):
        posterior.export_peft(tmp_path, draw=0)


def test_draws_are_coherent_and_do_not_depend_on_the_batch() -> None:
    """Law: the same seed gives the same draws whatever the batch; more extend fewer; and every draw sees one ε."""
    program = tiny_program()
    posterior = Posterior(program, bound(program, InputAdaptive()).eval())
    data = sentence_task().test
    few, many = (posterior.predict(data, 3, seed=5, batch_size=size).draws for size in (12, 5))
    more = posterior.predict(data, 6, seed=5).draws
    assert few is not None and many is not None and more is not None
    assert torch.allclose(few, many, atol=1e-6) and torch.allclose(few, more[:3], atol=1e-6)
    assert (few[0] - few[1]).abs().max() > 1e-3
    assert (posterior.predict(data, 3, seed=6).draws - few).abs().max() > 1e-3  # type: ignore[operator]
    twice = data.select([0, 0, 0])
    same = posterior.predict(twice, 3).draws
    assert same is not None and torch.allclose(same[:, :1], same, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"prior": "declared", "features": "backbone", "predictive": "local"}])
def test_saved_and_loaded(tmp_path: Path, options: dict) -> None:
    """Law: a posterior from disk predicts the same and knows the same α; the files hold no base weights."""
    program = tiny_program()
    posterior = Posterior(program, bound(program, InputAdaptive(**options)).eval())
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    mine, its = (p.predict(sentence_task().test, 3) for p in (posterior, loaded))
    assert torch.equal(mine.log_mean, its.log_mean)
    assert list(mine.inputs) == [f"{SITE}.alpha", f"{OTHER}.alpha"]
    assert all(torch.equal(mine.inputs[name], its.inputs[name]) for name in mine.inputs)
    size = sum(value.numel() for value in posterior.guide.state_dict().values())
    adapters = sum(site.shape.numel() for site in program.sites.values())
    assert size == adapters + 2 * 16 + 17 * 32 + 33 * 4


# -- what it learns --------------------------------------------------------------------------------------------------


def clear_and_noisy(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of two kinds: the first four features say the label, or the last four are all there is and say nothing."""
    z, noisy = torch.randn(size, 4), torch.rand(size) < 0.5
    x = torch.cat([z * ~noisy[:, None], z * noisy[:, None]], 1)
    probability = torch.where(noisy, 0.5, (z[:, 0] > 0) * 0.96 + 0.02)
    return x, torch.bernoulli(probability).long(), noisy


@pytest.mark.parametrize(("noise", "rate"), [("local", 0.1), ("example", 0.1), ("weight", 0.8)])
def test_alpha_ranks_inputs_by_the_noise_of_their_labels(noise: str, rate: float) -> None:
    """Law: where the noisy labels' features say nothing, α stays at or near the prior's ς, and is less where weights
    matter: its ranking of new inputs agrees with the true noise, AUROC above 0.8."""
    with isolated(1):
        x, y, _ = clear_and_noisy(600)
        lora = LoraConfig(r=2, lora_alpha=4, target_modules=["linear"])
        base = LinearModel(torch.zeros(2, 8))
        program = PyroLoRA(base, lora, priors={"*": Flat()}, likelihood=Categorical(2), num_data=600)
        guide = InputAdaptive(noise=noise, rate=rate)  # type: ignore[arg-type]
        guide.bind(program)
        objective, batch = Objective(program, guide, 0.1), {"x": x, "labels": y}
        optimiser = torch.optim.Adam(guide.parameter_groups(1e-2))
        with guide.hooks(program):
            for _ in range(250):
                optimiser.zero_grad()
                objective(batch).backward()
                optimiser.step()
        new, _, noisy = clear_and_noisy(1000)
    alpha = guide.describe_inputs({"x": new})["lora.linear.A.alpha"][:, 0]
    assert roc_auc_score(noisy, alpha) > 0.8
    assert alpha[~noisy].mean() < 0.95 * alpha[noisy].mean()
    if rate == 0.1:  # noise as large as the default's is felt at noisy labels too
        assert alpha[noisy].mean() == pytest.approx(guide.prior_variance, rel=0.1)


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"rate": 0.0},
        {"rate": 1.0},
        {"hidden": 0},
        {"features": "pixels"},
        {"prior": "flat"},
        {"kl": "max"},
        {"noise": "token"},
        {"predictive": "token"},
        {"scale_learning_rate": 0.0},
    ],
)
def test_bad_arguments_are_refused(options: dict) -> None:
    """Law: an argument that makes no sense stops at construction and names the guide."""
    with pytest.raises(ValueError, match="InputAdaptive: "):
        InputAdaptive(**options)


def test_what_it_cannot_serve_is_refused_at_bind() -> None:
    """Law: a site that is no A, or a declared prior that is no plain Normal, is named with the remedy."""
    with pytest.raises(ValueError, match=r"'lora\.query\.B' is not an A.*random='\*\.A'"):
        InputAdaptive(random="*.B").bind(tiny_program())
    for prior in (Flat(), Hierarchical(0.2)):
        program = tiny_program({"*.A": prior, "*": Normal(0.1)})
        InputAdaptive().bind(program)
        with pytest.raises(ValueError, match=r"'lora\.query\.A': InputAdaptive\(prior='declared'\) needs a Normal"):
            InputAdaptive(prior="declared").bind(program)
