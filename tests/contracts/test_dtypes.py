"""Every guide on base models of other types than float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora import guides
from pyrolora.guides.base import Guide
from pyrolora.inference.elbo import Objective
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA
from tests.programs import PRIORS, lora, sentence_task, tiny_bert

CONCRETE = [name for name in guides.__all__ if name != "Guide"]
# How far log probabilities may be from float32's: round-off of two layers, and 8 bits of mantissa.
TOLERANCE = {torch.float64: 1e-4, torch.bfloat16: 0.15}
EVERY_TYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def program_of(dtype: torch.dtype, guide: Guide) -> PyroLoRA:
    config = lora(lora_dropout=0.1 if isinstance(guide, guides.Dropout) else 0.0)
    with isolated(0):
        program = PyroLoRA(tiny_bert().to(dtype), config, priors=PRIORS, task=sentence_task())
    program.model.eval()
    return program


def moved(guide: Guide, dtype: torch.dtype) -> Posterior:
    """The guide on a base of that type, away from its start by the same numbers whatever the type."""
    program = program_of(dtype, guide)
    with isolated(0):
        guide.bind(program)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Posterior(program, guide)


@EVERY_TYPE
@pytest.mark.parametrize("name", CONCRETE)
def test_a_guide_says_the_same_on_every_type_of_base(name: str, dtype: torch.dtype) -> None:
    """Law: objective, gradients and predictions on a float64 or bfloat16 base are finite and those of a float32 base
    within the type's round-off; the guide's own numbers are float32 on each."""
    data = sentence_task().test
    found = {}
    for each in (torch.float32, dtype):
        guide = getattr(guides, name)()
        posterior = moved(guide, each)
        assert {parameter.dtype for parameter in guide.parameters()} <= {torch.float32}
        objective = Objective(posterior.program, guide)
        with isolated(5):
            loss = objective(sentence_task().collate(list(data)))
        gradients = torch.autograd.grad(loss, list(guide.parameters()), allow_unused=True)
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        assert torch.isfinite(loss) and torch.isfinite(posterior.predict(data, 2).log_mean).all()
        # Noise of activations is drawn in their type, and is not the same numbers in another.
        own_noise = isinstance(guide, guides.InputAdaptive)
        found[each] = [posterior.predict(data, 0 if own_noise else 2).log_mean.double()]
        found[each] += [] if own_noise else [loss.double()]
    for mine, theirs in zip(found[dtype], found[torch.float32], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=TOLERANCE[dtype])


@EVERY_TYPE
@pytest.mark.parametrize("name", ["MeanField", "Laplace"])
def test_fit_save_and_load(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Law: a fit on a base of another type is finite, and its saved posterior predicts to the bit on that base."""
    options: dict = {"max_steps": 3, "report_to": "none", "save_strategy": "no", "logging_steps": 9, "use_cpu": True}
    args = TrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, **options)
    guide = getattr(guides, name)()
    posterior = fit(program_of(dtype, guide), guide, args=args)
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = Posterior.from_pretrained(tmp_path / "posterior", tiny_bert().to(dtype), task=sentence_task())
    mine, its = (each.predict(sentence_task().test, 3).log_mean for each in (posterior, loaded))
    assert torch.isfinite(mine).all() and torch.equal(mine, its)


@pytest.mark.parametrize("name", CONCRETE)
def test_a_guide_under_autocast(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: in the block that the Trainer's ``bf16`` makes, a step's draws and divergences are float32's to the
    bit, its objective is to the round-off of bfloat16, and its gradients are finite and float32."""
    posterior = moved(getattr(guides, name)(), torch.float32)
    objective = Objective(posterior.program, posterior.guide)
    parameters = list(posterior.guide.parameters())
    losses, divergences, draws = [], [], []
    evaluate = posterior.program.logits
    monkeypatch.setattr(posterior.program, "logits", lambda draw, batch: draws.append(draw) or evaluate(draw, batch))
    for automatic in (False, True):
        with isolated(5), torch.autocast("cpu", torch.bfloat16, enabled=automatic):
            loss = objective(sentence_task().collate(list(sentence_task().test)))
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assert all(g is None or (g.dtype == torch.float32 and torch.isfinite(g).all()) for g in gradients)
        assert objective.elbo.terms is not None
        losses.append(loss.detach())
        divergences.append(objective.elbo.terms.kl)
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=TOLERANCE[torch.bfloat16])
    for one, other in (draws, divergences):
        assert one.keys() == other.keys()
        assert not [name for name, value in one.items() if not torch.equal(other[name], value)]
