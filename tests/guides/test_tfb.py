"""Training-free Bayesianisation: the rotation, the bisection, and the posterior that comes of them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

from pyrolora.guides.tfb import TFB, largest, rotation
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA, evaluating
from tests.programs import PRIORS, sentence_task, tiny_bert, tiny_program


def trained(tmp_path: Path) -> PyroLoRA:
    """A program on an adapter that PEFT saved, B not zero."""
    program = tiny_program()
    with torch.no_grad(), isolated(5):
        for site in program.sites.values():
            for path, parameter in site.holders:
                value = program.model.get_submodule(path)._parameters[parameter]
                value.add_(0.4 * torch.randn_like(value))
    program.model.save_pretrained(str(tmp_path / "adapter"))
    return PyroLoRA(tiny_bert(), tmp_path / "adapter", priors=PRIORS, task=sentence_task())


def test_the_rotation_leaves_the_update_unchanged() -> None:
    """Law: (U diag d)(Vᵀ A) = B A, U and V orthogonal, also where B has lost rank."""
    with isolated(0):
        a, b = torch.randn(3, 4, 9), torch.randn(3, 6, 4)
    u, d, v = rotation(b)
    assert torch.allclose((u * d.unsqueeze(-2)) @ (v.mT @ a), b @ a, atol=1e-5)
    assert torch.allclose(u.mT @ u, torch.eye(4).expand(3, 4, 4), atol=1e-5)
    b[1, :, 3] = b[1, :, 2]
    u, d, v = rotation(b)
    assert (d[1, 3] / d[1, 0]).item() == pytest.approx(1e-4, rel=1e-3)
    assert torch.allclose((u * d.unsqueeze(-2)) @ (v.mT @ a), b @ a, atol=2e-3)
    with pytest.raises(ValueError, match="B of a layer is zero"):
        rotation(torch.zeros(2, 5, 2))


def test_noise_is_inverse_to_the_singular_values(tmp_path: Path) -> None:
    """Law: in rotated coordinates std(A'_ij) = σ_q/d_i, independent; B' times it has one size."""
    guide = TFB()
    guide.bind(trained(tmp_path))
    guide.get_buffer("found")[0] = 0.3
    latent = guide.latents["lora.query.A"]
    _, d, v = rotation(guide.points["lora/query/B"].detach())
    scale = guide.unit_scale(latent)
    assert torch.equal(scale, scale.tril()) and bool((scale.diagonal(dim1=-2, dim2=-1) > 0).all())
    rotated = v.mT @ scale @ scale.mT @ v
    assert torch.allclose(rotated, torch.diag_embed(d**-2), rtol=1e-3, atol=1e-3)
    with isolated(1):
        draws = torch.stack([guide()["lora.query.A"] for _ in range(2000)]).detach()
    spread = (v.mT @ (draws - guide.centre(latent).detach())).std(0)
    assert torch.allclose(spread, (0.3 / d).unsqueeze(-1).expand_as(spread), rtol=0.1)


@pytest.mark.parametrize(("bound", "start"), [(0.37, 1e-3), (41.0, 1e-3), (2e-5, 1e-3)])
def test_bisection_finds_the_largest_admissible(bound: float, start: float) -> None:
    """Law: what is returned is admissible, and a relative precision above it nothing is."""
    found = largest(lambda x: x <= bound, precision=0.01, start=start)
    assert found <= bound < found * 1.01 + 1e-12
    with pytest.raises(ValueError, match="no noise is small enough"):
        largest(lambda x: False, precision=0.01)


def test_where_everything_is_admissible_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Law: doubling stops at a bound with a warning."""
    with caplog.at_level(logging.WARNING, logger="pyrolora"):
        assert largest(lambda x: True, precision=0.01) > 1e3
    assert "changes nothing" in caplog.text


def test_sigma_is_the_largest_that_the_anchor_data_bear(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Law: |NLL(σ_q) − NLL(0)|/NLL(0) ≤ 0.3 %, and more at σ_q (1 + precision); both are logged, weights unchanged."""
    program = trained(tmp_path)
    guide = TFB(num_draws=4)
    with caplog.at_level(logging.INFO, logger="pyrolora"):
        posterior = fit(program, guide)
    fitted = posterior.guide
    assert isinstance(fitted, TFB)
    row = fitted.describe()["all"]
    assert f"σ_q = {row['sigma']:.4g}" in caplog.text and f"{row['anchor_nll']:.4f} without" in caplog.text
    noise = {}
    with isolated(0):  # the fit's own seed: the same noise
        again = TFB(num_draws=4)
        again.bind(program)
        noise = again._noise()
    with evaluating(program.model), torch.no_grad():
        nll = [again._nll(program, program.task.train, noise, x * row["sigma"]) for x in (0.0, 1.0, 1.01)]
    assert nll[0] == pytest.approx(row["anchor_nll"]) and nll[1] == pytest.approx(row["anchor_nll_noisy"], rel=1e-6)
    assert abs(nll[1] / nll[0] - 1) <= 0.003 < abs(nll[2] / nll[0] - 1)
    current = program.placement.current()
    assert all(torch.equal(value, current[name]) for name, value in posterior.mean().items())


def test_the_nll_is_that_of_the_mean_predictive(tmp_path: Path) -> None:
    """Law: NLL(σ) = −(1/n) Σ log (1/S) Σ_s p(y_n | A + σ E_s), by hand; it does not depend on the batches."""
    program, guide = trained(tmp_path), TFB(num_draws=3, batch_size=7)
    guide.bind(program)
    data = program.task.train
    batch = program.task.collate(list(data.remove_columns("text")))
    with evaluating(program.model), torch.no_grad(), isolated(2):
        noise = guide._noise()
        found = guide._nll(program, data, noise, 0.2)
        mean = guide.mean()
        rows = []
        for s in range(3):
            draw = {**mean, **{name: mean[name] + 0.2 * e[s] for name, e in noise.items()}}
            rows.append(program.logits(draw, batch).softmax(-1)[torch.arange(len(data)), batch["labels"]])
    assert found == pytest.approx(-float(torch.stack(rows).mean(0).log().mean()), rel=1e-5)


def test_saves_loads_and_exports(tmp_path: Path) -> None:
    """Law: σ_q comes with the file; a loaded posterior predicts the same; draws differ only in A."""
    posterior = fit(trained(tmp_path), TFB(num_draws=2))
    posterior.save_pretrained(tmp_path / "saved")
    test = sentence_task().test
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    assert torch.equal(loaded.predict(test, 3).log_mean, posterior.predict(test, 3).log_mean)
    assert loaded.guide.random_sites() == ["lora.query.A", "lora.value.A"]
    assert loaded.predict(test, 3).variance.max() > 0
    loaded.export_peft(tmp_path / "draw", draw=1)


def test_a_fresh_adapter_is_refused() -> None:
    """Law: where B is zero no noise of A changes anything; the error says what to give."""
    with pytest.raises(ValueError, match="give a trained adapter"):
        fit(tiny_program(), TFB())
    with pytest.raises(ValueError, match="matches no A matrix"):
        TFB(random="*.B").bind(tiny_program())
    with pytest.raises(ValueError, match="positive"):
        TFB(tolerance=math.nan)
