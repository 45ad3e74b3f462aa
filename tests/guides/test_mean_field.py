"""Mean field: its divergences, the size of its first noise, and noise drawn for each example in activation space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to, kl_divergence
from transformers import BertConfig, BertForMultipleChoice, LlamaConfig, LlamaForSequenceClassification

from pyrolora.adapters.sites import SiteGroup
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical, Horseshoe
from pyrolora.priors.matrix_normal import MatrixNormal
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, linear_gaussian, lora, sentence_task, tiny_program

SITE = "lora.query.A"


def bound(program: PyroLoRA, guide: MeanField, *, scale: float | None = None) -> MeanField:
    """The guide away from its start, with standard deviations around ``scale``."""
    guide.bind(program)
    with torch.no_grad(), isolated(4):
        for loc in guide.loc.values():
            loc.add_(0.2 * torch.randn_like(loc))
        for log_scale in guide.log_scale.values():
            if scale is not None:
                log_scale.copy_(math.log(scale) + 0.5 * torch.randn_like(log_scale))
    return guide


def whole_batch(program: PyroLoRA) -> dict[str, Tensor]:
    assert program.task is not None
    return program.task.collate(list(program.task.train))


def run(program: PyroLoRA, guide: MeanField, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    """Logits of one run of the program under the guide's draw, with the guide's hooks on."""
    with torch.no_grad(), isolated(seed), guide.hooks(program), poutine.block():
        return program.logits(guide(batch), batch)


@pytest.mark.parametrize("prior", [Normal(0.3), MatrixNormal(0.3, 0.6)])
def test_kl_is_a_closed_form_and_equals_monte_carlo(prior: Prior) -> None:
    """Law: the KL of a site is the mean of log q − log p over draws, under Normal and matrix Normal priors."""
    program = tiny_program({"lora.*": prior, "head.*": Normal(1.0)})
    guide = bound(program, MeanField(random="*", init_scale=1.0), scale=0.2)
    latent = program.latents[SITE]
    q, p = guide.distribution(latent), prior(program.sites[SITE]).expand([latent.shape[0]])
    with torch.no_grad():
        draws = q.sample((20_000,))
        ratio = q.log_prob(draws) - p.log_prob(draws)
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert ((kl_divergence(q, p) - ratio.mean(0)).abs() < 4.5 * error).all()
    objective = TemperedELBO()
    objective.differentiable_loss(program, guide, whole_batch(program))
    assert objective.terms is not None
    assert objective.terms.kl[SITE] == pytest.approx(kl_divergence(q, p).sum().item(), rel=1e-5)


def test_kl_is_blundells_formula() -> None:
    """Law: KL = Σ ½(σ² + μ²)/σ_p² − ½ − log(σ/σ_p), by hand."""
    program = tiny_program({"*": Normal(0.3)})
    guide = bound(program, MeanField(random="*", init_scale=0.5), scale=0.2)
    objective = TemperedELBO()
    objective.differentiable_loss(program, guide, whole_batch(program))
    assert objective.terms is not None
    for name, value in objective.terms.kl.items():
        mean, scale = guide.loc[name.replace(".", "/")], guide.log_scale[name.replace(".", "/")].exp()
        by_hand = (0.5 * (scale**2 + mean**2) / 0.3**2 - 0.5 - (scale / 0.3).log()).sum()
        assert value == pytest.approx(by_hand.item(), rel=1e-5)


def bounded(site: SiteGroup) -> dist.TorchDistribution:
    """A prior whose hyper-parameters live on the real line and on an interval."""
    shift = pyro.sample(f"{site.name}.shift", dist.Normal(0.0, 1.0))
    weight = pyro.sample(f"{site.name}.weight", dist.Beta(2.0, 3.0).expand([site.num_layers]).to_event(1))
    scale = (weight * shift.exp()).reshape(-1, *[1] * site.event_dim)
    return dist.Normal(0.0, scale).expand(site.shape).to_event(site.event_dim)


@pytest.mark.parametrize("prior", [Hierarchical(0.2), Horseshoe(0.1), bounded])
def test_hyper_parameters_keep_to_their_support(prior: Prior) -> None:
    """Law: hyper-parameters are a Normal on the unconstrained scale, with that change's density."""
    program = tiny_program({"lora.query.B": prior, "*": Normal(0.3)})
    guide = bound(program, MeanField(random="lora.query.*", init_scale=1.0), scale=0.4)
    hypers = [latent for latent in program.latents.values() if latent.group is None]
    assert hypers and all(guide.is_random(latent) for latent in hypers)
    for latent in hypers:
        q, to = guide.distribution(latent), biject_to(latent.support)
        value = q.sample()
        assert value.shape == latent.shape and latent.support.check(value).all()
        free = to.inv(value)
        loc, scale = guide.loc[latent.name.replace(".", "/")], guide.log_scale[latent.name.replace(".", "/")].exp()
        density = (
            torch.distributions.Normal(loc, scale).log_prob(free).sum() - to.log_abs_det_jacobian(free, value).sum()
        )
        assert q.log_prob(value).item() == pytest.approx(density.item(), rel=1e-4, abs=1e-4)
        assert torch.allclose(guide.centre(latent), to(loc))
    objective = TemperedELBO()
    objective.differentiable_loss(program, guide, whole_batch(program)).backward()
    assert all(torch.isfinite(p.grad).all() for p in guide.parameters() if p.grad is not None)


