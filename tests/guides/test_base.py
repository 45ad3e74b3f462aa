"""The guide contract's own rules: which sites are random, what a point estimate is, and a guide of one's own."""

from __future__ import annotations

import contextlib
import math

import pyro.distributions as dist
import pytest
import torch
from peft import LoraConfig
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import ReshapeTransform, kl_divergence

from pyrolora.adapters.noise import Change, changed_outputs
from pyrolora.guides.base import Guide, key, matches, unconstrained
from pyrolora.guides.dropout import Dropout
from pyrolora.guides.ensemble import Ensemble
from pyrolora.guides.features import frozen_features
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.hierarchical import ARD, Hierarchical
from pyrolora.priors.normal import Normal
from pyrolora.program import Batch, Latent, PyroLoRA
from tests.contracts import test_guides as contract
from tests.programs import LinearModel, linear_gaussian, lora, sentence_task, tiny_program

MIXED: dict[str, Prior] = {
    "lora.query.B": ARD(0.1),
    "lora.value.A": Flat(),
    "lora.*": Normal(0.2),
    "*": Hierarchical(1.0),
}


class FullCovariance(Guide):
    """One Normal over all weights of a site's layer, with a full covariance: a guide as a user would write it."""

    def __init__(self, *, random: str = "*", init_scale: float = 0.1):
        super().__init__(random=random)
        self.init_scale = init_scale
        self.loc = nn.ParameterDict()
        self.factor = nn.ParameterDict()

    def initialise(self, latent: Latent) -> None:
        layers = latent.shape[0] if latent.plate else 1
        loc = unconstrained(latent).reshape(layers, -1)
        self.loc[key(latent)] = nn.Parameter(loc)
        start = math.log(self.init_scale) * torch.eye(loc.shape[1])
        self.factor[key(latent)] = nn.Parameter(start.repeat(layers, 1, 1))

    def family(self, latent: Latent) -> dist.TorchDistribution:
        event = latent.shape[len(latent.shape) - latent.event_dim :]
        loc, raw = self.loc[key(latent)], self.factor[key(latent)]
        factor = raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()
        flat = dist.MultivariateNormal(loc, scale_tril=factor)
        return dist.TransformedDistribution(flat, [ReshapeTransform(loc.shape[1:], event)])

    def centre(self, latent: Latent) -> Tensor:
        return self.loc[key(latent)].reshape(latent.shape)


class SharedScale(Guide):
    """``N(μ_ij, σ²)`` with one σ for a whole site."""

    def initialise(self, latent: Latent) -> None:
        self.register_parameter(key(latent), nn.Parameter(unconstrained(latent)))
        self.register_parameter(f"{key(latent)}/scale", nn.Parameter(torch.tensor(math.log(0.1 * latent.prior_scale))))

    def family(self, latent: Latent) -> dist.TorchDistribution:
        scale = self.get_parameter(f"{key(latent)}/scale").exp()
        return dist.Normal(self.get_parameter(key(latent)), scale).to_event(latent.event_dim)

    def centre(self, latent: Latent) -> Tensor:
        return self.get_parameter(key(latent))


def bound(guide: Guide, program: PyroLoRA) -> Guide:
    guide.bind(program)
    return guide


def regression(scale: float | None = None) -> PyroLoRA:
    return PyroLoRA(
        LinearModel(torch.randn(3, 4)),
        LoraConfig(r=2, target_modules=["linear"]),
        priors={"*": Normal(0.5)},
        likelihood=NormalLikelihood(scale, prior_loc=math.log(0.3)),
        num_data=20,
    )


# -- which sites are random ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("random", "expected"),
    [
        ("*", {"lora.query.A", "lora.query.B", "lora.value.A", "lora.value.B", "head.classifier.weight"}),
        ("*.A", {"lora.query.A", "lora.value.A"}),
        (["*.query.*", "head.*.weight"], {"lora.query.A", "lora.query.B", "head.classifier.weight"}),
        (("lora.value.B",), {"lora.value.B"}),
        ((), set()),
    ],
)
def test_patterns_choose_the_random_sites(random: str | list[str], expected: set[str]) -> None:
    """Law: a pattern, or any of several, makes a site random; the rest are points with a parameter each."""
    program = tiny_program()
    guide = bound(MeanField(random=random), program)
    bias = {"head.classifier.bias"} if random == "*" else set()
    assert set(guide.random_sites()) == expected | bias
    assert {name.replace("/", ".") for name in guide.points} == set(program.latents) - expected - bias
    trace = poutine.trace(guide).get_trace()
    for name, latent in program.latents.items():
        assert isinstance(trace.nodes[name]["fn"], dist.Delta) != guide.is_random(latent)


