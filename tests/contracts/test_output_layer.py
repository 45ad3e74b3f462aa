"""The output layer of a causal language model as a target of the adapters, under both of its likelihoods."""

from __future__ import annotations

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.inference.fit import default_arguments, fit
from pyrolora.inference.randomness import isolated
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.base import Task
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.multiple_choice import AnswerTokenChoice
from tests.test_models import byte_pairs

GUIDES = [MAP(), MeanField(), Inducing(), Laplace(), Laplace(predictive="weights"), Laplace(structure="diagonal")]
NAMES = ["map", "mean-field", "inducing", "laplace", "laplace-weights", "laplace-diagonal"]


def task(kind: str) -> Task:
    tokenizer = byte_pairs()
    tokenizer.pad_token = tokenizer.eos_token
    if kind == "answers":
        rows = [{"question": f"What is {w}?", "choices": ["a", "b"], "label": i % 2} for i, w in enumerate("abcdef")]
        return AnswerTokenChoice(tokenizer, train=datasets.Dataset.from_list(rows))
    texts = ["What is a? Answer: A", "What is a question? Answer: no", "Answer: yes"]
    return LanguageModeling(tokenizer, train=datasets.Dataset.from_dict({"text": texts}), max_length=8)


def program(kind: str) -> PyroLoRA:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = task(kind)
    config = LlamaConfig(vocab_size=len(data.tokenizer), num_key_value_heads=1, initializer_range=0.2, **sizes)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with isolated(0):
        return PyroLoRA(LlamaForCausalLM(config), lora, priors={"*": Normal(0.2)}, task=data)


@pytest.mark.parametrize("kind", ["answers", "text"])
@pytest.mark.parametrize("guide", GUIDES, ids=NAMES)
def test_guides_adapt_the_output_layer(guide: Guide, kind: str) -> None:
    """Law: one step moves the output layer's adapter, and the posterior judges rows with finite numbers that the
    adapter of the output layer changes."""
    own = program(kind)
    assert own.task is not None
    arguments = default_arguments(None, seed=0)
    arguments.max_steps, arguments.per_device_train_batch_size, arguments.warmup_steps = 1, 4, 0
    if kind == "text" and isinstance(guide, Laplace) and guide.predictive != "weights":
        with pytest.raises(ValueError, match=r"of labels, not of texts.*predictive='weights'"):
            fit(own, guide, args=arguments)
        return
    posterior = fit(own, guide, args=arguments)
    mean = posterior.mean()
    assert not torch.equal(mean["lora.lm_head.B"], own.latents["lora.lm_head.B"].start)
    nats = posterior.log_likelihood(own.task.train, 2)
    assert torch.isfinite(nats).all() and nats.shape[-1] == len(own.task.train)
    if guide.random_sites():
        assert "lora.lm_head.A" in posterior.draw(2) and float(nats.std(0).max()) > 0
    batch = own.task.collate([{k: v for k, v in own.task.train[i].items() if k != "text"} for i in range(2)])
    without = {name: value for name, value in mean.items() if "lm_head" not in name}
    with_, none = posterior.program.logits(mean, batch), posterior.program.logits(without, batch)
    assert not torch.equal(with_, none)