def test_kl_of_a_log_normal_scale_is_a_closed_form() -> None:
    """Law: the KL of a prior scale is the Normals' on the log scale, without Monte Carlo noise."""
    program = tiny_program({"lora.query.B": Hierarchical(0.2, spread=0.8), "*": Normal(0.3)})
    guide = bound(program, MeanField(random="*", init_scale=1.0), scale=0.4)
    name = "lora/query/B/scale"
    q = torch.distributions.Normal(guide.loc[name], guide.log_scale[name].exp())
    by_hand = kl_divergence(q, torch.distributions.Normal(math.log(0.2), 0.8)).sum()
    objective = TemperedELBO()
    for _ in range(2):
        objective.differentiable_loss(program, guide, whole_batch(program))
        assert objective.terms is not None
        assert objective.terms.kl["lora.query.B.scale"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_first_noise_is_a_fraction_of_the_priors() -> None:
    """Law: σ starts at init_scale times the prior's standard deviation, and at 1 the scale's KL is zero."""
    priors: dict[str, Prior] = {"*.A": Normal("fan_in"), "*.B": MatrixNormal(0.1), "head.*": Hierarchical(0.7)}
    program = tiny_program(priors)
    guide = MeanField(random="*", init_scale=0.25)
    guide.bind(program)
    expected = {
        "lora/query/A": 0.25 / math.sqrt(16),
        "lora/query/B": 0.25 * 0.1,
        "head/classifier/weight": 0.25 * 0.7,
        "head/classifier/weight/scale": 0.25,
    }
    for name, value in expected.items():
        assert torch.allclose(guide.log_scale[name].exp(), torch.tensor(value)), name
    whole = MeanField(random="*.B", init_scale=1.0)
    whole.bind(program)
    objective = TemperedELBO()
    objective.differentiable_loss(program, whole, whole_batch(program))
    assert objective.terms is not None
    # PEFT starts B at zero, which is the prior's mean.
    assert objective.terms.kl["lora.query.B"].abs() < 1e-3


def test_scales_learn_at_their_own_rate() -> None:
    """Law: log σ and a prior's own scales have scale_learning_rate times the rate that weights and points have."""
    guide = MeanField(random="*.A", scale_learning_rate=7.0)
    guide.bind(tiny_program({**PRIORS, "*.A": ARD(0.1)}))
    rates = {id(p): group["lr"] for group in guide.parameter_groups(1e-3) for p in group["params"]}
    hypers = {name: loc for name, loc in guide.loc.items() if name.endswith("scale")}
    weights = [loc for name, loc in guide.loc.items() if name not in hypers]
    assert (len(hypers), len(weights), len(guide.points)) == (2, 2, 4)
    assert {rates[id(p)] for p in [*guide.log_scale.values(), *hypers.values()]} == {7.0 * 1e-3}
    assert {rates[id(p)] for p in [*weights, *guide.points.values()]} == {1e-3}


@contextmanager
def recording(program: PyroLoRA, path: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of one module, as they are after hooks that stand there already."""
    seen: list[tuple[Tensor, Tensor]] = []
    module = program.model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    yield seen
    handle.remove()


def test_example_noise_has_the_covariance_of_weight_draws() -> None:
    """Law: noise at lora_A's output has the covariance of brute force over weight draws, within and between tokens."""
    program = tiny_program()
    guide = bound(program, MeanField(random="*.A", noise="example"), scale=0.3).train()
    examples = 4000
    one = {name: value[:1, :4] if value.dim() == 2 else value[:1] for name, value in whole_batch(program).items()}
    batch = {name: value.expand(examples, *value.shape[1:]) for name, value in one.items()}
    path, _ = program.sites[SITE].holders[0]
    with torch.no_grad(), isolated(0), guide.hooks(program), recording(program, path) as seen, poutine.block():
        program.logits(guide(batch), batch)
    x, outputs = seen[0]
    noise = (outputs - x @ guide.loc["lora/query/A"][0].T).detach()
    assert (noise[0] - noise[1]).abs().max() > 0.01

    with torch.no_grad(), isolated(1):
        weights = guide.eval().family(program.latents[SITE]).sample((examples,))[:, 0]
        by_draws = x[0] @ (weights - guide.loc["lora/query/A"][0]).mT
    exact = torch.einsum("kj,tj,uj->tuk", guide.log_scale["lora/query/A"][0].exp() ** 2, x[0], x[0]).detach()
    spread = exact.diagonal(dim1=0, dim2=1).sqrt().T
    for sample in (noise, by_draws):
        covariance = torch.einsum("ntk,nuk->tuk", sample, sample) / examples
        error = spread.unsqueeze(0) * spread.unsqueeze(1) * math.sqrt(2 / examples)
        assert ((covariance - exact).abs() < 5 * error).all()
    # Ranks have noise of their own.
    assert torch.corrcoef(noise[:, 0].T)[0, 1].abs() < 5 / math.sqrt(examples)


def test_tokens_of_one_example_see_one_matrix() -> None:
    """Law: within an example the noisy map is linear, one matrix for all tokens; between examples it differs."""
    program = tiny_program()
    guide = bound(program, MeanField(random="*.A", noise="example"), scale=0.3).train()
    module = program.model.get_submodule(program.sites[SITE].holders[0][0])
    # More tokens than inputs, so that a fit without residual is no accident.
    x = torch.randn(3, 40, 16)
    batch = {name: value[:3] for name, value in whole_batch(program).items()}
    with torch.no_grad(), guide.hooks(program), poutine.block():
        guide(batch)
        outputs = module(x)
    matrices = torch.linalg.lstsq(x, outputs).solution
    assert torch.allclose(x @ matrices, outputs, atol=1e-4)
    assert (matrices[0] - matrices[1]).abs().max() > 0.1


@pytest.mark.parametrize("noise", ["local", "flipout"])
def test_noise_of_each_token_has_the_variance_of_weight_draws(noise: str) -> None:
    """Law: at lora_A's output local and flipout noise have mean zero and variance (σ²)(x²), and no covariance between
    tokens."""
    program = tiny_program()
    guide = bound(program, MeanField(random="*.A", noise=noise), scale=0.3).train()  # type: ignore[arg-type]
    batch = {name: value[:1] for name, value in whole_batch(program).items()}
    path, _ = program.sites[SITE].holders[0]
    draws = 3000
    with torch.no_grad(), isolated(0), guide.hooks(program), recording(program, path) as seen, poutine.block():
        guide(batch)
        for _ in range(draws):
            program.model.get_submodule(path)(X)
    noise_of = torch.stack([output for _, output in seen])
    centred = (noise_of - noise_of.mean(0)).flatten(1)
    exact = (X.square() @ guide.log_scale["lora/query/A"][0].detach().exp().square().T).flatten()
    covariance = centred.T @ centred / draws
    error = (exact[:, None] * exact[None]).sqrt() * math.sqrt(3 / draws)
    assert ((covariance - exact.diag()).abs() < 5 * error).all()


X = torch.randn(3, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("noise", ["example", "local", "flipout"])
@pytest.mark.parametrize("random", ["*", "head.*", "head.*.bias"])
def test_noise_on_heads_and_biases(random: str, noise: str) -> None:
    """Law: a head's weight and bias get noise for each example, which vanishes with σ."""
    program = tiny_program()
    guide = bound(program, MeanField(random=random, noise=noise), scale=0.3).train()  # type: ignore[arg-type]
    one = {name: value[:1] for name, value in whole_batch(program).items()}
    batch = {name: value.expand(16, *value.shape[1:]) for name, value in one.items()}
    logits = run(program, guide, batch)
    # Flipout's signs agree between a few examples by chance, and so does its noise where they read the same.
    assert (logits.max(0).values - logits.min(0).values).max() > 1e-4
    with torch.no_grad():
        for scale in guide.log_scale.values():
            scale.fill_(-40.0)
        assert torch.allclose(run(program, guide, batch), program.logits(guide.mean(), batch), atol=1e-6)


def test_blob_is_a_configuration() -> None:
    """Law: `blob` has σ = G² with G ~ U(ε/√2, ε), ε = 0.05, under N(0, 0.2²) on A, whose KL is the Normals'; flipout
    in training; G learns at the weights' rate; B is a point."""
    program = tiny_program({"*.A": Normal(0.2), "*.B": Flat(), "head.*": Normal(1.0)})
    guide = MeanField.blob()
    guide.bind(program)
    assert guide.noise == "flipout" and guide.random_sites() == ["lora.query.A", "lora.value.A"]
    roots = guide.root_scale["lora/query/A"]
    assert not guide.log_scale and roots.min() >= 0.05 / math.sqrt(2) and roots.max() <= 0.05
    assert roots.mean().item() == pytest.approx(0.05 * (1 + 1 / math.sqrt(2)) / 2, rel=0.03)
    with torch.no_grad():
        roots[0, 0, 0] = -0.3
    sigma = guide.family(program.latents[SITE]).base_dist.scale  # type: ignore[attr-defined]
    assert torch.allclose(sigma, roots.square()) and sigma[0, 0, 0].item() == pytest.approx(0.09)
    objective = TemperedELBO()
    objective.differentiable_loss(program, guide, whole_batch(program))
    own = torch.distributions.Normal(guide.loc["lora/query/A"], roots.square())
    assert objective.terms is not None
    by_hand = kl_divergence(own, torch.distributions.Normal(0.0, 0.2)).sum().item()
    assert objective.terms.kl[SITE] == pytest.approx(by_hand, rel=1e-5)
    rates = {id(p): group["lr"] for group in guide.parameter_groups(1e-3) for p in group["params"]}
    assert {rates[id(p)] for p in guide.parameters()} == {1e-3}


def test_bias_noise_has_its_standard_deviation() -> None:
    """Law: with only the head's bias random, logits have that bias's standard deviations over examples."""
    program = tiny_program()
    guide = bound(program, MeanField(random="head.*.bias", noise="example"), scale=0.3).train()
    one = {name: value[:1] for name, value in whole_batch(program).items()}
    batch = {name: value.expand(4000, *value.shape[1:]) for name, value in one.items()}
    spread = run(program, guide, batch).std(0)
    expected = guide.log_scale["head/classifier/bias"][0].exp()
    assert torch.allclose(spread, expected, rtol=5 / math.sqrt(2 * 4000))


@pytest.mark.parametrize("guide", [MeanField(random="*", noise="example"), MeanField.blob(init_scale=1.0)])
def test_evaluation_draws_are_coherent(guide: MeanField) -> None:
    """Law: in evaluation mode hooks add nothing: the whole batch sees the one draw, also while they are on."""
    program = tiny_program()
    guide = bound(program, guide, scale=0.3).eval()
    with torch.no_grad():
        for point in guide.points.values():  # at B = 0 no draw of A is felt
            point.fill_(0.3)
    one = {name: value[:1] for name, value in whole_batch(program).items()}
    batch = {name: value.expand(3, *value.shape[1:]) for name, value in one.items()}
    logits = run(program, guide, batch)
    assert torch.allclose(logits[0], logits[1], atol=1e-6)
    assert (run(program, guide, batch, seed=1) - logits).abs().max() > 1e-3
    with torch.no_grad(), isolated(0), poutine.block():
        assert torch.equal(program.logits(guide(batch), batch), logits)


def test_hooks_come_off() -> None:
    """Law: after the block the base model has no hook of the guide's, also when the block fails."""
    program = tiny_program()
    guide = bound(program, MeanField(random="*", noise="example"))
    with pytest.raises(KeyError), guide.hooks(program):
        assert any(module._forward_hooks for module in program.model.modules())
        raise KeyError
    assert not any(module._forward_hooks for module in program.model.modules())


def multiple_choice(choices: int = 3) -> tuple[PyroLoRA, dict[str, Tensor]]:
    """A tiny BERT over choices, and a batch in which an example's choices are all the same text."""
    config = BertConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    with isolated(0):
        program = PyroLoRA(
            BertForMultipleChoice(config),
            LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
            priors={"*": Normal(0.3)},
            likelihood=Categorical(choices),
            num_data=4,
        )
        ids = torch.randint(5, 24, (4, 1, 6)).repeat(1, choices, 1)
    return program, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0])}