@pytest.mark.parametrize("random", ["*.C", ["*.A", "lora.key.*"], "lora.query"])
def test_a_pattern_without_a_site_is_an_error(random: str | list[str]) -> None:
    """Law: a typo stops at bind, names the pattern and lists the sites."""
    wrong = random if isinstance(random, str) else random[1]
    with pytest.raises(ValueError, match=rf"random='{wrong.replace('*', '.')}' matches no site.*lora\.query\.A, lora"):
        bound(MeanField(random=random), tiny_program())


def test_flat_sites_are_never_random() -> None:
    """Law: a site with an improper prior is a point; a pattern that matches such sites alone is an error."""
    program = tiny_program(MIXED)
    guide = bound(MeanField(random="*"), program)
    assert "lora.value.A" not in guide.random_sites()
    assert "lora/value/A" in guide.points
    with pytest.raises(
        ValueError, match=r"random='\*value\.A' matches only site\(s\) that cannot be random: lora\.value"
    ):
        bound(MeanField(random=["*.B", "*value.A"]), program)
    with pytest.raises(ValueError, match=r"priors\.Flat.*or use MAP"):
        bound(MeanField(random="*.A"), tiny_program({"*": Flat()}))
    assert bound(MeanField(random="*"), tiny_program({"*": Flat()})).random_sites() == []


def test_hyper_parameters_follow_their_weights() -> None:
    """Law: a hyper-parameter is random where its weights are; elsewhere it stays at its median, without a parameter."""
    program = tiny_program(MIXED)
    guide = bound(MeanField(random="lora.*"), program)
    random, names = guide.random_sites(), set(dict(guide.named_parameters()))
    assert {"lora.query.B", "lora.query.B.scale"} <= set(random)
    assert not any(name.startswith("head.") for name in random)
    assert "log_scale.lora/query/B/scale" in names
    assert "points.head/classifier/weight" in names
    assert not any("head/classifier/weight/scale" in name for name in names)
    held = guide().get("head.classifier.weight.scale")
    assert held is not None and torch.allclose(held, torch.ones(1))
    assert (guide()["lora.query.B.scale"] > 0).all()
    assert (guide()["lora.query.B.scale"] != guide()["lora.query.B.scale"]).all()
    # A pattern cannot make them random by themselves.
    with pytest.raises(ValueError, match="a hyper-parameter is random where its weights are"):
        bound(MeanField(random=["*.A", "*.scale"]), program)


@pytest.mark.parametrize("guide", [MAP(), MeanField(random="*.A"), MeanField(random="*", init_scale=0.1)])
def test_likelihood_parameters(guide: Guide) -> None:
    """Law: the likelihood's own scale is a learned point, and random where the pattern says so."""
    program = regression()
    bound(guide, program)
    assert ("likelihood.scale" in guide.random_sites()) == (guide.random == "*")
    batch = {"x": torch.randn(20, 4), "labels": torch.randn(20, 3)}
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.05)
    start = guide.mean()["likelihood.scale"].item()
    assert start == pytest.approx(0.3)
    for _ in range(150):
        optimiser.zero_grad()
        TemperedELBO().differentiable_loss(program, guide, batch).backward()
        optimiser.step()
    # The labels are unit noise that owes nothing to the base model: the scale leaves its start for theirs.
    assert 0.8 < guide.mean()["likelihood.scale"].item() < 3.0


# -- points ----------------------------------------------------------------------------------------------------------


def test_points_stay_in_their_support() -> None:
    """Law: a point estimate is optimised on the unconstrained scale: a positive one stays positive."""
    guide = bound(MAP(), regression())
    with torch.no_grad():
        guide.points["likelihood/scale"].fill_(-5.0)
    assert guide.mean()["likelihood.scale"].item() == pytest.approx(math.exp(-5), rel=1e-5)
    assert guide()["likelihood.scale"].item() == pytest.approx(math.exp(-5), rel=1e-5)


def test_unconstrained_is_a_fresh_tensor() -> None:
    """Law: parameters start from copies: moving them moves neither the program nor the base model."""
    program = tiny_program()
    latent = program.latents["lora.query.A"]
    value = unconstrained(latent)
    assert torch.equal(value, latent.start) and value.data_ptr() != latent.start.data_ptr()
    guide = bound(MAP(), program)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    assert torch.equal(program.placement.current()["lora.query.A"], value)
    assert torch.equal(latent.start, value)


