"""Quantised bases: bitsandbytes' 8- and 4-bit weights under gradients, curvature and predictions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pyrolora import guides
from pyrolora.guides.curvature import curvature
from pyrolora.guides.factors import KroneckerFactors
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.archive import describe, rebuild
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.generate import generate
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA
from tests.contracts.test_guides import CONCRETE, VARIANTS
from tests.programs import PRIORS, language_posterior, sentence_task, tiny_llama

bnb = pytest.importorskip("bitsandbytes")

CONFIGS = {
    4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    8: BitsAndBytesConfig(load_in_8bit=True),
}
OPTIONS: dict[str, dict[str, Any]] = VARIANTS | {
    "NUTS": {"size": 4, "warmup": 1, "chains": 1, "max_tree_depth": 1},
    "TFB": {"optimise": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama on disk: quantisation happens while loading."""
    tokenizer = sentence_task().tokenizer
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_labels=2, **sizes)
    where = tmp_path_factory.mktemp("llama")
    with isolated(0):
        LlamaForSequenceClassification(config).save_pretrained(where)
    return where


def program(base: nn.Module, dropout: float = 0.0) -> PyroLoRA:
    targets = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS", lora_dropout=dropout)
    with isolated(1):
        return PyroLoRA(base, config, priors=PRIORS, task=sentence_task())


def quantised(folder: Path, bits: int) -> nn.Module:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return AutoModelForSequenceClassification.from_pretrained(folder, quantization_config=CONFIGS[bits])


def dequantised(folder: Path) -> nn.Module:
    """The same weights after 4-bit rounding, in an ordinary model."""
    plain, packed = AutoModelForSequenceClassification.from_pretrained(folder), quantised(folder, 4)
    maps = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                maps[name].weight.copy_(weight)
    return plain


def at_random(chosen: PyroLoRA) -> dict[str, Tensor]:
    guide = MAP()
    guide.bind(chosen)
    with isolated(0), torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return {name: guide.point(latent) for name, latent in guide.latents.items()}


def test_curvature_is_that_of_the_rounded_weights(folder: Path) -> None:
    """Law: factors on a 4-bit base are those on an ordinary model with the same rounded weights, predicted or not."""
    found = []
    for base in (quantised(folder, 4), dequantised(folder)):
        chosen = program(base)
        assert chosen.task is not None and chosen.task.train is not None
        fit(chosen, Laplace(optimise=False)).predict(chosen.task.test, 4)  # type: ignore[arg-type]
        sites = [site for site in chosen.sites.values() if site.name.startswith("lora")]
        found.append(curvature(chosen, at_random(chosen), sites, chosen.task.train, structure="dense")[0])
    for mine, its in zip(found[0].values(), found[1].values(), strict=True):
        assert isinstance(mine, KroneckerFactors) and isinstance(its, KroneckerFactors)
        for a, b in ((mine.inputs, its.inputs), (mine.gradients, its.gradients)):
            assert torch.allclose(a.total, b.total, rtol=1e-3, atol=1e-4 * float(b.total.abs().max()))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*CONCRETE, *VARIANTS])
def test_every_guide_sees_the_rounded_weights(folder: Path, name: str) -> None:
    """Law: what a guide learnt on a 4-bit base predicts the same on an ordinary model with the same rounded weights."""
    arguments = default_arguments()
    arguments.max_steps = 3
    options = OPTIONS.get(name, {})
    dropout = 0.1 if name == "Dropout" else 0.0
    learnt = fit(
        program(quantised(folder, 4), dropout), getattr(guides, name.partition(",")[0])(**options), args=arguments
    )
    other = program(dequantised(folder), dropout)
    guide = rebuild(describe(learnt.guide), where="the guide")
    guide.bind(other)
    guide.load_state_dict(learnt.guide.state_dict())
    again = Posterior(other, guide.eval(), temperature=learnt.temperature, seed=learnt.seed)
    data = other.task.test.select(range(4))  # type: ignore[union-attr]
    found, its = (posterior.predict(data, 4).log_mean for posterior in (learnt, again))
    assert torch.isfinite(found).all()
    assert torch.allclose(found, its, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_prediction_leaves_gradients_alone(folder: Path, bits: int) -> None:
    """Law: a fit is the same whether or not the model has predicted before."""
    arguments = default_arguments()
    arguments.max_steps = 3
    means = []
    for before in (False, True):
        chosen = program(quantised(folder, bits))
        assert chosen.task is not None and chosen.task.test is not None
        if before:
            fit(chosen, Laplace(optimise=False)).predict(chosen.task.test)
        means.append(fit(chosen, MAP(), args=arguments).predict(chosen.task.test).log_mean)
    assert torch.allclose(means[0], means[1], atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_draws_share_a_pass_of_the_rounded_weights(tmp_path: Path, bits: int) -> None:
    """Law: text generated with all draws in one pass of a quantised base is that of draws run one after another."""
    tiny_llama().save_pretrained(tmp_path)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIGS[bits])
    posterior = language_posterior(MeanField(random="*"), base)
    prompts = ["the cold stone", "water"]
    for how in ("mixture", "draws"):
        found, loop = (generate(posterior, prompts, num_draws=3, how=how, chunk_size=c) for c in (8, 1))  # type: ignore[arg-type]
        for texts, others in zip(found, loop, strict=True):
            for text, other in zip(texts, others, strict=True):
                assert torch.equal(text.tokens, other.tokens)
                torch.testing.assert_close(text.entropy, other.entropy, atol=1e-3, rtol=1e-3)
