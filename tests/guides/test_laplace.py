"""The Laplace guide: dense truth for its covariance, the exact evidence, limits, files."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyrolora.distributions.diagonal_precision import DiagonalPrecisionNormal
from pyrolora.guides import linearised
from pyrolora.guides.curvature import curvature
from pyrolora.guides.factors import Factors
from pyrolora.guides.laplace import Laplace
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, LinearGaussian, linear_gaussian, sentence_task, tiny_bert, tiny_program


def fitted(program: PyroLoRA | None = None, **options: Any) -> Posterior:
    """Post hoc on weights that were moved at random: no optimiser."""
    program = program or tiny_program()
    with isolated(0), torch.no_grad():
        for name, parameter in program.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    program.latents = program._find_latents()
    return fit(program, Laplace(optimise=False, **{"precision": "marglik", **options}), args=default_arguments())


def precisions(guide: Any) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in guide.named_buffers() if name.startswith("precision")}


def first_batch(program: PyroLoRA, size: int = 5) -> dict[str, Tensor]:
    assert program.task is not None and program.task.test is not None
    return program.task.collate([program.task.test[i] for i in range(size)])


def dense_covariance(posterior: Posterior, batch: dict[str, Tensor]) -> Tensor:
    """``J Σ Jᵀ`` with J by autograd for each example and class, and Σ a dense inverse for each matrix."""
    guide, program = posterior.guide, posterior.program
    assert isinstance(guide, Laplace)
    values = {name: guide.point(latent) for name, latent in guide.latents.items()}
    logits = program.logits(values, batch)
    total = torch.zeros(*logits.shape, logits.shape[-1])
    for latent in guide._wanted_sites():
        q: Any = guide.family(latent)
        rows = [
            [torch.autograd.grad(logits[n, c], values[latent.name], retain_graph=True)[0] for c in range(2)]
            for n in range(len(logits))
        ]
        jacobian = torch.stack([torch.stack(row) for row in rows])  # (n, K, layers, *event)
        if isinstance(q, DiagonalPrecisionNormal):
            scaled = jacobian.flatten(2) * (q.curvature + q.precision[:, None, None]).rsqrt().flatten()
            total += scaled @ scaled.mT
            continue
        if q.transposed:
            jacobian = jacobian.mT
        for layer in range(latent.shape[0]):
            u, beta, rho = q.basis[layer], q.values[layer], q.remainder[layer]
            large = u @ torch.diag(beta - rho) @ u.T + rho * torch.eye(len(u))
            small = q.small_basis[layer] @ torch.diag(q.small_values[layer]) @ q.small_basis[layer].T
            precision = torch.kron(large, small) + q.precision[layer] * torch.eye(large.shape[0] * small.shape[0])
            flat = jacobian[:, :, layer].flatten(-2).double()
            total += (flat @ torch.linalg.inv(precision.double()) @ flat.mT).float()
    return total.detach()


@pytest.mark.parametrize(("structure", "rank"), [("low_rank", 2), ("low_rank", 16), ("dense", 1), ("diagonal", 1)])
@pytest.mark.parametrize("pattern", ["lora.*", "head.*", "lora.query.B"])
def test_linearised_covariance_is_the_dense_one(structure: Any, rank: int, pattern: str) -> None:
    """Law: the covariance of the natural parameters is J P⁻¹ Jᵀ with everything made explicit."""
    posterior = fitted(structure=structure, rank=rank, random=pattern)
    batch = first_batch(posterior.program)
    assert isinstance(posterior.guide, Laplace)
    mean, covariance = posterior.guide.linearised(posterior.program, batch)
    with torch.no_grad():
        assert torch.allclose(mean, posterior.program.logits({}, batch), atol=1e-5)
    expected = dense_covariance(posterior, batch)
    assert torch.allclose(covariance, expected, rtol=2e-3, atol=1e-5 * float(expected.abs().max()))
    assert covariance.diagonal(dim1=-2, dim2=-1).min() > 0


@pytest.mark.parametrize("bytes_", [1, 200_000])
def test_parts_of_a_batch_make_the_whole(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a Jacobian that is too large for memory is made in parts, with the same covariance."""
    posterior = fitted()
    guide: Any = posterior.guide
    batch = first_batch(posterior.program)
    mean, covariance = guide.linearised(posterior.program, batch)
    monkeypatch.setattr(linearised, "JACOBIAN_BYTES", bytes_)
    means, covariances = guide.linearised(posterior.program, batch)
    assert torch.allclose(means, mean, atol=1e-5) and torch.allclose(covariances, covariance, rtol=1e-4)


