"""MC dropout through LoRA's own dropout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from pyrolora.guides.dropout import Dropout
from pyrolora.guides.map import MAP
from pyrolora.inference.fit import fit
from pyrolora.inference.posterior import Posterior
from pyrolora.program import PyroLoRA
from tests.programs import lora, sentence_task, tiny_bert, tiny_program


def program(rate: float = 0.3) -> PyroLoRA:
    return tiny_program(adapter=lora(lora_dropout=rate))


def posterior(rate: float = 0.3) -> Posterior:
    """Untrained, at weights where the adapter matters."""
    guide, found = Dropout(), program(rate)
    guide.bind(found)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return Posterior(found, guide)


def test_predicts_through_the_masks_of_training() -> None:
    """Law: a draw is the forward pass with A (m ∘ x)/(1 − p), one mask for each adapter, example, token and input."""
    fitted, test = posterior(), sentence_task().test
    batch = fitted.program.task.collate([test[i] for i in range(4)])
    found = fitted.guide.natural_parameters(fitted.program, 1, seed=0)(batch)[0]
    seen = []
    hooks = []
    for module in fitted.program.model.modules():
        if hasattr(module, "lora_dropout"):
            mask = module.lora_dropout["default"]
            hooks.append(mask.register_forward_hook(lambda m, x, y: seen.append((x[0].detach(), y.detach()))))
    again = fitted.guide.natural_parameters(fitted.program, 1, seed=0)(batch)[0]
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, again) and len(seen) == 4
    for before, after in seen:
        kept = after != 0
        assert torch.allclose(after[kept], before[kept] / 0.7, atol=1e-6)
        assert 0.6 < kept.float().mean() < 0.8


def test_draws_differ_and_average_to_the_prediction() -> None:
    """Law: the predictive is the mean over masks; it is not the point's, which num_draws=0 gives."""
    fitted, test = posterior(), sentence_task().test
    prediction = fitted.predict(test, 10)
    assert prediction.num_draws == fitted.guide.passes(10, 2) == 10
    assert torch.allclose(prediction.mean, prediction.draws.exp().mean(0), atol=1e-6)
    assert prediction.variance.min() > 0
    point = Posterior(fitted.program, MAP())
    point.guide.bind(fitted.program)
    point.guide.load_state_dict(fitted.guide.state_dict())
    assert torch.equal(fitted.predict(test, 0).log_mean, point.predict(test).log_mean)
    assert not torch.allclose(fitted.predict(test, 0).mean, prediction.mean, atol=1e-3)
    assert not fitted.guide.joint_draws


def test_masks_depend_on_the_seed_alone() -> None:
    """Law: the same seed gives the same draws, more extend fewer, and the caller's generator is untouched."""
    fitted, test = posterior(), sentence_task().test
    before = torch.random.get_rng_state()
    few, many = (fitted.predict(test, size, seed=4, batch_size=5).draws for size in (2, 3))
    assert torch.equal(few, many[:2])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(few, fitted.predict(test, 2, seed=5).draws)
    # Rows of one batch and of the next have masks of their own.
    twice = test.select([0, 0])
    apart = fitted.predict(twice, 1, batch_size=1).draws[0]
    assert not torch.allclose(apart[0], apart[1])


def test_the_dropout_is_off_afterwards() -> None:
    """Law: every module is in the mode that it was in."""
    fitted = posterior()
    fitted.program.model.eval()
    fitted.predict(sentence_task().test, 2)
    assert not any(module.training for module in fitted.program.model.modules())


def test_without_dropout_it_says_what_to_change() -> None:
    """Law: an adapter without dropout is an error that names the option."""
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1"):
        Dropout().bind(tiny_program())


def test_fits_saves_and_loads(tmp_path: Path) -> None:
    """Law: a fitted one predicts the same after loading; its rate comes with the adapter's configuration."""
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    fitted = fit(program(), Dropout(), args=arguments)
    fitted.save_pretrained(tmp_path / "saved")
    loaded = Posterior.from_pretrained(tmp_path / "saved", tiny_bert(), task=sentence_task())
    test = sentence_task().test
    assert torch.equal(loaded.predict(test, 3).log_mean, fitted.predict(test, 3).log_mean)
    fitted.export_peft(tmp_path / "adapter")