def test_choices_of_one_example_share_its_noise() -> None:
    """Law: a multiple-choice example is one example: choices with the same text have the same logit."""
    program, batch = multiple_choice()
    guide = bound(program, MeanField(random="*", noise="example"), scale=0.3).train()
    logits = run(program, guide, batch)
    assert torch.allclose(logits, logits[:, :1].expand_as(logits), atol=1e-5)
    same = {name: value[:1].expand_as(value).contiguous() for name, value in batch.items()}
    logits = run(program, guide, same)
    assert (logits[0] - logits[1]).abs().min() > 1e-4


def test_rows_that_belong_to_no_example_are_refused() -> None:
    """Law: where a module's rows cannot be divided among the examples, the error names it and the remedy."""
    program, batch = multiple_choice()
    guide = bound(program, MeanField(random="*", noise="example")).train()
    module = program.model.get_submodule(program.sites[SITE].layers[0].join(["base_model.model.", ""]))
    with torch.no_grad(), guide.hooks(program), poutine.block():
        guide(batch)
        with pytest.raises(ValueError, match=r'attention\.self\.query sees 7 rows for 4 examples.*noise="weight"'):
            module(torch.randn(7, 16))


def test_what_is_not_linear_is_refused_at_bind() -> None:
    """Law: embeddings have no such noise: binding says so, names the module and the remedy."""
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        num_labels=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    program = PyroLoRA(
        LlamaForSequenceClassification(config),
        lora(target_modules=["embed_tokens", "q_proj"]),
        priors={"*": Normal(0.3)},
        likelihood=Categorical(2),
        num_data=4,
    )
    with pytest.raises(ValueError, match=r'lora_embedding_A is not linear.*embed_tokens.A.*noise="weight"'):
        MeanField(random="*", noise="example").bind(program)
    MeanField(random="*q_proj*", noise="example").bind(program)


