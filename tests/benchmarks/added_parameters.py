"""Trained parameters of each guide at the shapes of LLaMA-2-7B, against plain LoRA's; the base is on the meta device.

Run: python tests/benchmarks/added_parameters.py
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.guides.base import Guide
from pyrolora.guides.inducing import Inducing
from pyrolora.guides.input_adaptive import InputAdaptive
from pyrolora.guides.laplace import Laplace
from pyrolora.guides.map import MAP
from pyrolora.guides.mean_field import MeanField
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA

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


def program(targets: list[str]) -> PyroLoRA:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    for module in adapted.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            module.weight = nn.Parameter(0.01 * torch.randn(module.weight.shape))
    return PyroLoRA(adapted, priors={"*": Normal(0.1)}, likelihood=AnswerTokens([1, 2]), num_data=1)


def main() -> None:
    print("| guide | " + " | ".join(("q, v", "q, v, lm_head")) + " |\n| --- | --- | --- |")
    columns = []
    for targets in (["q_proj", "v_proj"], ["q_proj", "v_proj", "lm_head"]):
        own = program(targets)
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
            added = f"{trained / 1e6:.2f} M (+{(trained - plain) / 1e6:.3f} M)"
            cells.append(added + (f", {kept / 1e6:.1f} M kept beside" if kept else ""))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
