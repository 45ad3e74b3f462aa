from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.diagnostics.language import evaluate_language, mixture, nats_per_token, perplexity
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.program import PyroLoRA
from pyrolora.tasks.language_modeling import LanguageModeling
from tests.programs import PRIORS, lora, tiny_program, tokenizer

WORDS = ["the", "cold", "stone", "lies", "in", "a", "warm", "house", "while", "dark", "water", "runs"]


@pytest.fixture(scope="module")
def posterior() -> Posterior:
    """Mean field over a tiny Llama, away from its start. Read only."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, size)) for size in (5, 9, 14, 20, 3, 11)]
    task = LanguageModeling(tokenizer(), train=Dataset.from_dict({"text": texts}), max_length=8)
    with isolated(0):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=len(task.tokenizer), num_key_value_heads=1, **sizes))
        config = lora(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", modules_to_save=None)
        program = PyroLoRA(base, config, priors={name: PRIORS[name] for name in ("*.A", "*.B")}, task=task)
        guide = MeanField(random="*")
        guide.bind(program)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return Posterior(program, guide)


def test_perplexity_by_hand(posterior: Posterior) -> None:
    """Law: exp(−Σ log p̄/Σ T), log p̄ of whole blocks from draws of the weights, by one cross-entropy a block."""
    task = posterior.program.task
    assert task is not None
    found = evaluate_language(posterior, task.train, num_draws=5)
    draws, total, tokens = posterior.draw(5), 0.0, 0
    for row in task.train.remove_columns("text"):
        batch = task.collate([row])
        scores = []
        for s in range(5):
            with torch.no_grad(), posterior.program.placed({name: value[s] for name, value in draws.items()}):
                logits = posterior.program.model(input_ids=batch["input_ids"]).logits[0, :-1]
            scores.append(logits.log_softmax(-1).gather(-1, batch["labels"][0, 1:, None]).sum())
        total += float(torch.stack(scores).double().logsumexp(0)) - math.log(5)
        tokens += len(row["input_ids"]) - 1
    assert found.num_tokens == tokens and found.num_blocks == len(task.train) and found.num_draws == 5
    assert found.perplexity.value == pytest.approx(math.exp(-total / tokens), rel=1e-5)
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    assert found.by_draws.keys() == {1, 4, 5} and found.by_draws[5] == found.perplexity.value
    mean = evaluate_language(posterior, task.train, num_draws=0)
    assert found.mean_weights == pytest.approx(mean.perplexity.value) and mean.mean_weights is None
    assert "with mean weights" in str(found) and "with mean weights" not in str(mean)


def test_one_draw_is_no_mixture() -> None:
    """Law: of one draw the mixture is its score; of equal draws that of each; an impossible draw adds nothing."""
    scores = torch.tensor([[-3.0, -5.0]], dtype=torch.double)
    assert mixture(scores) == pytest.approx(np.array([-3.0, -5.0]))
    assert mixture(scores.expand(7, 2)) == pytest.approx(np.array([-3.0, -5.0]))
    assert mixture(torch.tensor([[-3.0], [-math.inf]])) == pytest.approx(np.array([-3.0 - math.log(2)]))


def test_interval_covers() -> None:
    """Law: the interval over blocks covers the ratio of expectations in about 95 % of data sets."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        tokens = generator.integers(5, 30, 60).astype(float)
        found = nats_per_token(-tokens * generator.gamma(4.0, 0.5, 60), tokens)
        held += found.low <= 2.0 <= found.high
    assert 178 <= held <= 199


def test_perplexity_has_no_end(posterior: Posterior, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: exp of the nats, and infinity where a float ends: a very bad posterior is scored, not refused."""
    assert perplexity(2.0) == pytest.approx(math.exp(2.0)) and perplexity(709.0) < math.inf
    assert perplexity(800.0) == perplexity(math.inf) == math.inf
    task = posterior.program.task
    assert task is not None
    bad = torch.full((3, len(task.train)), -1e5)
    monkeypatch.setattr(posterior, "log_likelihood", lambda *_, **__: bad)
    found = evaluate_language(posterior, task.train, num_draws=3)
    assert found.perplexity.value == found.perplexity.high == found.mean_weights == found.by_draws[3] == math.inf
    assert math.isfinite(found.nats_per_token.value) and "perplexity     inf" in str(found)


def test_classes_are_refused() -> None:
    """Law: a task over classes has no perplexity; the error names what to use."""
    program, guide = tiny_program(), MAP()
    guide.bind(program)
    assert program.task is not None
    with pytest.raises(ValueError, match=r"likelihood here is Categorical\. Use evaluate_posterior"):
        evaluate_language(Posterior(program, guide), program.task.train)