def test_dense_is_the_low_rank_one_at_full_rank() -> None:
    """Law: with k = n nothing is truncated: the two structures are one posterior."""
    low, full = fitted(rank=16), fitted(structure="dense")
    data = low.program.task.test  # type: ignore[union-attr]
    assert torch.allclose(low.predict(data).log_mean, full.predict(data).log_mean, atol=1e-4)
    assert low.describe()["all"]["log_evidence"] == pytest.approx(full.describe()["all"]["log_evidence"], abs=1e-2)


def linear_laplace(truth: LinearGaussian) -> Laplace:
    """The guide at the exact posterior mean of the linear-Gaussian program."""
    guide = Laplace(random="*.A", rank=4, precision="declared")
    guide.bind(truth.program)
    site = truth.program.sites["lora.linear.A"]
    with torch.no_grad():
        guide.points["lora/linear/A"].copy_(truth.mean.reshape(site.shape))
    values = {name: guide.point(latent) for name, latent in guide.latents.items()}
    rows = [{name: value[i] for name, value in truth.batch.items()} for i in range(20)]
    factors, total = gaussian_curvature(truth, values, rows)
    guide.set_curvature(factors, total)
    guide._choose_precision(truth.program)
    return guide


def gaussian_curvature(
    truth: LinearGaussian, values: dict[str, Tensor], rows: list[dict[str, Tensor]]
) -> tuple[dict[str, Factors], Tensor]:
    import datasets

    class Collating:
        @staticmethod
        def collate(chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
            return {name: torch.stack([torch.as_tensor(row[name]) for row in chosen]) for name in chosen[0]}

    truth.program.task = Collating()  # type: ignore[assignment]
    data = datasets.Dataset.from_list([{name: value.tolist() for name, value in row.items()} for row in rows])
    return curvature(truth.program, values, [truth.program.sites["lora.linear.A"]], data, rank=4)


def test_exact_on_a_linear_gaussian_program() -> None:
    """Law: there the posterior is Gaussian, its curvature a Kronecker product: covariance and evidence are exact."""
    truth = linear_gaussian()
    guide = linear_laplace(truth)
    q: Any = guide.family(truth.program.latents["lora.linear.A"])
    eye = torch.eye(8).reshape(1, 1, 8, 2, 4)
    assert torch.allclose(q.covariance_of(eye)[0, 0], truth.covariance, rtol=1e-3, atol=1e-5)
    assert guide.log_evidence() == pytest.approx(truth.log_evidence, abs=2e-3)


def test_the_tuned_precision_has_the_largest_evidence() -> None:
    """Law: no other λ for a site explains the data better."""
    posterior = fitted(precision="marglik")
    guide: Any = posterior.guide
    best = guide.log_evidence()
    for factor in (0.3, 0.9, 1.1, 3.0):
        for latent in guide._wanted_sites():
            getattr(guide, f"precision:{latent.name.replace('.', '/')}").mul_(factor)
        assert guide.log_evidence() < best
        for latent in guide._wanted_sites():
            getattr(guide, f"precision:{latent.name.replace('.', '/')}").div_(factor)


def test_an_infinite_precision_is_map() -> None:
    """Law: as λ → ∞ the predictive is the point estimate's."""
    posterior = fitted()
    data = posterior.program.task.test  # type: ignore[union-attr]
    spread = posterior.predict(data).log_mean - posterior.predict(data, 0).log_mean
    assert spread.abs().max() > 1e-3
    for name, buffer in posterior.guide.named_buffers():
        if name.startswith("precision"):
            buffer.fill_(1e12)
    assert torch.allclose(posterior.predict(data).log_mean, posterior.predict(data, 0).log_mean, atol=1e-4)


@pytest.mark.parametrize("predictive", ["linearised", "probit"])
def test_predictive_averages_the_softmax(predictive: str) -> None:
    """Law: the mean of softmax over N(f*, C), by many ordinary draws; probit is within its known error."""
    posterior = fitted(predictive=predictive)
    program = posterior.program
    guide: Any = posterior.guide
    assert guide.passes(16, 2) == 3 and guide.passes(0, 2) == 1  # one forward, and a backward for each class
    mean, covariance = guide.linearised(program, first_batch(program, 12))
    with isolated(0):
        draws = torch.distributions.MultivariateNormal(mean, covariance + 1e-6 * torch.eye(2)).sample((40_000,))
    expected = draws.softmax(-1).mean(0)
    own = posterior.predict(program.task.test).log_mean.exp()  # type: ignore[union-attr]
    assert torch.allclose(own.float(), expected, atol=0.005 if predictive == "linearised" else 0.02)


def test_joint_draws_are_linear_in_one_draw_of_the_weights() -> None:
    """Law: f*(x) + J(x)(θ_s − θ*) by autograd, one θ_s for all inputs; their covariance is the linearised one."""
    posterior = fitted(predictive="joint")
    guide, program = posterior.guide, posterior.program
    assert isinstance(guide, Laplace) and guide.passes(16, 2) == 3
    batch = first_batch(program)
    noise = guide._noise(3, seed=5)
    found = guide._joint(program, batch, noise)
    values = {name: guide.point(latent) for name, latent in guide.latents.items()}
    logits = program.logits(values, batch)
    for n, c in ((0, 0), (3, 1)):
        gradients = torch.autograd.grad(logits[n, c], [values[name] for name in noise], retain_graph=True)
        moved = [sum((g * noise[name][s]).sum() for g, name in zip(gradients, noise, strict=True)) for s in range(3)]
        assert torch.allclose(found[:, n, c], logits[n, c].detach() + torch.stack(moved), atol=1e-4)  # type: ignore[arg-type]
    mean, covariance = guide.linearised(program, batch)
    many = guide._joint(program, batch, guide._noise(4000, seed=0)) - mean
    found = torch.einsum("sni,snj->nij", many, many) / 4000
    assert (found - covariance).abs().max() < 0.1 * covariance.abs().max()


def test_joint_predictions_do_not_depend_on_batches() -> None:
    """Law: the same seed gives every input the same draw of the weights, whatever stands beside it."""
    posterior = fitted(predictive="joint")
    data = posterior.program.task.test  # type: ignore[union-attr]
    whole, parts = posterior.predict(data, 6), posterior.predict(data, 6, batch_size=5)
    assert whole.draws is not None and parts.draws is not None and len(whole.draws) == 6
    assert torch.allclose(whole.draws, parts.draws, atol=1e-5)
    assert not torch.equal(posterior.predict(data, 6, seed=1).log_mean, whole.log_mean)
    more = posterior.predict(data, 8)
    assert more.draws is not None and torch.allclose(more.draws[:6], whole.draws, atol=1e-5)


def test_a_fixed_precision() -> None:
    """Law: a number is λ itself, of every matrix."""
    guide: Any = fitted(precision=7.0).guide
    assert all((b == 7.0).all() for name, b in guide.named_buffers() if name.startswith("precision"))


def test_validation_chooses_what_predicts_it_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: no other factor on the evidence's λ has a smaller NLL on the validation split, by prediction itself."""
    program = tiny_program()
    assert program.task is not None and program.task.test is not None
    monkeypatch.setattr(program.task, "validation", program.task.test)  # of a task that other tests share
    arguments = default_arguments()
    arguments.max_steps = 20
    arguments.learning_rate = 1e-2
    posterior = fit(program, Laplace(precision="val_nll", rank=4), args=arguments)
    guide: Any = posterior.guide
    chosen = precisions(guide)
    guide.tune(program, precision="marglik")
    evidence = precisions(guide)

    def nll(base: dict[str, Tensor], factor: float = 1.0) -> float:
        for name, value in base.items():
            guide.get_buffer(name).copy_(value * factor)
        prediction = posterior.predict(program.task.test)  # type: ignore[union-attr]
        return float(-prediction.log_mean.gather(1, prediction.labels.unsqueeze(1)).mean())  # type: ignore[union-attr]

    best = nll(chosen)
    assert best < nll(evidence) - 1e-3
    assert all(best <= nll(evidence, 10.0**e) + 1e-4 for e in (-3, -2, -1, -0.5, -0.25, 0.25, 0.5, 1, 2, 3))
    monkeypatch.setattr(program.task, "validation", None)
    with pytest.raises(ValueError, match="needs a validation split"):
        guide.tune(program, precision="val_nll")


@pytest.mark.parametrize("validation", [True, False])
def test_by_default_validation_decides_where_there_is_any(validation: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: "auto" is "val_nll" for classes with a validation split, and "marglik" without one."""
    program = tiny_program()
    assert program.task is not None
    monkeypatch.setattr(program.task, "validation", program.task.test if validation else None)
    guide: Any = fitted(program, rank=4, precision=Laplace().precision).guide
    chosen = precisions(guide)
    found = {}
    for precision in ("marglik", "val_nll") if validation else ("marglik",):
        guide.tune(program, precision=precision)
        found[precision] = precisions(guide)
    own, *others = found.values() if not validation else reversed(found.values())
    assert guide.saw_validation(program) == validation  # the last of the two
    assert all(torch.equal(chosen[name], own[name]) for name in chosen)
    assert not any(torch.equal(chosen[name], other[name]) for other in others for name in chosen)


def test_tuning_again_needs_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: another λ comes from the same factors: as if it had been asked for at once, without a forward pass."""
    posterior, other = fitted(precision=1.0), fitted(precision="marglik", scope="layer")
    monkeypatch.setattr(PyroLoRA, "logits", None)
    guide: Any = posterior.guide
    guide.tune(posterior.program, precision="marglik", scope="layer")
    for (name, mine), (_, its) in zip(guide.named_buffers(), other.guide.named_buffers(), strict=True):
        assert torch.allclose(mine, its), name


def test_without_curvature_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Law: what needs a curvature says that there is none, and how to get one; predictions say that they are MAP's."""
    program = tiny_program()
    guide = Laplace()
    guide.bind(program)
    for call in (lambda: guide.linearised(program, {}), lambda: guide.tune(program), guide.log_evidence):
        with pytest.raises(RuntimeError, match=r"no curvature yet: fit it"):
            call()
    with caplog.at_level(logging.WARNING, "pyrolora"):
        assert guide.natural_parameters(program, 4) is None
    assert "its predictions are the point estimate's" in caplog.text


def test_weights_that_changed_are_refused() -> None:
    """Law: the curvature belongs to the weights it was taken at; other weights are an error, not a wrong answer."""
    posterior = fitted()
    with torch.no_grad():
        next(iter(posterior.guide.points.values())).view(-1)[0] += 0.1  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="weights changed after its curvature was taken"):
        posterior.predict(posterior.program.task.test)  # type: ignore[union-attr]


def test_before_the_curvature_it_is_map() -> None:
    """Law: unfitted, no site is random, and nothing is described."""
    program = tiny_program()
    guide = Laplace()
    guide.bind(program)
    assert guide.random_sites() == [] and guide.describe() == {}
    assert guide.natural_parameters(program, 4) is None


def test_optimises_first() -> None:
    """Law: fit runs MAP, then the curvature at its optimum; the mean is MAP's."""
    arguments = default_arguments()
    arguments.max_steps = 5
    posterior = fit(tiny_program(), Laplace(), args=arguments)
    assert posterior.history and set(posterior.guide.random_sites()) == {
        name for name in posterior.program.sites if name.startswith("lora")
    }
    assert math.isfinite(posterior.describe()["all"]["log_evidence"])


def test_files_hold_it(tmp_path: Path) -> None:
    """Law: saved and loaded, the predictive and the evidence are the same to the bit."""
    posterior = fitted()
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path, tiny_bert(), task=sentence_task())
    data = sentence_task().test
    assert data is not None
    assert torch.equal(loaded.predict(data).log_mean, posterior.predict(data).log_mean)
    assert loaded.describe()["all"] == posterior.describe()["all"]


