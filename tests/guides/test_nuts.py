"""NUTS as a guide: the posterior that others approximate."""

from __future__ import annotations

from pathlib import Path

import pyro
import pytest
import torch

from pyrolora.guides.nuts import NUTS
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.priors.hierarchical import Hierarchical
from pyrolora.priors.normal import Normal
from tests.programs import linear_gaussian, sentence_task, tiny_bert, tiny_program


def test_on_a_linear_gaussian_model_it_samples_the_exact_posterior() -> None:
    """Law: with B known the points of A have the exact mean and covariance, from two chains."""
    truth = linear_gaussian(rank=1, outputs=2)
    program = truth.program
    guide = NUTS(size=300, warmup=50, chains=2, max_tree_depth=3)
    guide.bind(program)
    b = program.latents["lora.linear.B"].start

    class Known:
        """The program with B observed at its value, as the exact posterior has it."""

        placement, model, device = program.placement, program.model, program.device

        def __call__(self, batch):  # type: ignore[no-untyped-def]
            return pyro.poutine.condition(program, data={"lora.linear.B": b})(batch)

    del guide.latents["lora.linear.B"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for wanted in (150, 150):
            guide._run(Known(), truth.batch, wanted)  # type: ignore[arg-type]
    points = guide.kept(guide.latents["lora.linear.A"])[: guide.num_kept].flatten(1)
    scale = truth.covariance.diagonal().sqrt()
    assert len(points) == 300
    assert ((points.mean(0) - truth.mean) / scale).abs().max() < 0.4
    assert ((torch.cov(points.T) - truth.covariance) / scale / scale.unsqueeze(-1)).abs().max() < 0.4


def test_fits_saves_and_predicts(tmp_path: Path) -> None:
    """Law: it is a posterior like any other: fitted, saved, loaded, predicted, exported; same seed, same points."""
    program = tiny_program({"*.A": Hierarchical(0.2), "*": Normal(0.2)})
    guide = NUTS(size=9, warmup=3, chains=2, max_tree_depth=2)
    posterior, again = fit(program, guide), fit(program, guide)
    test = sentence_task().test
    assert torch.equal(posterior.predict(test, 4).log_mean, again.predict(test, 4).log_mean)
    assert posterior.predict(test, 16).num_draws == 9
    assert posterior.guide.random_sites() == list(program.latents)
    assert (posterior.draw(9)["lora.query.A.scale"] > 0).all()
    posterior.save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    assert torch.equal(loaded.predict(test, 4).log_mean, posterior.predict(test, 4).log_mean)
    loaded.export_peft(tmp_path / "draw", draw=2)
    with pytest.raises(ValueError, match="4 points a chain"):
        NUTS(size=7, chains=2)
