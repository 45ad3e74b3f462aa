from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig

from pyrolora import guides
from pyrolora.diagnostics.estimate import Estimate, Live, base_bytes, batches, estimate, meta_program
from pyrolora.inference.elbo import Objective
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner, log_likelihood, log_probabilities
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.program import PyroLoRA, evaluating
from pyrolora.recipe import Recipe, RecipeError, classes
from tests.architectures import PUBLISHED, shrunk

MODELS = Path(__file__).parents[2] / "models"
WIDE = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "moe_intermediate_size": 96}


def prepared(name: str, folder: Path, **changes: Any) -> tuple[Recipe, PreTrainedConfig]:
    """A recipe with the configuration of its architecture, shrunk, in the folder; dropout is off."""
    recipe = dataclasses.replace(Recipe.read(MODELS / f"{name}.yaml"), **changes)
    config = shrunk(PUBLISHED[recipe.base], 2000, **WIDE)
    for rate in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    config.pad_token_id = 1
    config.save_pretrained(folder)
    return recipe, config


def measured(work: Callable[[], Any]) -> int:
    """The most bytes of new tensors that were alive at once, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def real(recipe: Recipe, folder: Path, rows: int, length: int) -> tuple[PyroLoRA, dict[str, Tensor]]:
    """The same program with contents, on the CPU, with torch's own attention."""
    program = meta_program(recipe, folder)
    batch = {name: torch.zeros_like(value, device="cpu") for name, value in batches(program, recipe, length)(rows).items()}
    batch["attention_mask"] += 1
    batch["attention_mask"][0, 0] = 0  # rows of different lengths, as in any real batch
    batch["input_ids"] += 5
    program.model.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in [*program.model.named_parameters(), *program.model.named_buffers()]:
            if value.is_floating_point():
                value.normal_(0.0, 0.02)
            else:
                value.copy_(torch.arange(value.numel()).view(value.shape) if "position_ids" in name else 0)
    program.model.get_base_model().tie_weights()
    program.model.get_base_model().set_attn_implementation("sdpa")
    return program, batch


CASES = [
    ("minilm-commonsense", "MeanField", {}, False),
    ("roberta-sst2", "Inducing", {}, False),
    ("gpt2-wikitext2", "MAP", {}, False),
    ("llama-2-7b-openbookqa", "MeanField", {"dtype": "float32"}, False),
    ("llama-2-7b-openbookqa", "MeanField", {"dtype": "float32"}, True),
    ("mistral-7b-arc", "MeanField", {}, False),
    ("qwen3-0.6b-openbookqa", "InputAdaptive", {}, False),
    ("phi-2-boolq", "MAP", {}, True),
]


@pytest.mark.parametrize(("name", "guide", "changes", "checkpointing"), CASES)
def test_the_estimate_is_what_is_measured(
    name: str, guide: str, changes: dict[str, Any], checkpointing: bool, tmp_path: Path
) -> None:
    """Law: of a real step and a real prediction the allocator measures the estimated peak, within 15 %."""
    recipe, _ = prepared(name, tmp_path, **changes)
    rows, length, draws = 4, 64, 4
    found = estimate(
        recipe, guide, config=tmp_path, batch_size=rows, length=length, draws=draws, checkpointing=checkpointing
    )
    program, batch = real(recipe, tmp_path, rows, length)
    if checkpointing:
        program.enable_activation_checkpointing()
    own = recipe.build_guide(guide)
    own.bind(program)
    objective = Objective(program, own)
    objective.train()

    def step() -> None:
        with own.hooks(program):
            objective(batch).backward()
        own.zero_grad()

    step()
    parts = dict(found.fit)
    fixed = [parts.pop(part) for part in ("base weights", "trained parameters", "Adam's two moments")]
    print(f"{name} {guide} fit: {sum(parts.values()) / measured(step):.3f}")
    assert fixed[0] == sum(p.numel() * p.element_size() for n, p in program.model.named_parameters() if "lora_" not in n and "modules_to_save" not in n)
    assert 2 * fixed[1] == fixed[2] == 8 * sum(p.numel() for p in own.parameters())
    assert sum(parts.values()) == pytest.approx(measured(step), rel=0.15)

    function = log_likelihood(program) if isinstance(program.likelihood, NextToken) else log_probabilities(program)

    def predict() -> None:
        drawn = Posterior(program, own).draw(draws) if own.random_sites() else {}
        random = {n: v for n, v in drawn.items() if n in own.random_sites()}
        fixed = {n: v for n, v in own.mean().items() if n not in random}
        natural = own.natural_parameters(program, draws)
        Runner(program, {} if natural else random, fixed, vectorise=True, natural=natural).evaluate(function, batch)

    own.eval()
    with evaluating(program.model):
        predict()
        expected = measured(predict)
    parts = dict(found.predict)
    for part in ("base weights", "trained parameters"):
        parts.pop(part)
    print(f"{name} {guide} predict: {sum(parts.values()) / expected:.3f}")
    assert sum(parts.values()) == pytest.approx(expected, rel=0.15)