def test_names() -> None:
    """Law: site names become parameter names without dots; patterns match whole names."""
    latent = tiny_program().latents["lora.query.A"]
    assert key(latent) == "lora/query/A"
    assert matches("lora.query.A", "*.A") and matches("lora.query.A", ["x", "lora.*"])
    assert not matches("lora.query.A", "query") and not matches("lora.query.A", ())
    assert not matches("lora.query.A", "*.a")


def test_binding_again_starts_afresh() -> None:
    """Law: a guide bound to a second program has that program's parameters only."""
    guide = bound(MeanField(random="*"), tiny_program())
    bound(guide, regression())
    names = {name.split(".", 1)[1] for name, _ in guide.named_parameters()}
    assert names == {"lora/linear/A", "lora/linear/B", "likelihood/scale"}


# -- a guide of one's own --------------------------------------------------------------------------------------------


def test_without_a_family_it_says_what_is_missing() -> None:
    """Law: a guide that makes a site random without a family stops at bind, names the site and the methods."""
    with pytest.raises(
        TypeError, match=r"Guide makes 'lora\.query\.A' random: it must implement initialise, family and"
    ):
        bound(Guide(random="*"), tiny_program())

    class Half(Guide):
        def initialise(self, latent: Latent) -> None:
            self.points[key(latent)] = nn.Parameter(unconstrained(latent))

    half = bound(Half(random="*.B"), tiny_program())
    with pytest.raises(TypeError, match=r"Half makes 'lora\.query\.B' random"):
        half()
    with pytest.raises(TypeError, match=r"Half makes 'lora\.query\.B' random"):
        half.mean()


class Gates(Guide):
    """An amortised guide: a factor of each layer's bottleneck for each example, ``h ↦ h exp(g)``, ``g ~ N(0, s²)``."""

    def __init__(self, *, scale: float = 0.5):
        super().__init__(random=())
        self.scale = scale

    def bind(self, program: PyroLoRA) -> None:
        super().bind(program)
        self.features, width = frozen_features(program, "embedding")
        self.network = nn.Linear(width, 4)

    def local_sites(self) -> list[str]:
        return ["lora.query.A"]

    def local_prior(self, batch: Batch) -> dict[str, dist.TorchDistribution]:
        return {"lora.query.A.gate": dist.Normal(0.0, self.scale).expand([len(batch["labels"]), 2]).to_event(1)}

    def local_family(self, batch: Batch) -> dict[str, dist.TorchDistribution]:
        loc, log_scale = self.network(self.features(batch)).chunk(2, -1)
        return {"lora.query.A.gate": dist.Normal(loc, log_scale.exp()).to_event(1)}

    def hooks(self, program: PyroLoRA) -> contextlib.AbstractContextManager:
        def change(layer: int) -> Change:
            return lambda x, h: h * program.running["lora.query.A.gate"][:, layer, None, None].exp()

        paths = [path for path, _ in program.sites["lora.query.A"].holders]
        return changed_outputs(program.model, [(path, change(layer)) for layer, path in enumerate(paths)])


def gated() -> tuple[PyroLoRA, Gates, dict[str, Tensor]]:
    program = tiny_program()
    guide = Gates()
    with torch.no_grad(), isolated(0):
        guide.bind(program)
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert program.task is not None
    return program, guide, program.task.collate(list(program.task.train.select(range(6))))