def test_example_noise_has_less_variance() -> None:
    """Law: noise of each example's own averages out over the batch: gradients of the mean vary less."""
    truth = linear_gaussian(rank=1, outputs=1)
    spread = {}
    for noise in ("weight", "example"):
        guide = MeanField(random="*.A", init_scale=1.0, noise=noise)
        guide.bind(truth.program)
        rows = []
        with isolated(0), guide.hooks(truth.program):
            for _ in range(100):
                loss = TemperedELBO().differentiable_loss(truth.program, guide, truth.batch)
                rows.append(torch.autograd.grad(loss, guide.loc["lora/linear/A"])[0].flatten())
        spread[noise] = torch.stack(rows).std(0)
    assert (spread["example"] < 0.7 * spread["weight"]).all()


@pytest.mark.parametrize(
    "arguments", [{"noise": "token"}, {"parametrisation": "cube"}, {"init_scale": 0.0}, {"scale_learning_rate": -1.0}]
)
def test_bad_arguments_are_refused(arguments: dict) -> None:
    """Law: an argument that makes no sense stops at construction and names the guide."""
    with pytest.raises(ValueError, match="MeanField: "):
        MeanField(random="*", **arguments)


def test_task_batches_fit() -> None:
    """Law: real padded batches run under noise for each example, with finite objective and gradients."""
    program = tiny_program()
    guide = bound(program, MeanField(random="*", noise="example"), scale=0.1)
    batch = sentence_task().collate(list(sentence_task().train))
    with guide.hooks(program):
        TemperedELBO().differentiable_loss(program, guide, batch).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in guide.log_scale.values())
    assert all((p.grad != 0).any() for p in guide.log_scale.values())