def test_draws_of_weights_come_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Law: weight-space prediction is offered and warned of."""
    with caplog.at_level(logging.WARNING, "pyrolora"):
        posterior = fitted(predictive="weights")
        posterior.predict(posterior.program.task.test, 4)  # type: ignore[union-attr]
    assert "the noise of A times that of B is not small" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "all"}, "tokens is one of reduce, expand, last, whole, not 'all'"),
        ({"rank": 0}, "at least 1"),
        ({"structure": "full"}, "structure is one of low_rank, dense, diagonal"),
        ({"precision": -1.0}, "positive, not -1.0"),
        ({"precision": "evidence"}, "precision is one of auto, marglik, val_nll, declared"),
        ({"random": "lora.key.*"}, "matches no matrix; the sites are lora.query.A"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    """Law: the error says what is allowed."""
    with pytest.raises(ValueError, match=message):
        Laplace(**options).bind(tiny_program())


def test_a_declared_precision_needs_a_declared_prior() -> None:
    """Law: precision='declared' takes 1/s²; under a flat prior it is refused, by site."""
    guide: Any = fitted(tiny_program(PRIORS), precision="declared").guide
    assert torch.allclose(getattr(guide, "precision:lora/query/B"), torch.tensor(100.0))
    with pytest.raises(ValueError, match=r"site 'lora\.query\.A' has a flat prior"):
        fitted(tiny_program({"*.A": Flat(), "*": Normal(0.1)}), precision="declared")
