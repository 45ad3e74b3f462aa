"""Trained parameters of each guide at the shapes of MiniLM and LLaMA-2-7B, against plain LoRA's.

Run: python tests/benchmarks/added_parameters.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import Likelihood
from pyrolora.likelihoods.categorical import Categorical
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

ANSWERS = AnswerTokens([1, 2])
GUIDES: dict[str, Guide] = {
    "MAP": MAP(),
    "MeanField over A": MeanField(),
    "BLoB": MeanField.blob(),
    "InputAdaptive": InputAdaptive(),
    "Inducing over A, 8 inducing variables": Inducing(),
    "Inducing over A and B, 8 inducing variables": Inducing(random="lora.*"),
    "Inducing over A and B, 9 inducing variables": Inducing(random="lora.*", size=9),
    "Inducing, product": Inducing(structure="product"),
    "Laplace": Laplace(),
}


def minilm() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )


# Of each column: the base model, the modules to adapt, PEFT's task, and the likelihood.
COLUMNS: dict[str, tuple[Callable[[], PreTrainedModel], list[str], str, Likelihood]] = {
    "MiniLM: query, value": (minilm, ["query", "value"], "SEQ_CLS", Categorical(2)),
    "LLaMA-2-7B: q, v": (lambda: LlamaForCausalLM(LlamaConfig()), ["q_proj", "v_proj"], "CAUSAL_LM", ANSWERS),
    "q, v, lm_head": (lambda: LlamaForCausalLM(LlamaConfig()), ["q_proj", "v_proj", "lm_head"], "CAUSAL_LM", ANSWERS),
}


def program(make: Callable[[], PreTrainedModel], targets: list[str], task: str, likelihood: Likelihood) -> PyroLoRA:
    with torch.device("meta"):
        model = make()
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=task))
    for module in adapted.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(0.01 * torch.randn(parameter.shape)))
    return PyroLoRA(adapted, priors={"*": Normal(0.1)}, likelihood=likelihood, num_data=1)


def short(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def main() -> None:
    print("| guide | " + " | ".join(COLUMNS) + " |\n| --- |" + " --- |" * len(COLUMNS))
    columns = []
    for column in COLUMNS.values():
        own = program(*column)
        plain = sum(site.shape.numel() for site in own.sites.values())
        counts = {}
        for name, guide in GUIDES.items():
            guide.bind(own)
            counts[name] = (sum(p.numel() for p in guide.parameters()), sum(b.numel() for b in guide.buffers()))
        columns.append((plain, counts))
    for name in GUIDES:
        cells = []
        for plain, counts in columns:
            trained, kept = counts[name]
            cells.append(f"{short(trained)} (+{short(trained - plain)})" + (f", {short(kept)} kept" if kept else ""))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
