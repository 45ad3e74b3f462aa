"""Time and memory of answer-token logits: the whole vocabulary's against those of the K answers, on a random Llama.

Run: python tests/benchmarks/answer_head.py
     python tests/benchmarks/answer_head.py --rows 16 --length 256 --device cuda
Time is the median of a training step (a forward and a backward pass of MAP) and of a prediction with several draws;
memory is what the allocator had alive at once beside the weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pyrolora.inference.predict import Runner
from pyrolora.likelihoods.answer_tokens import AnswerTokens
from pyrolora.likelihoods.base import Likelihood
from pyrolora.priors.normal import Normal
from pyrolora.program import PyroLoRA
from tests.diagnostics.test_estimate import measured


class WholeVocabulary(AnswerTokens):
    """The same likelihood from all logits of the model."""

    evaluate = Likelihood.evaluate


def program(likelihood: AnswerTokens, options: argparse.Namespace) -> PyroLoRA:
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(options.device)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PyroLoRA(model, lora, priors={"*": Normal(0.1)}, likelihood=likelihood, num_data=options.rows)


def peak(work: Callable[[], Any], device: str) -> int:
    if device == "cpu":
        return measured(work)
    torch.cuda.empty_cache()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - start


def seconds(work: Callable[[], Any], rounds: int, device: str) -> float:
    found = []
    for _ in range(rounds):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.process_time() if device == "cpu" else time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append((time.process_time() if device == "cpu" else time.perf_counter()) - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "vocabulary": 128256,
        "width": 256,
        "layers": 4,
        "rows": 4,
        "length": 64,
        "draws": 4,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    ids = torch.randint(0, options.vocabulary, (options.rows, options.length), device=options.device)
    labels = torch.zeros(options.rows, dtype=torch.long, device=options.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    for likelihood in (WholeVocabulary([5, 6, 7, 8]), AnswerTokens([5, 6, 7, 8])):
        own = program(likelihood, options)
        draws = {n: 0.1 * torch.randn(options.draws, *s.shape, device=options.device) for n, s in own.sites.items()}

        def step(own: PyroLoRA = own, draws: dict[str, Tensor] = draws) -> None:
            values = {name: value[0].clone().requires_grad_() for name, value in draws.items()}
            own.likelihood.log_prob(own.logits(values, batch), {}, batch).sum().backward()

        def predict(own: PyroLoRA = own, draws: dict[str, Tensor] = draws) -> None:
            Runner(own, draws, {}, vectorise=True).evaluate(own.logits, batch)

        for name, work in (("step", step), ("predict", predict)):
            work()
            took, kept = seconds(work, options.rounds, options.device), peak(work, options.device)
            print(f"{type(likelihood).__name__:16s} {name:8s} {took:9.4f} s {kept / 2**20:9.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
