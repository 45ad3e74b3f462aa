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
from pyrolora.construct import RecipeError
from pyrolora.diagnostics.estimate import Live, base_bytes, batches, estimate, meta_program
from pyrolora.inference.elbo import Objective
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.predict import Runner, log_likelihood, log_probabilities
from pyrolora.likelihoods.next_token import NextToken
from pyrolora.program import PyroLoRA, evaluating
from pyrolora.recipe import Recipe
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
    batch = {
        name: torch.zeros_like(value, device="cpu") for name, value in batches(program, recipe, length)(rows).items()
    }
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
    """Law: of a real step and a real prediction the allocator measures the estimated peak, within 20 %."""
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
    fixed = [parts.pop(part) for part in ("base weights", "guide's parameters and buffers", "Adam's two moments")]
    print(f"{name} {guide} fit: {sum(parts.values()) / measured(step):.3f}")
    base = [p for n, p in program.model.named_parameters() if "lora_" not in n and "modules_to_save" not in n]
    assert fixed[0] == sum(p.numel() * p.element_size() for p in base)
    assert fixed[1] >= 4 * sum(p.numel() for p in own.parameters()) == fixed[2] // 2
    assert sum(parts.values()) == pytest.approx(measured(step), rel=0.2)

    if not found.predict:
        return
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
    for part in ("base weights", "guide's parameters and buffers"):
        parts.pop(part)
    print(f"{name} {guide} predict: {sum(parts.values()) / expected:.3f}")
    assert sum(parts.values()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", [name for name in guides.__all__ if name not in ("Guide", "NUTS")])
def test_every_guide_has_an_estimate(name: str, tmp_path: Path) -> None:
    """Law: every guide's parameters are counted; a part is empty only where the guide has a stage of its own."""
    options = {"guides": {"Ensemble": {"guide": "MeanField", "size": 3}}}
    recipe, _ = prepared("minilm-commonsense", tmp_path, **options)
    adapter = {**recipe.adapter, "lora_dropout": 0.1}  # type: ignore[dict-item]
    recipe = dataclasses.replace(
        recipe, adapter=adapter, priors={"*": {"class_path": "Normal", "init_args": {"scale": 0.1}}}
    )
    found = estimate(recipe, name, config=tmp_path, batch_size=2, length=8, draws=2)
    guide = recipe.build_guide(name)
    guide.bind(meta_program(recipe, tmp_path))
    assert found.parameters[name] == sum(p.numel() for p in guide.parameters())
    own_stage = {"InputAdaptive", "Laplace", "SWAG", "TFB", "Checkpoints", "SGLD"}
    assert found.fit or not guide.optimise
    assert found.predict or name in own_stage


def test_more_rows_longer_rows_more_draws_take_more(tmp_path: Path) -> None:
    """Law: activations grow in proportion to rows, checkpointing takes most of them away, draws take their own size."""
    recipe, _ = prepared("llama-2-7b-openbookqa", tmp_path)
    kept = "activations kept for the backward pass"
    options: dict[str, Any] = {"config": tmp_path, "batch_size": 4, "length": 32, "draws": 2}
    one = estimate(recipe, "MeanField", **options)
    two = estimate(recipe, "MeanField", **{**options, "batch_size": 8})
    less = estimate(recipe, "MeanField", **{**options, "batch_size": 8}, checkpointing=True)
    more = estimate(recipe, "MeanField", **{**options, "draws": 6})
    weights = sum(site.shape.numel() for site in meta_program(recipe, tmp_path).sites.values() if site.role == "A")
    assert 1.6 < two.fit[kept] / one.fit[kept] < 2
    assert less.fit[kept] < 0.6 * two.fit[kept]
    assert more.predict["draws"] - one.predict["draws"] >= 4 * 4 * weights
    assert "GiB" in str(one) and "in all" in str(one)


@pytest.mark.parametrize(
    "quantization",
    [{"load_in_8bit": True}, {"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}],
)
def test_quantised_weights(quantization: dict[str, bool], tmp_path: Path) -> None:
    """Law: the bytes of a quantised base are those of what bitsandbytes makes of it, within a percent."""
    pytest.importorskip("bitsandbytes")
    config = shrunk(PUBLISHED["meta-llama/Llama-2-7b-hf"], 500, **{**WIDE, "hidden_size": 256, "head_dim": 64})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**quantization)
    )
    real = 0
    for parameter in loaded.parameters():
        real += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for part in [] if state is None else [state, state.state2]:
            real += 0 if part is None else part.absmax.numel() * part.absmax.element_size()
        scales = getattr(parameter, "SCB", None)
        real += 0 if scales is None else scales.numel() * scales.element_size()
    meta = model.to("meta")
    found, widest = base_bytes(meta, dict(meta.named_parameters()), quantization)
    assert found == pytest.approx(real, rel=0.01)
    assert widest == 2 * 256 * 384
    assert base_bytes(meta, dict(meta.named_parameters()), {}) == (sum(2 * p.numel() for p in meta.parameters()), 0)


def test_only_what_is_alive_counts() -> None:
    """Law: new storage counts once while it lives; views, given tensors and what has gone do not."""
    given = torch.zeros(8, device="meta")
    with Live([given]) as live:
        view = given[2:]
        first = given + 1
        second = first * 2
        del first
        third = view + second[2:]
    assert live.now == 4 * (8 + 6) and live.peak == 4 * (8 + 8)
    del third
    assert live.now == 4 * 8
    assert second.numel() == 8


def test_what_cannot_be_estimated(tmp_path: Path) -> None:
    """Law: without a configuration the message says how to give one; a guide that does not fit is named."""
    recipe = Recipe.read(MODELS / "gpt2-wikitext2.yaml")
    with pytest.raises(RecipeError, match=r"gpt2-wikitext2\.yaml: no configuration in .*--config PATH"):
        estimate(recipe, "MAP", config=tmp_path / "none")
    with pytest.raises(RecipeError, match=r"gpt2-wikitext2\.yaml: Dropout: .*lora_dropout"):
        estimate(*prepared("gpt2-wikitext2", tmp_path)[:1], "Dropout", config=tmp_path)
