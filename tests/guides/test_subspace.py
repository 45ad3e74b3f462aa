"""Subspace inference: a random number for each rank, and its KL the right way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pyro import poutine
from transformers import TrainingArguments

from pyrolora.guides.subspace import Subspace
from pyrolora.inference.elbo import TemperedELBO
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.priors.flat import Flat
from tests.programs import linear_gaussian, sentence_task, tiny_bert, tiny_program

SITE = "lora.linear.A"


def moved(**options: float) -> tuple[Subspace, object]:
    """A guide on the linear-Gaussian program with μ and σ away from their start."""
    truth, guide = linear_gaussian(), Subspace(**options)
    guide.bind(truth.program)
    with torch.no_grad(), isolated(1):
        for parameter in guide.families.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return guide, truth


@pytest.mark.parametrize("prior_scale", [1.0, 0.3])
def test_its_kl_is_that_of_q_from_p(prior_scale: float) -> None:
    """Law: the KL in the ELBO is E_q[log q − log p] by Monte Carlo, and not its reverse."""
    guide, truth = moved(prior_scale=prior_scale)
    loss = TemperedELBO()
    with torch.no_grad(), isolated(0):
        loss.differentiable_loss(guide.augmented(truth.program), guide, truth.batch)
        q, p = guide._family(guide.latents[SITE]).distribution(), guide._family(guide.latents[SITE]).prior()
        draws = q.sample((200_000,))
        forward = (q.log_prob(draws) - p.log_prob(draws)).mean(0).sum()
        draws = p.sample((200_000,))
        reverse = (p.log_prob(draws) - q.log_prob(draws)).mean(0).sum()
    assert loss.terms.kl[f"{SITE}.V"].item() == pytest.approx(forward.item(), rel=0.02)
    assert abs(reverse / forward - 1) > 0.2
    mu, sigma = guide._family(guide.latents[SITE]).loc, guide._family(guide.latents[SITE]).log_scale.exp()
    by_hand = 0.5 * (mu**2 + sigma**2) / prior_scale**2 - 0.5 - (sigma / prior_scale).log()
    assert loss.terms.kl[f"{SITE}.V"].item() == pytest.approx(by_hand.sum().item(), rel=1e-5)
    assert loss.terms.kl[SITE] == 0


@pytest.mark.parametrize("random", ["*.A", "*.B", "lora.*"])
def test_the_update_is_b_diag_v_a(random: str) -> None:
    """Law: ΔW of a draw is B diag(v) A with one v for each rank and layer; A and B are the points."""
    program, guide = tiny_program(), Subspace(random=random)
    guide.bind(program)
    with torch.no_grad():
        guide.points["lora/query/B"].normal_()
        trace = poutine.trace(guide).get_trace()
    site = "lora.query.B" if random == "*.B" else "lora.query.A"
    v = trace.nodes[f"{site}.V"]["value"]
    assert v.shape == (2, 2)
    found = trace.nodes["lora.query.B"]["value"] @ trace.nodes["lora.query.A"]["value"]
    expected = guide.points["lora/query/B"] @ torch.diag_embed(v) @ guide.points["lora/query/A"]
    assert torch.allclose(found, expected, atol=1e-6)
    assert guide.random_sites() == [site, site.replace("query", "value")]


def test_it_adds_two_numbers_for_each_rank() -> None:
    """Law: beside plain LoRA it has μ and σ for each rank of each layer: 2 r L."""
    program, guide = tiny_program(), Subspace()
    guide.bind(program)
    sites = sum(site.shape.numel() for site in program.sites.values())
    assert sum(p.numel() for p in guide.parameters()) == sites + 2 * (2 * 2) * 2


def test_fits_saves_and_loads(tmp_path: Path) -> None:
    """Law: a loaded one predicts the same, under flat priors of A and B too; it enters the ArviZ tree with v."""
    program = tiny_program({"lora.*": Flat(), "*": Flat()})
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to="none", save_strategy="no")
    posterior = fit(program, Subspace(), args=arguments)
    posterior.save_pretrained(tmp_path / "saved")
    test = sentence_task().test
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    assert torch.equal(loaded.predict(test, 3).log_mean, posterior.predict(test, 3).log_mean)
    assert loaded.draw(2)["lora.query.A.V"].shape == (2, 2, 2)
    assert 0 < loaded.describe()["lora.query.A"]["sigma_V"] < 1
    assert "lora.query.A.V" in loaded.to_datatree(num_draws=2)["posterior"]
    loaded.export_peft(tmp_path / "draw", draw=1)


def test_refuses_a_prior_without_width() -> None:
    """Law: the prior scale is positive."""
    with pytest.raises(ValueError, match="prior_scale"):
        Subspace(prior_scale=0)