LAWS = [
    contract.test_samples_each_site_once_with_its_shape,
    contract.test_returns_what_it_sampled,
    contract.test_the_model_really_runs,
    contract.test_every_parameter_gets_a_gradient,
    contract.test_parameter_groups_cover_every_parameter_once,
    contract.test_same_seed_same_draws,
    contract.test_state_round_trip,
    contract.test_binding_and_evaluating_leave_the_base_model_bitwise,
    contract.test_starts_at_the_adapter_that_peft_holds,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize("guide", [FullCovariance, SharedScale, Gates])
def test_ones_own_guide_meets_the_contract(guide: type[Guide], law: object) -> None:
    """Law: a guide of three short methods meets every law that the package's guides meet."""
    law(guide(), tiny_program())  # type: ignore[operator]


def test_ones_own_guide_predicts() -> None:
    """Law: everything downstream takes any guide: predictions run and vary between draws."""
    program = tiny_program()
    posterior = Posterior(program, bound(SharedScale(random="*"), program))
    prediction = posterior.predict(sentence_task().test, 4)
    assert prediction.num_draws == 4 and (prediction.variance > 0).any()


def test_local_latents_count_for_each_example() -> None:
    """Law: the KL of local latent variables is torch's, summed over the minibatch and scaled N/b; a gate conditioned
    on acts on its own example and layer alone, as if the bottleneck were multiplied by hand."""
    program, guide, batch = gated()
    objective = TemperedELBO()
    with guide.hooks(program):
        objective.differentiable_loss(guide.augmented(program), guide, batch)
    q, p = guide.local_family(batch)["lora.query.A.gate"], guide.local_prior(batch)["lora.query.A.gate"]
    assert objective.terms is not None
    by_hand = kl_divergence(q, p).sum() * 24 / 6
    assert objective.terms.kl["lora.query.A.gate"].item() == pytest.approx(by_hand.item(), rel=1e-5)

    gate = torch.zeros(6, 2)
    gate[1, 0] = 1.0
    model = poutine.condition(guide.augmented(program), data={**guide.mean(), "lora.query.A.gate": gate})
    with guide.hooks(program), torch.no_grad():
        found = model(batch)
    plain = program.logits(guide.mean(), batch)
    scaled = {**guide.mean(), "lora.query.A": guide.mean()["lora.query.A"].clone()}
    scaled["lora.query.A"][0] *= math.e
    assert torch.allclose(found[1], program.logits(scaled, batch)[1], atol=1e-5)
    others = [0, 2, 3, 4, 5]
    assert torch.allclose(found[others], plain[others], atol=1e-5) and (found[1] - plain[1]).abs().max() > 1e-3


def test_recomputation_sees_the_same_local_latents() -> None:
    """Law: with two particles, whose gates differ, gradients under activation checkpointing are those without."""
    rows = []
    for checkpointing in (False, True):
        program, guide, batch = gated()
        if checkpointing:
            program.enable_activation_checkpointing()
        program.model.train()
        with isolated(0), guide.hooks(program):
            TemperedELBO(num_particles=2).differentiable_loss(guide.augmented(program), guide, batch).backward()
        rows.append([p.grad for p in guide.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*rows, strict=True))
    assert all(grad.abs().max() > 0 for grad in rows[0])


def test_local_latents_are_drawn_for_predictions() -> None:
    """Law: predictions average passes under the hooks, the first of more draws being those of fewer; without draws, and
    without a batch, there are no local latents."""
    program, guide, _ = gated()
    posterior = Posterior(program, guide)
    few, many = (posterior.predict(sentence_task().test, s).draws for s in (2, 4))
    assert few is not None and many is not None
    assert torch.allclose(few, many[:2], atol=1e-6) and (many.std(0) > 0).any()
    assert guide.passes(4, 2) == 4 and guide.passes(0, 2) == 1
    assert list(guide()) == list(program.latents)
    none = posterior.predict(sentence_task().test, 0)
    assert none.num_draws == 1 and none.inputs == {}


def test_full_covariance_is_the_exact_posterior() -> None:
    """Law: a family that contains a correlated posterior has log p(y, θ) − log q(θ) = log p(y) at every draw."""
    truth = linear_gaussian()
    guide = FullCovariance(random="*.A")
    guide.bind(truth.program)
    with torch.no_grad():
        guide.loc["lora/linear/A"].copy_(truth.mean.unsqueeze(0))
        factor = torch.linalg.cholesky(truth.covariance)
        guide.factor["lora/linear/A"].copy_(factor.tril(-1) + factor.diagonal().log().diag())
        for loss in (TemperedELBO().differentiable_loss, Trace_ELBO().loss):
            values = [-float(loss(truth.program, guide, truth.batch)) for _ in range(3)]
            assert values == pytest.approx([truth.log_evidence] * 3, abs=2e-3)


def test_hooks_and_second_stage_are_optional() -> None:
    """Law: by default a guide puts nothing on the base model and has no second stage."""
    program = tiny_program()
    guide = bound(MAP(), program)
    assert isinstance(guide.hooks(program), contextlib.nullcontext)
    state = {name: p.clone() for name, p in guide.named_parameters()}
    assert program.task is not None and program.task.train is not None
    guide.post_fit(program, program.task.train)
    assert guide.augmented(program) is program and guide.natural_parameters(program, 4) is None
    assert all(torch.equal(p, state[name]) for name, p in guide.named_parameters())


def test_what_averages() -> None:
    """Law: a point estimate's prediction averages over nothing; draws, noise of each input, masks, members do."""
    expected = {
        MAP(): False,
        Ensemble(MAP(), size=1): False,
        Ensemble(MAP(), size=2): True,
        MeanField(): True,
        InputAdaptive(): True,
        Laplace(): False,  # MAP before it has its curvature
        Dropout(): True,
    }
    for guide, averages in expected.items():
        guide.bind(tiny_program(adapter=lora(lora_dropout=0.1)))
        assert guide.averages == averages, guide
